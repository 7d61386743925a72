"""Meta-batches made on the device: the CPU's bits, without a wait, on the consumer's stream; training on them."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import pytest
import torch

from kfo_ext.tasks import Examples, Glyphs, ImageClasses, TaskBatch, TaskFamily, batches
from kfo_ext.trainer import Config, Trainer, evaluate
from kfo_ext.trainer.recipe import build_family, build_learner

pytestmark = pytest.mark.gpu

COUNT = 6
TINY = {"shots": 2, "queries": 2, "hidden": 4, "steps": 2, "meta_batch": 2, "validation_tasks": 4, "ways": 2}


def random_images(device: torch.device | str) -> ImageClasses:
    """Every level of brightness, three channels, classes of several sizes."""
    images = torch.randint(256, (90, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 12, 31, 46, 57, 70, 90])
    return ImageClasses(images, offsets, "train", ways=4, shots=3, queries=5, rotations=True, device=device)


FAMILIES = {"glyphs": lambda device: Glyphs("train", device=device), "random": random_images}
families = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def start_of_stream(family: TaskFamily, workers: int = 0) -> list[TaskBatch]:
    with closing(batches(family, 4, start=3, workers=workers)) as stream:
        return list(islice(stream, COUNT))


def assert_same(ours: list[TaskBatch], right: list[TaskBatch], device: torch.device) -> None:
    for a, b in zip(ours, right, strict=True):
        for X, expected in zip((*a.support, *a.query), (*b.support, *b.query), strict=True):
            assert X.device.type == device.type
            assert torch.equal(X.cpu(), expected)


@families
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_has_the_cpus_bits(device, make, workers):
    assert_same(start_of_stream(make(device), workers), start_of_stream(make("cpu")), device)


@families
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_never_waits_for_the_device(cuda, make, workers):
    family, right = make(cuda), start_of_stream(make("cpu"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = start_of_stream(family, workers)
        # What is on the device already is not moved.
        moved = [batch.to(cuda, torch.float32) for batch in ours]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(a.support.x is b.support.x and a.query.y is b.query.y for a, b in zip(ours, moved, strict=True))
    assert_same(ours, right, cuda)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_belong_to_the_consumers_stream(cuda, workers):
    family, right = random_images(cuda), start_of_stream(random_images("cpu"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    def copies() -> list[TaskBatch]:
        with torch.cuda.stream(side):
            parts = [[Examples(part.x.clone(), part.y.clone()) for part in b] for b in start_of_stream(family, workers)]
            side.synchronize()
        return [TaskBatch(*pair) for pair in parts]

    for _ in range(2):
        # Memory of both sides is there afterwards: to allocate it may wait for the whole device.
        copies()
    # Work on the default stream would come long after what the side stream reads.
    torch.cuda._sleep(10**9)
    busy = torch.cuda.Event()
    busy.record()
    ours = copies()
    waited = busy.query()
    assert not waited
    assert_same(ours, right, cuda)


def test_a_run_keeps_its_images_on_the_device(device, tmp_path):
    config = Config(dataset="glyphs", iterations=4, validation_every=2, workers=1, device=str(device), **TINY)
    trainer = Trainer.start(config, tmp_path / "run")
    for family in (trainer.tasks, trainer.validation_tasks):
        assert family.sample(0, 1).support.x.device.type == device.type
    assert trainer.fit().reason == "finished"
    # A checkpoint has the learner, the optimizer and the progress; nothing of the images.
    assert trainer.run.last.stat().st_size < 500_000
    assert Trainer.resume(tmp_path / "run", iterations=6).fit().progress.iteration == 6


def test_the_list_of_tasks_is_the_cpus(device):
    here, there = (Config(dataset="glyphs", device=name, **TINY) for name in ("cpu", str(device)))
    digests = {
        evaluate(build_learner(config), build_family(config, "test", seed=0), tasks=5, batch=3).digest
        for config in (here, there)
    }
    assert len(digests) == 1
