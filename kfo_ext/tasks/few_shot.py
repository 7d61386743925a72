"""A user's own data as few-shot tasks: a torch data set with labels, or a list of tensors, one per class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from kfo_ext.tasks.batch import Examples, TaskBatch
from kfo_ext.tasks.draws import ClassDraws, task_labels

# Modes with one byte per channel; Pillow's other modes need a conversion that only the user can choose.
PILLOW_MODES = ("L", "RGB")


class LabelledData(Protocol):
    """A data set for FewShot: it has a length, and items that start with (input, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class FewShot:
    """Tasks of `ways` distinct classes of the user's data, with `shots` + `queries` distinct examples of each.

    Inputs of uint8 become float32 in [0, 1]; Pillow images of mode L or RGB become (C, H, W) as well. Other tensors and
    arrays are not converted.

    Args:
        data: a tensor (n, ...) per class; or a map-style data set of (input, label) items, such as torchvision's. Its
            items are read when a task draws them, in the stream's workers: they must not be random.
        ways: classes per task.
        shots: support examples per class.
        queries: query examples per class.
        seed: the run's seed.
        split: train, validation or test; it only names the random stream and holds no class back. Pass each split data
            of its own classes.
        labels: labels of a data set's items; default its attribute `targets` or `labels`, else every item is read once.

    Raises:
        TypeError: the data or the labels are of another kind.
        ValueError: the data are empty or do not match, or the classes are too few or too small for the counts. Sampling
            raises ValueError naming an item that does not fit the others.
    """

    def __init__(
        self,
        data: Sequence[Tensor] | LabelledData,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        seed: int = 0,
        split: str = "train",
        labels: Sequence[Any] | Tensor | None = None,
    ) -> None:
        if isinstance(data, (list, tuple)):
            if labels is not None:
                raise ValueError("labels: expected None with a list of one tensor per class")
            sizes = _check_classes(data)
            self._examples = _of_tensor(torch.cat(list(data)))
            names = None
        else:
            groups = _indices_by_label(data, labels)
            sizes, names = [len(group) for group in groups.values()], [str(label) for label in groups]
            self._examples = _of_items(data, [index for group in groups.values() for index in group])
        self._draws = ClassDraws(
            torch.tensor(sizes),
            split,
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            names=names,
            source="the data set",
        )

    def sample(self, index: int, tasks: int) -> TaskBatch:
        """The meta-batch number `index`: x (tasks, ways * n, ...) and y (tasks, ways * n) int64, n shots or queries."""
        drawn = self._draws.draw(index, tasks)
        parts = drawn.split([self._draws.shots, self._draws.queries], -1)
        support, query = (
            Examples(x, task_labels(tasks, part.shape[1], part.shape[2], x.device))
            for part in parts
            for x in [self._examples(part.flatten(1))]
        )
        return TaskBatch(support, query)


def _check_classes(classes: Sequence[Any]) -> list[int]:
    """The sizes of the classes."""
    if not classes:
        raise ValueError("data: expected a tensor per class, got an empty list")
    first = classes[0]
    for number, examples in enumerate(classes):
        if not isinstance(examples, Tensor) or examples.dim() == 0:
            raise TypeError(
                f"data[{number}]: expected a tensor (n, ...) of the class's examples, got {type(examples).__name__}"
            )
        if (examples.shape[1:], examples.dtype, examples.device) != (first.shape[1:], first.dtype, first.device):
            raise ValueError(
                f"data[{number}]: expected examples like those of data[0], {tuple(first.shape[1:])} {first.dtype} on "
                f"{first.device}, got {tuple(examples.shape[1:])} {examples.dtype} on {examples.device}"
            )
    return [len(examples) for examples in classes]


def _indices_by_label(data: LabelledData, labels: Sequence[Any] | Tensor | None) -> dict[Any, list[int]]:
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            "data: expected a list of one tensor per class or a map-style data set with __len__ and __getitem__, "
            f"got {type(data).__name__}"
        )
    if labels is None:
        labels = getattr(data, "targets", None)
    if labels is None:
        labels = getattr(data, "labels", None)
    if labels is None:
        labels = [_item(data, index)[1] for index in range(len(data))]
    if isinstance(labels, Mapping) or not hasattr(labels, "__len__"):
        raise TypeError(f"labels: expected a list or tensor, one for each item, got {type(labels).__name__}")
    if len(labels) != len(data):
        raise ValueError(f"labels: expected one for each of the {len(data)} items, got {len(labels)}")
    groups: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        # A tensor or a number of NumPy; a one-hot label cannot be read.
        single = hasattr(label, "item") and prod(label.shape) == 1
        plain = label.item() if single else label
        if not isinstance(plain, (int, str)):
            raise TypeError(f"labels[{index}]: expected an integer or a string, got {plain!r}")
        groups.setdefault(plain, []).append(index)
    if not groups:
        raise ValueError("data: expected labelled items, got an empty data set")
    return dict(sorted(groups.items(), key=lambda group: (str(type(group[0])), group[0])))


def _item(data: LabelledData, index: int) -> Sequence[Any]:
    item = data[index]
    # Indexing a tensor would return a part of an input.
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise TypeError(
            f"data[{index}]: expected (input, label), got {type(item).__name__}; "
            "torch.utils.data.TensorDataset(inputs, labels) has such items"
        )
    return item


def _of_tensor(inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from numbers (T, n) to inputs (T, n, ...)."""

    def examples(numbers: Tensor) -> Tensor:
        drawn = inputs.index_select(0, numbers.flatten().to(inputs.device))
        return _as_float(drawn).view(*numbers.shape, *inputs.shape[1:])

    return examples


def _of_items(data: LabelledData, order: list[int]) -> Callable[[Tensor], Tensor]:
    """The same for the items of a data set; number i is the item order[i]."""

    def examples(numbers: Tensor) -> Tensor:
        indices = [order[number] for number in numbers.flatten().tolist()]
        inputs = [_input_of(_item(data, index)[0], index) for index in indices]
        for index, one in zip(indices, inputs):
            if (one.shape, one.dtype) != (inputs[0].shape, inputs[0].dtype):
                raise ValueError(
                    f"data[{index}]: expected an input like that of data[{indices[0]}], {tuple(inputs[0].shape)} "
                    f"{inputs[0].dtype}, got {tuple(one.shape)} {one.dtype}; give the data set a transform to one size"
                )
        return _as_float(torch.stack(inputs)).view(*numbers.shape, *inputs[0].shape)

    return examples


def _input_of(item: Any, index: int) -> Tensor:
    if isinstance(item, Tensor):
        return item
    if not hasattr(item, "getbands"):
        try:
            return torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"data[{index}]: expected a tensor, an array or a Pillow image ({error})") from None
    if item.mode not in PILLOW_MODES:
        raise ValueError(
            f"data[{index}]: expected an image of mode {' or '.join(PILLOW_MODES)}, got {item.mode}; give the data set "
            "a transform"
        )
    flat = torch.frombuffer(bytearray(item.tobytes()), dtype=torch.uint8)
    return flat.view(item.height, item.width, len(item.getbands())).permute(2, 0, 1)


def _as_float(inputs: Tensor) -> Tensor:
    return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs
