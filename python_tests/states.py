"""A run of a second, and the comparison of nested states to the bit."""

from __future__ import annotations

import torch

WAVES = {
    "dataset": "sinusoid",
    "inner_lr": 0.01,
    "hidden": 4,
    "steps": 1,
    "meta_batch": 2,
    "iterations": 4,
    "validation_every": 2,
    "validation_tasks": 2,
}


def assert_same(a, b, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert a == b, where
