"""Few-shot classification tasks over images that lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kfo_ext.tasks.batch import Examples, TaskBatch, check_count, check_split, generator_for


class ImageClasses:
    """Tasks of `ways` distinct classes, with `shots` + `queries` distinct images of each.

    Which class gets which label is random; a task's examples lie in label order.

    images: (n_images, C, H, W) uint8, the images of a class one after the other
    offsets: (n_classes + 1,) int64, class c has the images offsets[c] to offsets[c + 1]
    split: the name of this set of classes, part of the random stream's name
    ways, shots, queries: classes per task, support and query images per class
    seed: the run's seed
    rotations: turn each class of each task by its own 0, 90, 180 or 270 degrees

    Raises: TypeError or ValueError if the images, the offsets or the counts do not fit each other.
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
    ) -> None:
        check_split(split)
        _check_images(images, offsets, rotations)
        sizes = offsets.diff()
        smallest = int(sizes.min())
        check_count("ways", ways, 2, len(sizes), f"the {split} split has {len(sizes)} classes")
        check_count("shots", shots, 1)
        check_count("queries", queries, 1)
        if shots + queries > smallest:
            raise ValueError(
                f"shots + queries: expected at most {smallest} (the smallest class of the {split} split), "
                f"got {shots} + {queries} = {shots + queries}"
            )
        self.images, self.offsets, self.sizes = images, offsets[:-1], sizes
        self.split, self.seed, self.rotations = split, seed, rotations
        self.ways, self.shots, self.queries = ways, shots, queries

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`: a pure function of the constructor's arguments, `index` and `tasks`.

        out: x (tasks, ways * shots, C, H, W) float32 in [0, 1] and y (tasks, ways * shots) int64 of the support set;
        the query set alike
        """
        check_count("index", index, 0)
        check_count("tasks", tasks, 1)
        generator = generator_for(self.seed, self.split, index)
        classes = torch.rand(tasks, len(self.sizes), generator=generator, dtype=torch.float32).topk(self.ways).indices
        images = self.images[self._draw_images(classes, generator)]  # (tasks, ways, shots + queries, C, H, W)
        if self.rotations:
            _rotate(images, torch.randint(4, classes.shape, generator=generator))
        return TaskBatch(self._examples(images[:, :, : self.shots]), self._examples(images[:, :, self.shots :]))

    def _draw_images(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        positions = torch.arange(int(self.sizes.max()))
        keys = torch.rand(*classes.shape, len(positions), generator=generator, dtype=torch.float32)
        keys.masked_fill_(positions >= self.sizes[classes].unsqueeze(-1), -1.0)
        return self.offsets[classes].unsqueeze(-1) + keys.topk(self.shots + self.queries).indices

    def _examples(self, images: Tensor) -> Examples:
        tasks, ways, each = images.shape[:3]
        labels = torch.arange(ways).repeat_interleave(each).repeat(tasks, 1)
        return Examples(images.flatten(1, 2).to(torch.float32).div_(255), labels)


def _rotate(images: Tensor, quarter_turns: Tensor) -> None:
    """Turn images (T, ways, n, C, H, W) in place, each class by its own entry of quarter_turns (T, ways)."""
    for turns in (1, 2, 3):
        turned = quarter_turns == turns
        images[turned] = images[turned].rot90(turns, (-2, -1))


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
