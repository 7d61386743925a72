"""Few-shot classification tasks over images in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfo_ext.tasks.batch import Examples, TaskBatch
from kfo_ext.tasks.draws import ClassDraws, task_labels


class ImageClasses:
    """Tasks of `ways` distinct classes, with `shots` + `queries` distinct images of each.

    Labels are assigned to classes at random; a task's examples are in label order. The CPU draws every random choice,
    and the device that holds the images makes the meta-batch without synchronizing: the same bits on any device.

    Args:
        images: (n_images, C, H, W) uint8, the images of a class one after the other.
        offsets: (n_classes + 1,) int64; class c has the images offsets[c] to offsets[c + 1].
        split: the name of this set of classes, part of the random stream's name.
        ways: classes per task.
        shots: support images per class.
        queries: query images per class.
        seed: the run's seed.
        rotations: turn each class of each task by its own 0, 90, 180 or 270 degrees.
        device: the device of all images and of meta-batches.
        names: names of the classes, for messages.

    Raises:
        TypeError: images are not uint8, offsets are not int64, or a count is no integer.
        ValueError: the images, the offsets or the counts do not fit each other, or the device is not available.
    """

    def __init__(
        self,
        images: Tensor,
        offsets: Tensor,
        split: str,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        seed: int = 0,
        rotations: bool = False,
        device: torch.device | str = "cpu",
        names: Sequence[str] | None = None,
    ) -> None:
        _check_images(images, offsets, rotations)
        self.draws = ClassDraws(offsets.diff(), split, ways=ways, shots=shots, queries=queries, seed=seed, names=names)
        self.images, self.rotations = _moved(images, device), rotations
        self.names = None if names is None else tuple(names)
        # A tensor: CUDA multiplies by the reciprocal of a Python number, which rounds differently from the CPU.
        self._white = torch.tensor(255.0, dtype=torch.float32, device=self.images.device)
        self._turned_pixels = _turned_pixels(images.shape[-1]).to(self.images.device) if rotations else None

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """Make one meta-batch, a pure function of the constructor's arguments, `index` and `tasks`.

        Args:
            index: the number of the meta-batch.
            tasks: the number of tasks.

        Returns:
            x (tasks, ways * shots, C, H, W) float32 in [0, 1] and y (tasks, ways * shots) int64 of the support set; the
            query set alike.
        """
        return self.batch(self.draw(index, tasks))

    def draw(self, index: int, tasks: int) -> Tensor:
        """Draw the random choices of one meta-batch, on the CPU.

        Args:
            index: the number of the meta-batch.
            tasks: the number of tasks.

        Returns:
            (tasks, ways, shots + queries) int64, the numbers of the images; with rotations the last dimension has one
            more entry, the quarter turns of the class.
        """
        return self.draws.draw(index, tasks, rotations=self.rotations)

    def batch(self, drawn: Tensor) -> TaskBatch:
        """The meta-batch of the result of `draw`, queued on the device's current stream."""
        if self.images.is_cuda:
            # A copy is asynchronous only from pinned memory.
            drawn = drawn.pin_memory().to(self.images.device, non_blocking=True)
        else:
            drawn = drawn.to(self.images.device)
        pixels = None if self._turned_pixels is None else self._turned_pixels[drawn[..., -1]]
        shots, queries = self.draws.shots, self.draws.queries
        support, query = drawn[..., : shots + queries].split([shots, queries], -1)
        return TaskBatch(self._examples(support, pixels), self._examples(query, pixels))

    def _examples(self, numbers: Tensor, pixels: Tensor | None) -> Examples:
        """The images with numbers (T, ways, each); pixels: (T, ways, H * W), the source of each rotated pixel."""
        tasks, ways, each = numbers.shape
        images = self.images.index_select(0, numbers.flatten())
        if pixels is not None:
            flat = images.view(tasks, ways, each, images.shape[1], -1)
            images = flat.gather(-1, pixels[:, :, None, None].expand_as(flat))
        x = images.to(torch.float32).div_(self._white).view(tasks, ways * each, *self.images.shape[1:])
        return Examples(x, task_labels(tasks, ways, each, x.device))


def _turned_pixels(side: int) -> Tensor:
    """The source of each pixel of a square image after 0, 1, 2 and 3 quarter turns, (4, side * side) int64."""
    pixels = torch.arange(side * side).view(side, side)
    return torch.stack([pixels.rot90(turns).flatten() for turns in range(4)])


def _moved(images: Tensor, device: torch.device | str) -> Tensor:
    try:
        return images.to(torch.device(device))
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"device: {device!r} is not available here ({error})") from None


def _check_images(images: Tensor, offsets: Tensor, rotations: bool) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (n_images, C, H, W), got {tuple(images.shape)}")
    if rotations and images.shape[-2] != images.shape[-1]:
        raise ValueError(f"rotations: expected square images, got {tuple(images.shape[-2:])}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets: expected int64, got {offsets.dtype}")
    if offsets.dim() != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(images):
        raise ValueError(f"offsets: expected (n_classes + 1,) from 0 to the {len(images)} images, got {offsets}")
    if bool((offsets.diff() < 1).any()):
        raise ValueError("offsets: expected at least one image in every class, got an empty class")
