"""The device under test, and the operators of each compiled backend on it.

KFO_TEST_DEVICE=cpu runs the same bodies on the CPU where they mean something, so that they are exercised without a GPU.
"""

from __future__ import annotations

import os

# cuBLAS, which computes the truth, is deterministic only with it: else torch warns, and warnings are errors here.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from kfo_ext.ops.transform.autograd import Family
from kfo_ext.testing import family_of


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where operands live."""
    wanted = torch.device(os.environ.get("KFO_TEST_DEVICE", "cuda"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
    return wanted


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The device, for what exists on a CUDA device alone: graphs, streams, its allocator."""
    if device.type != "cuda":
        pytest.skip("means something on a CUDA device alone")
    return device


@pytest.fixture(scope="session", params=("native", "triton"))
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The name of each compiled backend that runs on the device."""
    try:
        family_of(request.param, device)
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="session")
def family(backend: str, device: torch.device) -> Family:
    """The three operators of the backend."""
    return family_of(backend, device)
