"""bench/stages.py names what there is: ops that are registered, nodes that a graph has."""

from __future__ import annotations

import pytest
import torch

import kfo_ext.networks  # noqa: F401  registers the ops
from bench import meta_cost, meta_profile, stages
from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")
# Nodes of our autograd Functions; torch's own are classes of `torch._C._functions`.
OURS = {"Conv2dBackward", "Conv2dInputBackward", "Conv2dWeightBackward"}


@pytest.fixture
def registered():
    return {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}


def test_every_name_is_an_op_or_a_node(registered):
    nodes = {name.rstrip("0123456789") for name in dir(torch._C._functions)} | OURS
    names = [name for names in stages.NAMES.values() for name in names.split()]
    assert [name for name in names if name not in (registered if "::" in name else nodes)] == []
    assert len(set(names)) == len(names)


def test_every_op_of_ours_has_a_stage(registered):
    ours = {name for name in registered if name.startswith("kfo_ext::")}
    assert "kfo_ext::transform" in ours
    assert {name for name in ours if stages.stage_of([name]) == stages.OTHER} == set()


def test_nodes_of_our_convolutions():
    conv2d = torch.ops.kfo_ext.conv2d
    x, weight = (torch.randn(1, *shape, requires_grad=True) for shape in ((2, 6, 6, 3), (4, 3, 3, 3)))
    y = conv2d(x, weight, 1, 1)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    found = [stages.stage_of([X.grad_fn.name(), "aten::add"]) for X in (y, dx, dweight)]
    assert found == ["convolution, backward", *["convolution, double backward"] * 2]


FACTS = {"command": "c", "processor": "p", "device": None, "torch": "t", "torch_threads": 2}


@pytest.mark.parametrize(
    ("commit", "name"), [("f" * 40 + "-dirty", "commit ffffffffffff with uncommitted"), (None, "of no known commit")]
)
def test_tables_name_their_commit(commit, name):
    sizes = {"repeats": 1, "network": "n", "method": "kfo", **dict.fromkeys(meta_cost.AXES, 1)}
    for made, result in (
        (meta_cost, {"settings": sizes, "axes": [], "keeps_freed_memory": True}),
        (meta_profile, {"settings": {"device": "cpu"}, "profiles": []}),
    ):
        assert name in made.markdown(FACTS | {"commit": commit} | result)
