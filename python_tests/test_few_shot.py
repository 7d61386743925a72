"""A user's own data as tasks: a torch data set, a list of tensors per class, single tasks joined."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from kfo_ext import MAML
from kfo_ext.tasks import FewShot, TaskBatch, batches

SIZES = (6, 9, 5, 7)
LABELS = torch.tensor([label for label, size in enumerate(SIZES) for _ in range(size)])
# Item i has the label LABELS[ORDER[i]]: the classes lie mixed.
ORDER = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1))


class Numbered(Dataset):
    """Items (number, label) in mixed order; counts what is read."""

    def __init__(self, **attributes) -> None:
        self.read = []
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int):
        self.read.append(index)
        return torch.tensor([float(index)]), int(LABELS[ORDER[index]])


def check(batch: TaskBatch, *, shots: int, queries: int, ways: int = 3) -> None:
    """That a task of numbered items holds distinct classes and distinct items of them, in label order."""
    assert batch.support.y.tolist() == [[way for way in range(ways) for _ in range(shots)]] * len(batch.support.y)
    assert batch.query.y.tolist() == [[way for way in range(ways) for _ in range(queries)]] * len(batch.query.y)
    numbers = torch.cat([batch.support.x, batch.query.x], 1).squeeze(-1).long()
    labels = LABELS[ORDER[numbers]]
    local = torch.cat([batch.support.y, batch.query.y], 1)
    for task in range(len(numbers)):
        assert len(numbers[task].unique()) == ways * (shots + queries)
        pairs = set(zip(labels[task].tolist(), local[task].tolist()))
        assert len(pairs) == len({label for label, _ in pairs}) == ways


@pytest.mark.parametrize("attribute", ["targets", "labels", "argument", "none"])
def test_a_data_set_with_labels(attribute):
    labels = LABELS[ORDER]
    data = Numbered(**({attribute: labels.tolist()} if attribute in ("targets", "labels") else {}))
    family = FewShot(data, ways=3, shots=2, queries=3, labels=labels if attribute == "argument" else None)
    # Labels at hand spare a pass over the data.
    assert len(data.read) == (len(LABELS) if attribute == "none" else 0)
    for index in range(20):
        check(family.sample(index, 4), shots=2, queries=3)
    assert torch.equal(
        family.sample(3, 4).query.x, FewShot(Numbered(targets=labels), ways=3, shots=2, queries=3).sample(3, 4).query.x
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_streams_do_not_depend_on_workers(workers):
    family = FewShot(Numbered(), ways=2, shots=1, queries=2, seed=4)
    stream = batches(family, 3, start=2, workers=workers)
    for index, batch in enumerate(itertools.islice(stream, 6), start=2):
        assert torch.equal(batch.query.x, family.sample(index, 3).query.x)
    stream.close()
    assert not torch.equal(family.sample(0, 3).query.x, family.sample(1, 3).query.x)
    other = FewShot(Numbered(), ways=2, shots=1, queries=2, seed=4, split="test")
    assert not torch.equal(family.sample(0, 3).query.x, other.sample(0, 3).query.x)


def test_every_class_and_item_is_drawn():
    family = FewShot(Numbered(), ways=3, shots=2, queries=3)
    drawn = torch.cat([family.sample(index, 50).query.x.flatten() for index in range(4)]).long()
    assert len(drawn.unique()) == len(LABELS)


def test_a_list_of_tensors_per_class():
    classes = [torch.arange(size, dtype=torch.float64).view(-1, 1) + 100 * label for label, size in enumerate(SIZES)]
    batch = FewShot(classes, ways=3, shots=2, queries=3).sample(0, 50)
    assert batch.support.x.shape == (50, 6, 1) and batch.support.x.dtype == torch.float64
    labels = (batch.query.x.squeeze(-1) // 100).view(50, 3, 3)
    assert (labels == labels[..., :1]).all()
    both = torch.cat([batch.support.x.view(50, 3, 2), batch.query.x.view(50, 3, 3)], 2)
    assert all(len(way.unique()) == 5 for task in both for way in task)


def test_bytes_become_numbers_from_0_to_1():
    images = [torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8) for _ in range(3)]
    batch = FewShot(images, ways=2, shots=2, queries=3).sample(0, 1)
    assert batch.support.x.dtype == torch.float32 and batch.support.x.shape == (1, 4, 3, 4, 4)
    levels = {tuple(image.flatten().tolist()) for image in torch.cat(images)}
    assert all(tuple((x * 255).round().int().flatten().tolist()) in levels for x in batch.support.x[0])


class Pictures(Dataset):
    """As torchvision's data sets are without a transform: Pillow images."""

    def __init__(self, mode: str) -> None:
        self.mode, self.targets = mode, [index % 2 for index in range(8)]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        image = Image.new("RGB", (5, 4), (index, 100, 255))
        image.putpixel((3, 1), (0, 0, 0))
        return image.convert(self.mode), self.targets[index]


def test_pillow_images_become_tensors():
    batch = FewShot(Pictures("RGB"), ways=2, shots=1, queries=1).sample(0, 1)
    image = batch.support.x[0, 0]
    assert image.shape == (3, 4, 5) and image[2, 0, 0] == 1 and image[1, 0, 0] == 100 / 255
    assert image[:, 1, 3].tolist() == [0, 0, 0]
    assert FewShot(Pictures("L"), ways=2, shots=1, queries=1).sample(0, 1).query.x.shape == (1, 2, 1, 4, 5)
    with pytest.raises(
        ValueError, match=r"data\[\d\]: expected an image of mode L or RGB, got CMYK; give the data set"
    ):
        FewShot(Pictures("CMYK"), ways=2, shots=1, queries=1).sample(0, 1)


def test_subsets_tensor_data_sets_and_names():
    data = TensorDataset(torch.arange(24.0).view(-1, 1), LABELS[:24])
    assert FewShot(Subset(data, range(12)), ways=2, shots=2, queries=3).sample(0, 2).query.x.max() < 12
    words = [("item", "cat" if index % 2 else "dog") for index in range(6)]

    class Words(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return [float(index)], words[index][1]

    batch = FewShot(Words(), ways=2, shots=1, queries=2).sample(0, 1)
    assert batch.query.x.shape == (1, 4, 1)
    with pytest.raises(ValueError, match=r"at most 3 \(the examples of class 'cat', .*\), got 2 \+ 2"):
        FewShot(Words(), ways=2, shots=2, queries=2)


class Ragged(Numbered):
    def __getitem__(self, index: int):
        number, label = super().__getitem__(index)
        return number.repeat(1 + index % 2), label


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "data: expected a tensor per class, got an empty list"),
        ([[1, 2]], {}, TypeError, r"data\[0\]: expected a tensor .*, got list"),
        (
            [torch.zeros(9, 2), torch.zeros(9, 3)],
            {},
            ValueError,
            r"data\[1\]: expected examples like .*\(2,\).* got \(3,\)",
        ),
        ([torch.zeros(9, 2), torch.zeros(9, 2).double()], {}, ValueError, r"data\[1\]: .* got \(2,\) torch.float64"),
        ([torch.zeros(9, 2)] * 3, {"labels": [0, 1]}, ValueError, "labels: expected None with a list"),
        ([torch.zeros(9, 2)] * 3, {}, ValueError, r"ways: expected 2 to 3 \(the data set has 3 classes\), got 5"),
        ([torch.zeros(9, 2), torch.zeros(2, 2)], {"ways": 2}, ValueError, "at most 2 .*class 1, the smallest"),
        (Endless(), {}, TypeError, "data: expected a list of one tensor per class or a map-style data set"),
        (5, {}, TypeError, "data: expected a list of one tensor per class or a map-style data set"),
        (Numbered(), {"labels": [0, 1]}, ValueError, "labels: expected one for each of the 27 items, got 2"),
        (Numbered(targets=[0.5] * 27), {}, TypeError, r"labels\[0\]: expected an integer or a string, got 0.5"),
        (Numbered(targets=torch.eye(27)), {}, TypeError, r"labels\[0\]: expected an integer or a string, got tensor"),
        (
            Numbered(),
            {"labels": dict.fromkeys(range(27), 1)},
            TypeError,
            "labels: expected a list or tensor, .* dict",
        ),
        (Numbered(), {"labels": iter(LABELS)}, TypeError, "labels: expected a list or tensor, one for each item, got"),
        (TensorDataset(torch.zeros(5, 1)), {}, TypeError, r"data\[0\]: expected \(input, label\), got tuple"),
    ],
)
def test_data_that_is_refused(data, options, error, message):
    with pytest.raises(error, match=message):
        FewShot(data, **options)


class Named(Numbered):
    def __getitem__(self, index: int):
        return dict(zip(("input", "label"), super().__getitem__(index)))


@pytest.mark.parametrize("data", [torch.rand(27, 3, 2), torch.rand(27, 3, 2).numpy(), Named()], ids=type)
def test_items_without_labels_are_not_taken_apart(data):
    """The first entry of an input is not an input."""
    family = FewShot(data, ways=2, shots=1, queries=2, labels=LABELS)
    with pytest.raises(TypeError, match=r"data\[\d+\]: expected \(input, label\), got .*TensorDataset\(inputs"):
        family.sample(0, 1)


def test_items_of_several_shapes_are_named():
    family = FewShot(Ragged(), ways=2, shots=1, queries=2)
    with pytest.raises(
        ValueError, match=r"data\[\d+\]: expected an input like that of data\[\d+\], .*; give the data set"
    ):
        for index in range(10):
            family.sample(index, 2)


def pairs(tasks: int, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(n, 3), torch.randint(2, (n,))) for _ in range(tasks)]


def test_tasks_given_one_by_one_are_one_batch():
    support, query = pairs(4, 5), pairs(4, 7)
    batch = TaskBatch.of(support, query)
    assert batch.support.x.shape == (4, 5, 3) and batch.query.y.shape == (4, 7)
    for task in range(4):
        assert torch.equal(batch.support.x[task], support[task][0]) and torch.equal(batch.query.y[task], query[task][1])


def test_whole_tasks_are_parted_by_shots():
    tasks = []
    for _ in range(3):
        y = torch.tensor([0, 0, 0, 1, 1, 1, 1])[torch.randperm(7)]
        tasks.append((torch.randn(7, 2), y))
    batch = TaskBatch.of(tasks, shots=2)
    assert batch.support.x.shape == (3, 4, 2) and batch.query.x.shape == (3, 3, 2)
    for task, (x, y) in enumerate(tasks):
        seen, support, query = [0, 0], [], []
        for one, label in zip(x, y.tolist()):
            (support if seen[label] < 2 else query).append((one, label))
            seen[label] += 1
        for part, expected in ((batch.support, support), (batch.query, query)):
            assert torch.equal(part.x[task], torch.stack([one for one, _ in expected]))
            assert part.y[task].tolist() == [label for _, label in expected]
    x, y = torch.randn(2, 9, 1), torch.randn(2, 9, 1)
    points = TaskBatch.of(list(zip(x, y)), shots=4)
    assert torch.equal(points.support.x, x[:, :4]) and torch.equal(points.query.y, y[:, 4:])


@pytest.mark.parametrize(
    ("given", "query", "error", "message"),
    [
        ([], [], ValueError, "query: expected a pair .* at least one task, got 0 for 0"),
        (pairs(2, 3), pairs(1, 3), ValueError, "query: expected a pair .* got 1 for 2"),
        (pairs(2, 3), [*pairs(1, 3), (1, 2)], TypeError, r"query\[1\]: expected a pair \(x, y\) of tensors, got tuple"),
        ([*pairs(1, 3), torch.zeros(2, 3)], pairs(2, 3), TypeError, r"pairs\[1\]: expected a pair .*, got Tensor"),
        ([*pairs(1, 3), *pairs(1, 4)], pairs(2, 3), ValueError, r"pairs\[1\]: expected x like the first task's"),
        ([(torch.zeros(3, 2), torch.zeros(2))], pairs(1, 3), ValueError, r"pairs\[0\]: expected a label for"),
        (pairs(1, 3), None, ValueError, "query, shots: expected one of them"),
    ],
)
def test_tasks_that_do_not_fit_are_named(given, query, error, message):
    with pytest.raises(error, match=message):
        TaskBatch.of(given, query)


@pytest.mark.parametrize(
    ("task", "shots", "error", "message"),
    [
        (
            (torch.zeros(4, 1), torch.tensor([0, 0, 1, 1])),
            2,
            ValueError,
            r"pairs\[1\]: expected more than shots = 2 .* 2 of",
        ),
        ((torch.zeros(5, 1), torch.tensor([0, 0, 1, 1, 1])), 1, ValueError, r"query\[1\]: expected x like the first"),
        ((torch.zeros(6, 1), torch.tensor([0, 0, 0, 1, 1, 1])), 0, ValueError, "shots: expected at least 1, got 0"),
    ],
)
def test_tasks_that_cannot_be_parted_are_named(task, shots, error, message):
    first = (torch.zeros(6, 1), torch.tensor([0, 0, 0, 1, 1, 1]))
    with pytest.raises(error, match=message):
        TaskBatch.of([first, task], shots=shots)


def test_a_learner_takes_them():
    model = torch.nn.Linear(3, 2)
    learner = MAML(model, lr=0.1, steps=1, loss=F.cross_entropy)
    classes = [torch.randn(8, 3) + 3 * label for label in range(4)]
    for batch in (TaskBatch.of(pairs(4, 5), pairs(4, 7)), FewShot(classes, ways=2, shots=2, queries=3).sample(0, 4)):
        assert learner(batch).loss.isfinite()
