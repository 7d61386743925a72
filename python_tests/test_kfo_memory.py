"""What a KFO takes in memory: its factors and nothing else, and a named error where they cannot fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfo_ext import KFO, Problems
from kfo_ext.updates import memory


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations return, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # Held, so that no later storage has the same address.
                self.kept[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage()
        return out

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())


@pytest.mark.parametrize(
    "options", [{}, {"psd": False}, {"bias": True}, {"hidden_layers": 1}, {"max_factor": 200}], ids=str
)
def test_construction_allocates_the_factors_alone(options):
    weight = nn.Embedding(300, 5).weight
    with Allocations() as allocated:
        kfo = KFO([("weight", weight)], **options)
    held = sum(tensor.nbytes for tensor in kfo.parameters())
    layers = options.get("hidden_layers", 0) + 1
    assert held >= layers * (("max_factor" not in options) * 300**2 + 5**2) * 4
    assert not list(kfo.buffers())
    assert allocated.bytes <= held + weight.nbytes + 1000


def big(*shape: int) -> torch.Tensor:
    """A tensor of that shape in four bytes."""
    return torch.zeros(()).expand(shape)


HUGE = {
    "embedding": ((10**7, 16), (10**7, 16), "363.8 TiB"),
    "linear": ((10, 2 * 10**7), (10, 2 * 10**7), "1455.2 TiB"),
    "conv": ((1, 10**7, 1, 1), (10**7, 1), "363.8 TiB"),
    "kernel": ((1, 1, 4000, 4000), (1, 16 * 10**6), "931.3 TiB"),
    "bias": ((10**7,), (10**7, 1), "363.8 TiB"),
}


@pytest.mark.parametrize("asks", [True, False], ids=["limit", "allocator"])
@pytest.mark.parametrize(("shape", "sides", "size"), HUGE.values(), ids=HUGE)
def test_factors_beyond_the_memory_are_named(shape, sides, size, asks, monkeypatch):
    if not asks:
        monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    p, q = sides
    with pytest.raises(ValueError, match="parameter 'words'") as caught:
        KFO([("small", big(3, 2)), ("words", big(*shape)), ("head", big(5))])
    message = str(caught.value)
    for part in (
        f"shape {shape}",
        f"R ({p}, {p}) and L ({q}, {q})",
        size,
        f"max_factor, less than {max(p, q)}",
        "only=[...]",
    ):
        assert part in message
    assert "cpu" in message


def test_the_limit_is_a_quarter_of_what_the_device_has_left(monkeypatch):
    """30,000 words need 3.4 GiB in each layer; what fits to the byte is made."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8 << 30)
    with pytest.raises(ValueError, match=r"\(30000, 16\).*need 3\.4 GiB.*cpu has 8\.0 GiB left, .*a quarter"):
        KFO([("weight", big(30000, 16))])
    with pytest.raises(ValueError, match=r"with the other parameters' and 3 layers 2\.2 GiB"):
        KFO([("weight", big(14000, 16)), ("bias", big(14))], hidden_layers=2)
    needed = 3 * (2 * 20**2 + 5**2 + 1 + 20 * 5 + 20) * 4
    monkeypatch.setattr(memory, "available_bytes", lambda device: 4 * needed)
    KFO([big(20, 5), big(20)], hidden_layers=2)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 4 * needed - 1)
    with pytest.raises(ValueError, match="parameter '0' of shape"):
        KFO([big(20, 5), big(20)], hidden_layers=2)
    KFO([big(20, 5), big(20)], hidden_layers=1)


def test_what_gets_no_factors_takes_no_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    words, head = ("words", big(10**7, 16)), ("head", big(20, 5))
    with pytest.raises(ValueError, match=r"'words' .*R \(10000000, 10000000\) and L \(16, 16\)"):
        KFO([words, head])
    for options in ({"only": ["head"]}, {"max_factor": 20}):
        KFO([words, head], **options)
    with pytest.raises(ValueError, match=r"'words' .*its factors L \(4096, 4096\) need 64\.0 MiB.*less than 4096"):
        KFO([("words", big(10**7, 4096)), head], max_factor=5000)


def test_available_bytes():
    assert 0 < memory.available_bytes(torch.device("cpu")) < 1 << 50
    assert memory.available_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([(1, 2**32, 1)], r"shapes\[0\].*2\*\*63.*that of R has"),
        ([(1, 1, 2**40)], r"shapes\[0\].*2\*\*63.*that of L has"),
        ([(2**40, 2**20, 2**20)], r"shapes\[0\].*2\*\*63.*that of G has"),
        ([(1, 2**31, 1), (1, 2, 2), (1, 2**31, 1)], r"shapes\[2\].*2\*\*63.*that of R has"),
        ([(1, 3, 3), (1, 2**32, 2**32)], r"shapes\[1\].*2\*\*63.*that of R has"),
        ([(2**70, 1, 1)], r"shapes\[0\].*2\*\*63.*that of G has"),
    ],
    ids=str,
)
def test_rows_beyond_64_bit_are_refused(shapes, named):
    with pytest.raises(ValueError, match=named):
        Problems(shapes)


@pytest.mark.parametrize("shape", [(2**32, 1), (2**31, 1), (1, 1, 2**16, 2**16), (1, 2**40, 1, 1)], ids=str)
def test_parameters_beyond_64_bit_are_named_on_any_device(shape):
    with pytest.raises(ValueError, match="parameter 'words'"):
        KFO([("words", torch.empty(shape, device="meta"))])
    with pytest.raises(ValueError, match="parameter 'words'"):
        KFO([("words", big(*shape))])


def test_a_meta_device_has_no_limit_below():
    assert KFO([("words", torch.empty(10**7, 16, device="meta"))]).phi[0].shape == (1, 10**14)
