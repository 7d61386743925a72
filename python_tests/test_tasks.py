"""Task families and their streams: purity, what a task holds, devices, workers, and messages for bad options."""

from __future__ import annotations

import inspect
import itertools
import math
import threading
from contextlib import closing
from dataclasses import fields

import pytest
import torch

from kfo_ext.tasks import (
    FAMILIES,
    Examples,
    Glyphs,
    ImageClasses,
    Sinusoid,
    TaskBatch,
    batches,
    generator_for,
    make_family,
)
from kfo_ext.tasks.synthetic import glyphs as glyphs_module

SIZES = (12, 10, 15, 11, 10, 13, 20, 10)


def numbered_classes(**options) -> ImageClasses:
    """Classes of SIZES images; the image with number i has the pixels i // 100 and i % 100."""
    numbers = torch.arange(sum(SIZES))
    images = torch.stack([numbers // 100, numbers % 100], -1).to(torch.uint8).view(-1, 1, 1, 2)
    return ImageClasses(images, offsets(SIZES), "train", **options)


def corner_classes(**options) -> ImageClasses:
    """60 classes of 10 images 2x2 with ink in the upper left corner alone."""
    images = torch.zeros(600, 1, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0] = 255
    return ImageClasses(images, torch.arange(61) * 10, "train", rotations=True, **options)


def noisy_classes(**options) -> ImageClasses:
    """Classes of SIZES images 5x5 with three channels, every level of brightness."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (sum(SIZES), 3, 5, 5), dtype=torch.uint8, generator=generator)
    return ImageClasses(images, offsets(SIZES), "train", **options)


def offsets(sizes) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)])


def image_numbers(examples: Examples) -> torch.Tensor:
    pixels = (examples.x * 255).round().long()
    return pixels[..., 0, 0, 0] * 100 + pixels[..., 0, 0, 1]


def tensors(batch: TaskBatch) -> list[torch.Tensor]:
    return [*batch.support, *batch.query]


def assert_same(a: TaskBatch, b: TaskBatch) -> None:
    assert all(map(torch.equal, tensors(a), tensors(b)))


def family_of(name: str, split: str = "train", **options):
    return numbered_classes(**options) if name == "images" else make_family(name, split, **options)


@pytest.fixture(params=["images", "glyphs", "linear", "logistic", "sinusoid"])
def name(request) -> str:
    return request.param


class Failing:
    """Raises at the meta-batch number 3."""

    def sample(self, index: int, tasks: int) -> TaskBatch:
        if index == 3:
            raise RuntimeError("no such meta-batch")
        return Sinusoid("train").sample(index, tasks)


class FailingHalf:
    """Raises at the meta-batch number 3 in one of the halves."""

    def __init__(self, half: str) -> None:
        self.half = half

    def sample(self, index: int, tasks: int) -> TaskBatch:
        return self.batch(self.draw(index, tasks))

    def draw(self, index: int, tasks: int) -> tuple[int, int]:
        self.fail_at(index, "draw")
        return index, tasks

    def batch(self, drawn: tuple[int, int]) -> TaskBatch:
        self.fail_at(drawn[0], "batch")
        return Sinusoid("train").sample(*drawn)

    def fail_at(self, index: int, half: str) -> None:
        if index == 3 and half == self.half:
            raise RuntimeError("no such meta-batch")


class Watched:
    """Records which half runs in which thread, with how many threads of torch."""

    def __init__(self) -> None:
        self.seen: dict[str, set[tuple[str, int]]] = {"sample": set(), "draw": set(), "batch": set()}

    def sample(self, index: int, tasks: int) -> TaskBatch:
        self.see("sample")
        return self.batch(self.draw(index, tasks))

    def draw(self, index: int, tasks: int) -> tuple[int, int]:
        self.see("draw")
        return index, tasks

    def batch(self, drawn: tuple[int, int]) -> TaskBatch:
        self.see("batch")
        return Sinusoid("train").sample(*drawn)

    def see(self, half: str) -> None:
        self.seen[half].add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))


class Whole:
    """A family of the sample of another one alone."""

    def __init__(self, family) -> None:
        self.family = family

    def sample(self, index: int, tasks: int) -> TaskBatch:
        return self.family.sample(index, tasks)


class Inverted(Glyphs):
    """Glyphs with the ink at 0, by a change of `sample` alone."""

    def sample(self, index: int, tasks: int) -> TaskBatch:
        return TaskBatch(*(Examples(1 - part.x, part.y) for part in super().sample(index, tasks)))


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kfo-tasks")]


def test_sample_is_pure(name):
    family = family_of(name, seed=3)
    first = family.sample(7, 4)
    family.sample(8, 2)
    torch.rand(5)
    assert_same(family.sample(7, 4), first)
    assert_same(family_of(name, seed=3).sample(7, 4), first)


def test_sample_does_not_depend_on_the_default_dtype(name):
    expected = family_of(name).sample(0, 2)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(family_of(name).sample(0, 2), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_seed_and_index_change_the_tasks(name):
    x = family_of(name).sample(0, 4).support.x
    assert not torch.equal(x, family_of(name).sample(1, 4).support.x)
    assert not torch.equal(x, family_of(name, seed=1).sample(0, 4).support.x)


@pytest.mark.parametrize("workers", [1, 3])
def test_stream_does_not_depend_on_workers(name, workers):
    family = family_of(name)
    stream = batches(family, 2, start=5, workers=workers)
    for index, batch in enumerate(itertools.islice(stream, 9), start=5):
        assert_same(batch, family.sample(index, 2))
    stream.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_subclass_may_change_sample_alone(workers):
    plain, inverted = Glyphs("train"), Inverted("train")
    with closing(batches(inverted, 2, workers=workers)) as stream:
        assert torch.equal(next(stream).query.x, 1 - plain.sample(0, 2).query.x)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_worker_that_cannot_start_is_an_error_and_leaves_no_thread(monkeypatch, two_threads):
    start = threading.Thread.start

    def start_two(thread):
        if thread.name == "kfo-tasks_2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(batches(Sinusoid("train"), 1, workers=3))
    monkeypatch.undo()
    assert not prefetch_threads() and threads_of_a_new_thread() == 2


def threads_of_a_new_thread() -> int:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_draw_with_one_thread_and_the_consumer_makes_the_batch(two_threads, workers):
    family = Watched()
    with closing(batches(family, 2, workers=workers)) as stream:
        for _ in range(5):
            next(stream)
            assert torch.get_num_threads() == threads_of_a_new_thread() == 2
    assert family.seen == {"sample": set(), "draw": {("kfo-tasks", 1)}, "batch": {("MainThread", 2)}}
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


def test_workers_sample_whole_a_family_without_halves(two_threads):
    family = Watched()
    with closing(batches(Whole(family), 2, workers=2)) as stream:
        for index in range(5):
            assert_same(next(stream), Sinusoid("train").sample(index, 2))
    assert set().union(*family.seen.values()) == {("kfo-tasks", 1)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "family", [Failing(), FailingHalf("draw"), FailingHalf("batch")], ids=["sample", "draw", "batch"]
)
def test_errors_of_a_family_reach_the_consumer(family, workers):
    stream = batches(family, 1, workers=workers)
    for _ in range(3):
        next(stream)
    with pytest.raises(RuntimeError, match="no such meta-batch"):
        next(stream)
    assert not prefetch_threads()


def test_closing_the_stream_ends_its_threads():
    stream = batches(Sinusoid("train"), 1, workers=2)
    next(stream)
    assert prefetch_threads()
    stream.close()
    assert not prefetch_threads()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": 0}, ValueError, "tasks: expected at least 1, got 0"),
        ({"tasks": 2.0}, TypeError, "tasks: expected an int, got 2.0"),
        ({"tasks": 1, "start": -1}, ValueError, "start: expected at least 0, got -1"),
        ({"tasks": 1, "workers": -2}, ValueError, "workers: expected at least 0, got -2"),
    ],
)
def test_batches_refuses(options, error, message):
    with pytest.raises(error, match=message):
        batches(Sinusoid("train"), **options)


def test_generator_streams_are_apart_and_fixed():
    assert generator_for(1, "train", 2).initial_seed() == generator_for(1, "train", 2).initial_seed()
    streams = [(0, "train", 0), (0, "train", 1), (0, "test", 0), (1, "train", 0), (0, "train0"), (0, "train", 0, 0)]
    assert len({generator_for(*stream).initial_seed() for stream in streams}) == len(streams)
    # the same number in every process and on every platform, or recorded runs cannot be repeated
    assert generator_for(0, "train", 0).initial_seed() == 8438227827334882923


def test_to_moves_floats_and_keeps_labels():
    batch = numbered_classes().sample(0, 2).to("cpu", torch.float64)
    assert [tensor.dtype for tensor in tensors(batch)] == [torch.float64, torch.int64] * 2
    assert [tensor.dtype for tensor in tensors(Sinusoid("train").sample(0, 2).to(dtype=torch.float64))] == [
        torch.float64
    ] * 4
    assert batch.to(dtype=torch.float32).support.x.dtype == torch.float32


def test_shapes_of_image_tasks():
    batch = make_family("glyphs", "validation", ways=4, shots=3, queries=2).sample(0, 6)
    assert [tuple(tensor.shape) for tensor in tensors(batch)] == [
        (6, 12, 1, 28, 28),
        (6, 12),
        (6, 8, 1, 28, 28),
        (6, 8),
    ]
    assert [tensor.dtype for tensor in tensors(batch)] == [torch.float32, torch.int64] * 2
    assert all(tensor.is_contiguous() for tensor in tensors(batch))


def test_classes_and_images_of_a_task_are_distinct():
    batch = numbered_classes(ways=5, shots=4, queries=6).sample(0, 200)
    support, query = image_numbers(batch.support), image_numbers(batch.query)
    drawn = torch.cat([support, query], 1)
    assert all(len(task.unique()) == 50 for task in drawn)
    classes = torch.bucketize(drawn, offsets(SIZES), right=True) - 1
    labels = torch.cat([batch.support.y, batch.query.y], 1)
    for task_classes, task_labels in zip(classes, labels, strict=True):
        pairs = set(zip(task_classes.tolist(), task_labels.tolist(), strict=True))
        assert len(pairs) == len({c for c, _ in pairs}) == len({y for _, y in pairs}) == 5


def test_labels_and_images_are_drawn_evenly():
    tasks = 4000
    batch = numbered_classes(ways=5, shots=1, queries=1).sample(0, tasks)
    numbers = image_numbers(batch.support)
    classes = torch.bucketize(numbers, offsets(SIZES), right=True) - 1
    counts = torch.stack([classes[:, label].bincount(minlength=len(SIZES)) for label in range(5)])
    expected = tasks / len(SIZES)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    per_image = numbers.flatten().bincount(minlength=sum(SIZES))
    rate = tasks * 5 / len(SIZES) / torch.tensor(SIZES).repeat_interleave(torch.tensor(SIZES))
    assert ((per_image - rate).abs() < 5 * rate.sqrt()).all()


def test_each_class_of_a_task_has_its_own_rotation():
    batch = corner_classes(ways=5, shots=2, queries=3).sample(0, 400)
    assert torch.equal(batch.support.x.sum((2, 3, 4)), torch.ones(400, 10))
    support, query = (part.x.flatten(2).argmax(-1) for part in batch)
    turns = support[:, ::2]
    assert torch.equal(support, turns.repeat_interleave(2, 1))
    assert torch.equal(query, turns.repeat_interleave(3, 1))
    # all five alike: 1 task in 256, not every one
    assert (turns == turns[:, :1]).all(1).sum() < 12
    assert (turns.flatten().bincount(minlength=4) - 500).abs().max() < 100


@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize(("shots", "queries"), [(1, 1), (3, 5)])
def test_a_batch_holds_the_images_that_were_drawn(shots, queries, rotations):
    family = noisy_classes(ways=4, shots=shots, queries=queries, rotations=rotations)
    drawn = family.draw(2, 30)
    assert drawn.shape == (30, 4, shots + queries + rotations) and drawn.device.type == "cpu"
    if rotations:
        assert drawn[..., -1].unique().tolist() == [0, 1, 2, 3]
    batch = family.sample(2, 30)
    assert_same(family.batch(drawn), batch)
    for task, choices in enumerate(drawn.tolist()):
        images = [
            [family.images[n].rot90(numbers[-1] if rotations else 0, (1, 2)) / 255 for n in numbers[: shots + queries]]
            for numbers in choices
        ]
        support, query = ([x for each in images for x in each[part]] for part in (slice(shots), slice(shots, None)))
        assert torch.equal(batch.support.x[task], torch.stack(support))
        assert torch.equal(batch.query.x[task], torch.stack(query))
        assert batch.support.y[task].tolist() == [label for label in range(4) for _ in range(shots)]
        assert batch.query.y[task].tolist() == [label for label in range(4) for _ in range(queries)]
    assert all(tensor.is_contiguous() for tensor in tensors(batch))


def test_draws_never_change():
    # else recorded runs cannot be repeated
    drawn = corner_classes(ways=3, shots=1, queries=2, seed=4).draw(6, 2)
    assert drawn.tolist() == [
        [[315, 312, 313, 2], [470, 475, 474, 3], [267, 264, 263, 0]],
        [[56, 53, 59, 3], [377, 378, 376, 1], [441, 445, 442, 2]],
    ]


def test_rotations_do_not_change_which_images_are_drawn():
    options = {"split": "test", "seed": 2}
    turned = make_family("glyphs", rotations=True, **options).sample(0, 3).support.x
    plain = make_family("glyphs", rotations=False, **options).sample(0, 3).support.x
    assert not torch.equal(turned, plain)
    candidates = torch.stack([plain.rot90(turns, (-2, -1)) for turns in range(4)])
    assert (candidates == turned).flatten(3).all(-1).any(0).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": 9}, ValueError, r"ways: expected 2 to 8 \(the train split has 8 classes\), got 9"),
        ({"ways": 1}, ValueError, "ways: expected 2 to 8"),
        ({"ways": "5"}, TypeError, "ways: expected an int, got '5'"),
        ({"shots": 0}, ValueError, "shots: expected at least 1, got 0"),
        ({"queries": -1}, ValueError, "queries: expected at least 1, got -1"),
        (
            {"shots": 6, "queries": 5},
            ValueError,
            r"shots \+ queries: expected at most 10 \(the examples of class 1, the smallest .*\), got 6 \+ 5 = 11",
        ),
        ({"names": ["a"]}, ValueError, "names: expected one for each of the 8 classes, got 1"),
        ({"rotations": True}, ValueError, r"rotations: expected square images, got \(1, 2\)"),
    ],
)
def test_image_classes_refuse_options(options, error, message):
    with pytest.raises(error, match=message):
        numbered_classes(**options)


@pytest.mark.parametrize(
    ("images", "bounds", "error", "message"),
    [
        (torch.zeros(4, 1, 2, 2), [0, 2, 4], TypeError, "images: expected uint8, got torch.float32"),
        (torch.zeros(4, 2, 2, dtype=torch.uint8), [0, 2, 4], ValueError, r"images: expected shape .*, got \(4, 2, 2\)"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [0, 2, 5], ValueError, "offsets: expected .* to the 4 images"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [0.0, 4.0], TypeError, "offsets: expected int64"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [0, 4, 4], ValueError, "offsets: .* an empty class"),
    ],
)
def test_image_classes_refuse_images(images, bounds, error, message):
    with pytest.raises(error, match=message):
        ImageClasses(images, torch.tensor(bounds), "train", ways=2, shots=1, queries=1)


def test_sample_refuses_a_negative_index(name):
    with pytest.raises(ValueError, match="index: expected at least 0, got -1"):
        family_of(name).sample(-1, 2)


@pytest.mark.parametrize("rotations", [False, True])
def test_a_batch_is_made_on_the_device_without_reading_a_value(rotations):
    # On meta there is no value to read: what waits for one on a device raises here.
    options = {"ways": 3, "shots": 2, "queries": 4, "rotations": rotations}
    here, there = noisy_classes(**options), noisy_classes(**options, device="meta")
    assert torch.equal(there.draw(1, 2), here.draw(1, 2))
    for tensor, right in zip(tensors(there.sample(1, 2)), tensors(here.sample(1, 2)), strict=True):
        assert tensor.device.type == "meta"
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (right.shape, right.dtype, right.stride())


def test_families_of_images_share_them_on_the_cpu_and_take_a_device():
    assert Glyphs("train").images.data_ptr() == Glyphs("train", seed=1).images.data_ptr()
    assert make_family("glyphs", "test", device="meta").sample(0, 2).support.x.device.type == "meta"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 2.5, None])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=rf"device: {device!r} is not available here \("):
        noisy_classes(device=device)


def test_glyphs_are_ink_on_zero():
    x = make_family("glyphs", "train").sample(0, 64).support.x
    assert x.min() == 0 and x.max() == 1
    assert (x.amax((2, 3, 4)) > 0.9).all()
    # the border is background, and a glyph is a thin line
    assert x[..., 0, :].mean() < 0.01
    assert 0.03 < x.mean() < 0.15


def test_glyphs_are_the_same_in_every_process():
    before = glyphs_module._universe()
    glyphs_module._universe.cache_clear()
    after = glyphs_module._universe()
    assert all(torch.equal(before[split], after[split]) for split in before)
    assert {split: len(images) for split, images in after.items()} == {"train": 8000, "validation": 1200, "test": 3200}


def test_glyphs_of_the_splits_are_disjoint():
    images = torch.cat(list(glyphs_module._universe().values())).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("omniglott", {}, "dataset: expected one of cifar_fs, .*, omniglot, .*sinusoid, got 'omniglott'"),
        ("omniglot", {}, "root: expected the folder or archive that holds the data set, got none"),
        ("glyphs", {"split": "valid"}, "split: expected one of train, validation, test, got 'valid'"),
        ("sinusoid", {"split": "valid"}, "split: expected one of train, validation, test, got 'valid'"),
        ("omniglot", {"split": "valid", "root": "."}, "split: expected one of train, validation, test"),
        ("glyphs", {"ways": 401}, r"ways: expected 2 to 400 \(the train split has 400 classes\)"),
        ("glyphs", {"shots": 20}, r"shots \+ queries: expected at most 20"),
        ("sinusoid", {"shots": 0}, "shots: expected at least 1, got 0"),
    ],
)
def test_make_family_refuses(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        make_family(dataset, **{"split": "train", **options})


def test_an_option_of_another_family_is_refused():
    with pytest.raises(TypeError, match="ways: dataset 'sinusoid' has no such option, but queries, shots"):
        make_family("sinusoid", "train", ways=5)


@pytest.mark.parametrize("name", FAMILIES)
def test_options_are_the_arguments_of_the_constructor(name):
    row = FAMILIES[name]
    arguments = inspect.signature(row.make).parameters
    assert ("device" in arguments) == row.on_device
    assert set(arguments) - {"split", "seed", "device"} == {item.name for item in fields(row.options)}
    for item in fields(row.options):
        assert item.name == "root" or item.default == arguments[item.name].default
        assert item.metadata["help"] and "\n" not in item.metadata["help"]


@pytest.mark.parametrize("name", ["glyphs", "linear", "logistic", "sinusoid"])
def test_options_say_what_a_network_needs(name):
    options = FAMILIES[name].options()
    batch = make_family(name, "train").sample(0, 2)
    assert batch.query.x.shape[2:] == options.input_shape
    if options.targets == "classes":
        assert batch.query.y.dtype == torch.int64 and batch.query.y.max() == options.outputs - 1
    else:
        assert batch.query.y.dtype == torch.float32 and batch.query.y.shape[2:] == (options.outputs,)
    assert options.targets != "binary" or batch.query.y.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("glyphs", {"ways": 1}, ValueError, "ways: expected at least 2, got 1"),
        ("glyphs", {"ways": True}, TypeError, "ways: expected int, got True"),
        ("glyphs", {"rotations": 1}, TypeError, "rotations: expected bool, got 1"),
        ("linear", {"noise": -0.5}, ValueError, "noise: expected a finite number of at least 0, got -0.5"),
        ("linear", {"noise": math.inf}, ValueError, "noise: expected a finite number"),
        ("linear", {"noise": "1"}, TypeError, "noise: expected float, got '1'"),
        ("logistic", {"labels": "hard"}, ValueError, "labels: expected one of separable, bernoulli, got 'hard'"),
        ("logistic", {"dimension": 0}, ValueError, "dimension: expected at least 1, got 0"),
        ("folders", {"root": "a\0b"}, ValueError, "root: expected text without null characters"),
        ("folders", {"root": "a", "colour": "hsv"}, ValueError, "colour: expected one of gray, rgb, got 'hsv'"),
    ],
)
def test_options_refuse(name, options, error, message):
    with pytest.raises(error, match=message):
        FAMILIES[name].options(**options)
