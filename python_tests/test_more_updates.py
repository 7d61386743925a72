"""What each update refuses, and what it has of its own: memory, matrices, the frozen start, the choice by names."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from update_table import SHAPES, named_parameters, random_phi

from kfo_ext import KFO, ByName, Chain, GradientDescent, LowRank, MetaCurvature, MetaSGD
from kfo_ext.packing import Packing


def named(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64):
    return [(name, torch.ones(shape, dtype=dtype)) for name, shape in shapes.items()]


SMALL = {"conv.weight": (4, 3, 2, 3), "conv.bias": (4,), "head.weight": (3, 5)}
MAKERS = {
    "meta-sgd": MetaSGD,
    "meta-curvature": MetaCurvature,
    "low rank": partial(LowRank, rank=2),
    "descent": partial(GradientDescent, per_step=2),
    "by name": lambda parameters: ByName(parameters, {"*": MetaSGD}),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bad_parameters(make):
    mixed = [("a", torch.ones(2)), ("b", torch.ones(2).double())]
    for given, error, message in (
        ([], ValueError, "parameters: expected at least one parameter, got none"),
        (mixed, TypeError, r"parameter 'b': expected torch.float32 as 'a' has, got torch.float64: convert the model"),
        ([("a", torch.ones(2, dtype=torch.int64))], TypeError, "parameter 'a': expected a floating-point tensor"),
        (mixed[:1] * 2, ValueError, "the name 'a' occurs twice"),
        ([("a", torch.ones(2)), ("b", torch.ones(2, device="meta"))], ValueError, "'b': expected device cpu"),
        (nn.Linear(2, 2), TypeError, r"parameters: expected an iterable .* got Linear: pass its .named_parameters\(\)"),
        (torch.ones(2), TypeError, "parameters: expected an iterable .* got one Tensor: put it in a list"),
        ([3.0], TypeError, r"parameters\[0\]: expected a tensor or a \(name, tensor\) pair, got float"),
    ):
        with pytest.raises(error, match=message):
            make(given)


def test_rates_need_tensors():
    packing = Packing.of(named(SMALL))
    with pytest.raises(TypeError, match=r"parameters: expected tensors .* dtype and device .* got a Packing"):
        GradientDescent(packing, per_step=2)
    assert GradientDescent(packing).phi == ()


SHAPELESS = {"scale": (), "deep": (1, 2, 1, 1, 1, 2)}


@pytest.mark.parametrize("make", [MetaCurvature, partial(LowRank, rank=1), KFO])
@pytest.mark.parametrize("name", SHAPELESS)
def test_other_numbers_of_dimensions_are_named(make, name):
    with pytest.raises(ValueError, match=f"parameter '{name}': expected 1 .*, 2 .* or 3 to 5 .*dimensions, got"):
        make(named({**SMALL, name: SHAPELESS[name]}))


def test_any_shape_has_rates():
    grads = [torch.randn(shape) for shape in SHAPELESS.values()]
    update = MetaSGD(named(SHAPELESS, torch.float32))
    with torch.no_grad():
        update.a.copy_(torch.arange(1.0, 6))
    assert torch.equal(update.transform(grads)[0], grads[0])
    assert torch.equal(update.transform(grads)[1], grads[1] * torch.arange(2.0, 6).view(SHAPELESS["deep"]))


@pytest.mark.parametrize("shapes", [{"a": (3,), "b": (4,)}, {"a": (3, 2)}, {"a": (2, 3, 4)}, {"a": (3, 2), "b": (3,)}])
def test_meta_curvature_of_some_kinds(shapes):
    """Without vectors, matrices or convolutions there are no meta-parameters for them."""
    update = MetaCurvature(named(shapes))
    kinds = {min(len(shape), 3) for shape in shapes.values()}
    assert len(update.phi) == (1 in kinds) + 2 * bool(kinds - {1}) + (3 in kinds)
    grads = [torch.randn(shape, dtype=torch.float64) for shape in shapes.values()]
    assert all(torch.allclose(U, g) for U, g in zip(update.transform(grads), grads))


def test_meta_curvature_by_its_matrices():
    update = MetaCurvature(named(SMALL))
    with torch.no_grad():
        for matrices in update.matrices():
            for M in matrices:
                M.copy_(torch.randn_like(M))
    (M_o, M_i, M_f), (m,), (W_o, W_i) = update.matrices()
    assert [len(M) for M in (M_o, M_i, M_f, m, W_o, W_i)] == [4, 3, 6, 4, 3, 5]
    conv, bias, weight = grads = [torch.randn(shape, dtype=torch.float64) for shape in SMALL.values()]
    expected = torch.einsum("oa,bi,fc,abc->oif", M_o, M_i, M_f, conv.flatten(2)).reshape(conv.shape)
    for mine, other in zip(update.transform(grads), (expected, m * bias, W_o @ weight @ W_i), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_meta_curvature_beyond_the_memory_says_what_to_do():
    huge = torch.zeros(()).expand(10**7, 16)
    with pytest.raises(ValueError, match=r"parameter 'words'.*R \(10000000, 10000000\).*ByName\(parameters, .*MetaSGD"):
        MetaCurvature([("words", huge)])


def test_low_rank_says_its_memory():
    parameters = named({"conv.weight": (8, 3, 2, 2), "conv.bias": (8,), "head.weight": (5, 6)})
    sides = 3 + 4 + 8 + 5 + 6
    kronecker = 3**2 + 4**2 + 8**2 + 1 + 5**2 + 6**2
    full = 96**2 + 8**2 + 30**2
    assert LowRank(parameters, rank=3).memory() == (3 * sides, 6 * sides, kronecker, full)
    assert LowRank(parameters, rank=2, whole_layer=True).memory() == (2 * 134, 4 * 134, kronecker, full)
    part = LowRank(parameters, rank=2, only=["head.*"])
    assert part.memory() == (2 * 11, 4 * 11, 5**2 + 6**2, 30**2)
    assert part.memory().learned == sum(row.numel() for row in part.phi)
    assert part.memory().stored == sum(X.numel() for X in (*part.parameters(), *part.buffers()))


def test_low_rank_only_leaves_the_rest_to_gradient_descent():
    update = LowRank(named_parameters(), rank=2, only=["head.*"])
    with torch.no_grad():
        update.A.copy_(random_phi(update)[0])
    grads = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, U in update.transform(grads).items():
        assert torch.equal(U, grads[name]) != name.startswith("head.")


def test_low_rank_starts_at_unit_length_and_learns():
    update = LowRank(named({"weight": (200, 300)}), rank=2)
    for A in update._A.unpack(update.A.detach(), batched=False):
        assert ((A.norm(dim=0) - 1).abs() < 0.3).all()
    assert torch.equal(update.A, update.start)
    assert "start" not in dict(update.named_parameters())
    G = torch.randn(1, update.packing.numel, dtype=torch.float64)
    assert torch.equal(update.rule(update.phi, G), G)
    (gradient,) = torch.autograd.grad((update.rule(update.phi, G) * torch.randn_like(G)).sum(), update.A)
    assert gradient.abs().min() > 0


def test_low_rank_keeps_the_start_in_its_state():
    source, other = (LowRank(named(SMALL), rank=2) for _ in range(2))
    assert not torch.equal(source.start, other.start)
    with torch.no_grad():
        source.A.copy_(random_phi(source)[0])
    other.load_state_dict(source.state_dict())
    grads = [torch.randn(shape, dtype=torch.float64) for shape in SMALL.values()]
    assert all(map(torch.equal, source.transform(grads), other.transform(grads)))
    for name, lacks in (("start", "A without start"), ("A", "start without A")):
        state = {key: value for key, value in source.state_dict().items() if key != name}
        with pytest.raises(ValueError, match=f"state_dict: expected A and start, .*got {lacks}"):
            other.load_state_dict(state, strict=False)
    for options, message in (({"rank": 1}, "rank=1, got rank=2"), ({"whole_layer": True}, "whole_layer=True, got")):
        with pytest.raises(ValueError, match=message):
            LowRank(named(SMALL), **{"rank": 2, **options}).load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match=r"covered of parameter 'conv.weight'=False, got .*=True"):
        LowRank(named(SMALL), rank=2, only=["head.*"]).load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"rank": 4},
            ValueError,
            r"rank: expected at most 3, .*'conv.weight' of shape \(4, 3, 2, 3\), got 4; .*only=",
        ),
        ({"rank": 5, "whole_layer": True}, ValueError, r"rank: expected at most 4, the size .*'conv.bias'.*got 5"),
        ({"rank": 0}, ValueError, "rank: expected the number of columns of A, at least 1, got 0"),
        ({"rank": 2.0}, TypeError, r"rank: expected the number of columns of A, an integer, got 2\.0"),
        ({"rank": True}, TypeError, "rank: .*got True"),
        ({"rank": 1, "whole_layer": 1}, TypeError, "whole_layer: expected True or False, got 1"),
        ({"rank": 1, "only": ["had.*"]}, ValueError, r"only: 'had\.\*' matches no parameter"),
    ],
    ids=str,
)
def test_low_rank_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        LowRank(named(SMALL), **options)


def test_low_rank_has_none_of_a_side_of_one():
    assert LowRank(named({"a": (3,), "b": (1, 4), "c": (1,)}), rank=2).A.shape == (1, 2 * 7)
    with pytest.raises(ValueError, match="parameters: expected one with a side longer than 1, got none; use Grad"):
        LowRank(named({"a": (1,), "b": (1, 1)}), rank=1)


def test_chain_of_bad_updates():
    update = MetaSGD(named(SMALL))
    renamed = {name.replace("head", "tail"): shape for name, shape in SMALL.items()}
    for updates, error, message in (
        ((), ValueError, "updates: expected at least one Update, got none"),
        ((update, MetaSGD), TypeError, r"updates\[1\]: expected an Update such as KFO\(parameters\), got <class"),
        (([update],), TypeError, r"updates\[0\]: expected an Update .*, got list"),
        ((update, update), ValueError, "updates: .*occur twice; make two updates"),
        ((update, Chain(update)), ValueError, "updates: .*occur twice"),
        ((update, KFO(named(renamed))), ValueError, r"updates\[1\]: .*'head.weight' \(3, 5\).*'tail.weight'"),
        (
            (update, KFO(named({**SMALL, "head.weight": (5, 3)}))),
            ValueError,
            r"one made for 'head.weight' \(5, 3\)",
        ),
        ((update, KFO(named(SMALL)[:2])), ValueError, r"the 3 parameters of updates\[0\], got one for 2"),
        (
            (update, KFO(named(SMALL, torch.float32))),
            ValueError,
            r"torch.float64 on cpu .*got torch.float32 on cpu",
        ),
    ):
        with pytest.raises(error, match=message):
            Chain(*updates)


@pytest.mark.parametrize("second", [MetaSGD, KFO])
def test_a_generator_that_a_part_has_read_is_named(second):
    generator = nn.Linear(2, 2).named_parameters()
    MetaSGD(generator)
    with pytest.raises(ValueError, match=r"got none; a generator such as model.named_parameters\(\) can be read once"):
        second(generator)


def test_chain_takes_the_names_that_one_has():
    tensors = [tensor for _, tensor in named(SMALL)]
    chain = Chain(MetaSGD(tensors), KFO(named(SMALL)))
    assert chain.packing.names == tuple(SMALL)
    assert Chain(MetaSGD(tensors)).packing.named is False


def test_chain_keeps_the_order():
    parameters = named({"weight": (3, 5)})
    rates, factors = MetaSGD(parameters), KFO(parameters, psd=False)
    with torch.no_grad():
        for row in (*rates.phi, *factors.phi):
            row.copy_(torch.randn_like(row))
    G = torch.randn(2, 15, dtype=torch.float64)
    for chain, expected in (
        (Chain(rates, factors), factors.rule(factors.phi, rates.rule(rates.phi, G))),
        (Chain(factors, rates), rates.rule(rates.phi, factors.rule(factors.phi, G))),
    ):
        assert torch.equal(chain.rule(chain.phi, G), expected)


def test_chain_is_left_as_it_was_by_a_state_of_others():
    chain = Chain(MetaSGD(named(SMALL)), KFO(named(SMALL)))
    before = copy.deepcopy(chain.state_dict())
    for other, message in (
        (Chain(MetaSGD(named(SMALL)), KFO(named(SMALL), psd=False)), "1.psd=True, got 1.psd=False"),
        (Chain(KFO(named(SMALL)), MetaSGD(named(SMALL))), "0.update='MetaSGD', got 0.update='KFO'"),
        (Chain(MetaSGD(named(SMALL))), "updates=2, got updates=1"),
    ):
        with torch.no_grad():
            for row in other.phi:
                row.fill_(9)
        with pytest.raises(ValueError, match=f"state_dict: expected meta-parameters with {message}"):
            chain.load_state_dict(other.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in chain.state_dict().items())


def test_chain_of_gradient_descent_copies_nothing():
    chain = Chain(GradientDescent(named(SMALL)), GradientDescent(named(SMALL)))
    G = torch.randn(2, chain.packing.numel)
    assert chain.rule((), G) is G
    assert chain.phi == ()
    assert chain.steps is None


def test_by_name_takes_the_first_match():
    update = ByName(named(SMALL), {"conv.bias": GradientDescent, "conv.*": MetaSGD, "*": partial(KFO, psd=False)})
    assert [child.packing.names for child in update.updates] == [("conv.bias",), ("conv.weight",), ("head.weight",)]
    assert [type(child) for child in update.updates] == [GradientDescent, MetaSGD, KFO]
    assert update.updates[2].psd is False
    assert set(update.state_dict()) == {
        "_extra_state", "updates.1._extra_state", "updates.1.a", "updates.2._extra_state",
        "updates.2.layers.0.R", "updates.2.layers.0.L",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        ({}, ValueError, r"no pattern matches parameter 'conv.weight'; add '\*': GradientDescent .*an empty dict"),
        ({"head.*": MetaSGD}, ValueError, r"no pattern matches parameter 'conv.weight'; .*got 'head\.\*'"),
        ({"*": KFO, "head.*": MetaSGD}, ValueError, r"'head\.\*' has no parameter: '\*' stands before it"),
        ({"*": KFO, "tail.*": MetaSGD}, ValueError, r"'tail\.\*' has no parameter: they are 'conv\.weight', "),
        ([MetaSGD], TypeError, "updates: expected a dict such as .*, got list"),
        ({3: MetaSGD}, TypeError, "updates: expected names or patterns such as 'head.*', got 3"),
        ({"*": 3}, TypeError, r"updates\['\*'\]: expected what makes an update of its parameters.*got int"),
        ({"*": MetaSGD(named(SMALL))}, TypeError, r"updates\['\*'\]: .*got one made already, MetaSGD"),
        ({"*": dict}, TypeError, r"updates\['\*'\]: expected what makes an Update, got dict"),
        ({"*": lambda own: KFO(own[:1])}, ValueError, r"expected an update of the parameters .*got one for 'conv"),
    ],
)
def test_by_name_bad_choices(updates, error, message):
    with pytest.raises(error, match=message):
        ByName(named(SMALL), updates)


def test_by_name_needs_names():
    with pytest.raises(ValueError, match=r"parameters: expected \(name, tensor\) pairs such as model.named_param"):
        ByName([tensor for _, tensor in named(SMALL)], {"*": MetaSGD})


def test_by_name_refuses_the_state_of_another_choice():
    one = ByName(named(SMALL), {"conv.*": MetaSGD, "*": KFO})
    other = ByName(named(SMALL), {"conv.weight": MetaSGD, "*": KFO})
    with pytest.raises(ValueError, match=r"with choice of parameter 'conv.bias'=0, got .*=1"):
        one.load_state_dict(other.state_dict())


def test_by_name_does_not_copy_one_block():
    update = ByName(named(SMALL), {"*": GradientDescent})
    G = torch.randn(2, update.packing.numel)
    assert update.rule((), G) is G


def test_by_name_has_the_steps_that_all_have():
    makers = {"conv.*": partial(MetaSGD, per_step=3), "*": partial(GradientDescent, per_step=2)}
    update = ByName(named(SMALL), makers)
    assert update.steps == 2
    grads = [torch.randn(shape, dtype=torch.float64) for shape in SMALL.values()]
    update.transform(grads, step=1)
    with pytest.raises(ValueError, match=r"step: expected 0 to 1, got 2"):
        update.transform(grads, step=2)
    mixed = ByName(named(SMALL), {"conv.*": KFO, "*": partial(GradientDescent, per_step=2)})
    with torch.no_grad():
        mixed.updates[1].rates.row.copy_(torch.tensor([[2.0, 3.0]]))
    for step, rate in ((0, 2), (1, 3)):
        torch.testing.assert_close(mixed.transform(grads, step)[2], rate * grads[2])


@pytest.mark.parametrize("make", [MetaCurvature, partial(LowRank, rank=1), KFO])
def test_a_shape_without_sides_has_a_remedy_that_serves_every_update(make):
    with pytest.raises(ValueError, match=r"parameter 's': .*KFO and LowRank leaves it.*ByName\(parameters, {name: Met"):
        make([("s", torch.randn(())), ("b", torch.randn(3))])


@pytest.mark.parametrize("damage", ["lacks start", "short start", "short A"])
def test_a_refused_state_leaves_an_update_of_several_as_it_was(damage):
    update, other = (Chain(MetaSGD(named(SMALL)), LowRank(named(SMALL), rank=1)) for _ in range(2))
    with torch.no_grad():
        other.updates[0].a.fill_(7)
    state, kept = other.state_dict(), copy.deepcopy(update.state_dict())
    key = f"updates.1.{damage.split()[1]}"
    state[key] = state[key][:, :3]
    if damage.startswith("lacks"):
        del state[key]
    with pytest.raises(ValueError, match=r"updates\.1\.(A and|A: expected shape|start: expected shape)"):
        update.load_state_dict(state)
    assert all(torch.equal(value, kept[name]) for name, value in update.state_dict().items())
