"""The rounding of the network's convolutions: IEEE float32, TF32 or bfloat16, and torch's global flag for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kfo_ext.choices import PRECISIONS


@contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """Set the precision of torch's float32 convolutions on CUDA in the block, and restore it afterwards.

    torch's own default is TF32: 10 bits of the mantissa in the products. bf16 is set by autocast (`MAML(bf16=True)`);
    what autocast leaves in float32 is IEEE. Matrix products have their own flag, which torch leaves at IEEE.

    Args:
        precision: one of `PRECISIONS`.

    Yields:
        Nothing; the precision holds in the block.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
