"""How the network's convolutions round: IEEE float32, TF32 or bfloat16, and torch's global flag for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kfo_ext.choices import PRECISIONS


@contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """Sets what torch's float32 convolutions on CUDA may round to, and afterwards sets it back.

    torch's own default is TF32: 10 bits of the mantissa in the products. bf16 is autocast's doing (`MAML(bf16=True)`);
    what autocast leaves alone is IEEE. Matrix products have a flag of their own, which torch leaves at IEEE.

    precision: one of `PRECISIONS`.
    Raises: ValueError for another one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
