"""The cost of data preparation in a meta-iteration, and how much of it prefetching threads hide.

    python bench/data_cost.py --out data_cost.json
    python bench/data_cost.py --device cuda --out data_cost.json

It times the sampling of one meta-batch, whole and in its halves (draw on the CPU, batch on the device); the
meta-iteration on a ready batch (loss and meta-gradients, MAML + linear KFO); and the iteration with a batch from the
stream, per number of workers. The images are random, in the number and size of Omniglot's training split.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch

from bench.meta_case import NETWORKS, QUERIES, SHOTS, WAYS, full_float32, make_case
from bench.meta_ours import Ours
from kfo_ext.bench.device_timing import finished
from kfo_ext.bench.result import facts_of, write_result
from kfo_ext.bench.timing import Timing, interleaved
from kfo_ext.tasks import ImageClasses, TaskBatch, batches

CLASSES, DRAWERS, SIDE = 1100, 20, 28
# Networks for Omniglot's images, which have one channel.
OMNIGLOT = [name for name, network in NETWORKS.items() if network.in_channels == 1]


def random_images(device: str, classes: int = CLASSES) -> ImageClasses:
    """Tasks over random images of Omniglot's size, with a rotation for each class of a task."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (classes * DRAWERS, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    offsets = torch.arange(classes + 1) * DRAWERS
    sizes = {"ways": WAYS, "shots": SHOTS, "queries": QUERIES}
    return ImageClasses(images, offsets, "train", rotations=True, device=device, **sizes)


def measure(family: ImageClasses, ours: Ours, tasks: int, workers: Sequence[int], repeats: int) -> dict[str, Timing]:
    """Times of the halves of sampling, of the iteration alone, and of the iteration with a batch from each stream."""
    drawn = family.draw(0, tasks)
    ours.batch = family.batch(drawn)
    streams = {count: batches(family, tasks, workers=count) for count in workers}

    def iteration_from(stream: Generator[TaskBatch, None, None]) -> Callable[[], object]:
        def iterate() -> object:
            ours.batch = next(stream)
            return ours.run()

        return iterate

    functions = {
        "draw": lambda: family.draw(0, tasks),
        "batch": lambda: family.batch(drawn),
        "sample": lambda: family.sample(0, tasks),
        "iteration": ours.run,
        **{f"stream, workers {count}": iteration_from(stream) for count, stream in streams.items()},
    }
    try:
        return interleaved(functions, repeats, sample=finished)
    finally:
        for stream in streams.values():
            stream.close()


def show(timings: dict[str, Timing]) -> None:
    """Print a line per time, and the time that each stream adds to the iteration."""
    print(f"{'':20} {'median':>10} {'20 %':>10} {'80 %':>10}")
    alone = timings["iteration"].median
    for name, timing in timings.items():
        cells = " ".join(f"{1e3 * seconds:7.3f} ms" for seconds in timing[:3])
        added = f"  iteration {1e3 * (timing.median - alone):+.3f} ms" if name.startswith("stream") else ""
        print(f"{name:20} {cells}{added}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=OMNIGLOT, default="omniglot_cnn2")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    full_float32()
    facts = facts_of(options)
    case = make_case(NETWORKS[options.network], "kfo", tasks=options.tasks, steps=options.steps, device=options.device)
    family = random_images(options.device, options.classes)
    timings = measure(family, Ours(case), options.tasks, options.workers, options.repeats)
    show(timings)
    if options.out:
        write_result(options.out, facts | {"timings": {name: timing._asdict() for name, timing in timings.items()}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
