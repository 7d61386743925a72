"""Peak memory of one meta-iteration, in a fresh process that does nothing else.

A process builds the contender, runs it once as a warm-up (which compiles, if it compiles), returns freed memory to the
system, and runs it once more. In bytes:

    first      peak of the warm-up over the level before it: compilation included
    peak       peak of the second run over that same level: the iteration's memory, and what the warm-up left behind,
               such as caches and compiled code
    working    peak of the second run over the level right before it

On the CPU these are resident sets as the system counts them; on a CUDA device allocations of torch's allocator,
or for JAX the buffers that XLA plans for one run (no `first`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.meta_case import Network, Runs, make_case

ROOT = Path(__file__).resolve().parent.parent
Memory = dict[str, int]
TIMEOUT = 1200


def peak_memory(network: Network, method: str, contender: str, device: str, **settings) -> Memory:
    """Measure one meta-iteration in float32, in a separate process.

    Args:
        network: sizes of the network.
        method: one of `METHODS`.
        contender: a name in `meta_contenders.CONTENDERS[method]`.
        device: cpu or cuda.
        settings: of `make_case`: tasks, steps, lr.

    Returns:
        Bytes by name.

    Raises:
        RuntimeError: that process failed; the message is its last line.
    """
    what = {"network": asdict(network), "method": method, "contender": contender, "device": device, **settings}
    return of_process("bench.meta_memory", what)


def of_process(module: str, what: Any) -> Memory:
    """Run a module in a separate process and parse the last line of its output.

    Args:
        module: what `python -m` runs, with `what` as JSON for its only argument.
        what: the argument.

    Returns:
        The parsed JSON.

    Raises:
        RuntimeError: that process failed; the message is its last line.
    """
    command = [sys.executable, "-m", module, json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(contender: Runs, device: torch.device) -> Memory:
    """Measure the bytes of the contender's first and second run, in this process."""
    gc.collect()
    if device.type != "cuda":
        first, peak, before, after = two_runs(contender.run, resident, reset_resident_peak, release)
    elif hasattr(contender, "planned_bytes"):
        planned = contender.planned_bytes()
        return {"peak": planned, "working": planned}
    else:
        first, peak, before, after = two_runs(contender.run, allocated, torch.cuda.reset_peak_memory_stats, gc.collect)
    return {"first": first - before, "peak": peak - before, "working": peak - after}


def two_runs(
    run: Callable[[], object],
    levels: Callable[[], tuple[int, int]],
    reset: Callable[[], object],
    release: Callable[[], object],
) -> tuple[int, int, int, int]:
    """Run twice, and measure levels and peaks.

    Args:
        run: the run.
        levels: () -> (level, peak since the last reset).
        reset: starts a new peak.
        release: returns freed memory to the system.

    Returns:
        (peak of the first run, peak of the second, level before the first, level before the second).
    """
    before, peaks = [], []
    for _ in range(2):
        release()
        reset()
        before.append(levels()[0])
        run()
        peaks.append(levels()[1])
    return (*peaks, *before)


def resident() -> tuple[int, int]:
    """This process's resident set and its peak since the last reset, as the system counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def reset_resident_peak() -> None:
    """Reset the system's peak of this process's resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Return the C library's freed memory to the system, so that every contender starts from the memory in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def allocated() -> tuple[int, int]:
    """Bytes that torch's CUDA allocator has allocated, and their peak since the last reset."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def main() -> None:
    """Measure the contender that the argument describes, and print its memory as JSON."""
    from bench.meta_contenders import CONTENDERS

    what = json.loads(sys.argv[1])
    network, method, contender = Network(**what.pop("network")), what.pop("method"), what.pop("contender")
    case = make_case(network, method, **what)
    print(json.dumps(measure(CONTENDERS[method][contender](case), case.batch.support.x.device)))


if __name__ == "__main__":
    main()
