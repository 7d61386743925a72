"""Random draws of a task's classes and examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfo_ext.tasks.batch import generator_for
from kfo_ext.tasks.checks import check_count, check_split


class ClassDraws:
    """Random draws of `ways` distinct classes and of `shots` + `queries` distinct examples of each, on the CPU.

    Args:
        sizes: (n_classes,) int64, examples of each class; examples are numbered class after class.
        split: part of the random stream's name.
        ways: classes per task.
        shots: support examples per class.
        queries: query examples per class.
        seed: the run's seed.
        names: names of the classes, for messages.
        source: the name of the set of classes, for messages; by default the split.

    Raises:
        TypeError: a count is no integer.
        ValueError: there are too few classes, or too few examples in the smallest class, which is named.
    """

    def __init__(
        self,
        sizes: Tensor,
        split: str,
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> None:
        check_split(split)
        source = f"the {split} split" if source is None else source
        if names is not None and len(names) != len(sizes):
            raise ValueError(f"names: expected one for each of the {len(sizes)} classes, got {len(names)}")
        check_count("ways", ways, 2, len(sizes), f"{source} has {len(sizes)} classes")
        check_count("shots", shots, 1)
        check_count("queries", queries, 1)
        smallest, at = sizes.min(0)
        if shots + queries > smallest:
            label = f"class {int(at)}" if names is None else f"class {names[int(at)]!r}"
            raise ValueError(
                f"shots + queries: expected at most {smallest} (the examples of {label}, the smallest of "
                f"{source}), got {shots} + {queries} = {shots + queries}"
            )
        self.split, self.seed = split, seed
        self.sizes, self.first = sizes, sizes.cumsum(0) - sizes
        self.ways, self.shots, self.queries = ways, shots, queries

    def draw(self, index: int, tasks: int, *, rotations: bool = False) -> Tensor:
        """Draw the random choices of one meta-batch.

        Args:
            index: the number of the meta-batch.
            tasks: the number of tasks.
            rotations: whether to draw a rotation for each class.

        Returns:
            (tasks, ways, shots + queries) int64, the numbers of the examples; with rotations the last dimension has one
            more entry, the quarter turns of the class.
        """
        check_count("index", index, 0)
        check_count("tasks", tasks, 1)
        generator = generator_for(self.seed, self.split, index)
        classes = torch.rand(tasks, len(self.sizes), generator=generator, dtype=torch.float32).topk(self.ways).indices
        drawn = self._draw_examples(classes, generator)
        if not rotations:
            return drawn
        return torch.cat([drawn, torch.randint(4, (*classes.shape, 1), generator=generator)], -1)

    def _draw_examples(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        positions = torch.arange(int(self.sizes.max()))
        keys = torch.rand(*classes.shape, len(positions), generator=generator, dtype=torch.float32)
        keys.masked_fill_(positions >= self.sizes[classes].unsqueeze(-1), -1.0)
        return self.first[classes].unsqueeze(-1) + keys.topk(self.shots + self.queries).indices


def task_labels(tasks: int, ways: int, each: int, device: torch.device) -> Tensor:
    """The labels of `each` examples per class in label order, (tasks, ways * each) int64."""
    return torch.arange(ways, device=device).view(1, ways, 1).repeat(tasks, 1, each).flatten(1)
