"""The peak memory of tensors during one call, above the level before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

# Below this level the profiler reports every start and stop on stderr; the level is read at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Measure the outputs and intermediates of one call in torch's allocator; a library's own buffers are not counted.

    On CUDA this is the allocator's own peak; on the CPU the largest running sum of the sizes that the profiler records.

    Args:
        call: the function to measure.
        device: its device.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = call()
        torch.cuda.synchronize()
        del outputs
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        outputs = call()
    del outputs
    sizes = sorted(
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(accumulate((size for _, size in sizes), initial=0))
