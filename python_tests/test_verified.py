"""The table of verified functions: each under vmap equals a loop over tasks in float64, to the second derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pages import DOCS, script
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from verified_cases import CASES, TRUTH, Case

from kfo_ext.adapt.verified import DESCRIPTIONS, IN_PLACE, PROPERTIES, SHARING, VERIFIED
from kfo_ext.adapt.vmapped import Plan, Unserved, mapped

TASKS = 3
ENTRIES = [*VERIFIED.items(), *IN_PLACE.items()]
# The operand that all tasks share, and whether tasks lie in memory with their second dimension last.
VARIANTS = [("", False), ("", True), ("x", True), ("w", False)]


class Seen(TorchFunctionMode):
    """The functions that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def operand(shape: tuple[int, ...], shared: bool, channels_last: bool) -> Tensor:
    """Random numbers (TASKS, *shape), or of the shape alone if shared."""
    axis = 0 if shared else 1
    X = torch.randn(shape if shared else (TASKS, *shape), dtype=torch.float64)
    if channels_last and len(shape) > 1:
        axis += len(shape) > 2
        X = X.movedim(axis, -1).contiguous().movedim(-1, axis)
    return X.requires_grad_()


def loop(function: Callable, x: Tensor, w: Tensor, shared: str) -> list[Tensor]:
    """What function(x, w) returns for each task, stacked."""
    tasks = [(x if shared == "x" else x[i], w if shared == "w" else w[i]) for i in range(TASKS)]
    return [torch.stack(each) for each in zip(*(tree_leaves(function(*task)) for task in tasks))]


def at_once(function: Callable, x: Tensor, w: Tensor, shared: str = "") -> list[Tensor]:
    """The same by one call under vmap."""
    if shared == "x":
        return tree_leaves(mapped(nn.Identity(), lambda w: function(x, w), Plan(""))(w))
    if shared == "w":
        return tree_leaves(mapped(nn.Identity(), lambda x: function(x, w), Plan(""))(x))
    return tree_leaves(mapped(nn.Identity(), function, Plan(""))(x, w))


def orders(values: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Values, their gradients and second derivatives, by random functionals that are the same for the same shapes."""
    torch.manual_seed(1)

    def gradients(outputs, create_graph):
        outputs = [y.double() for y in outputs if y.requires_grad]
        if not outputs:
            return []
        total = sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() + y.square().sum() / 2 for y in outputs)
        return torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)

    first = gradients(values, True)
    return [*values, *first, *gradients(first, False)]


def assert_equal(received: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Raises if results differ by more than rounding, of which sums of the largest numbers leave most."""
    assert len(received) == len(expected), what
    largest = max(e.detach().nan_to_num(0.0, 0.0, 0.0).double().abs().amax().item() for e in expected if e.numel())
    for i, (r, e) in enumerate(zip(received, expected)):
        tolerance = 1e-10 if e.dtype == torch.float64 else 1e-3
        message = f"{what} {i}: {{}}"
        torch.testing.assert_close(r, e, rtol=tolerance, atol=1e-12 * (1 + largest), equal_nan=True, msg=message.format)


def check(function: Callable, truth: Callable, case: Case, shared: str, channels_last: bool, what: str) -> None:
    torch.manual_seed(0)
    x, w = operand(case.x, shared == "x", channels_last), operand(case.w, shared == "w", channels_last)
    # torch's other kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        expected = orders(loop(truth, x, w, shared), [x, w])
    assert_equal(orders(at_once(function, x, w, shared), [x, w]), expected, what)


def test_each_entry_has_cases_and_each_case_an_entry():
    assert {name for _, name in ENTRIES} == set(CASES)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("name", sorted(CASES))
def test_entry_equals_the_loop(name):
    for entry, entry_name in ENTRIES:
        if entry_name != name:
            continue
        seen = Seen()
        # What views raise on becomes a reshape.
        truth_of = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as, **TRUTH}
        for number, case in enumerate(CASES[name]):

            def function(x, w, entry=entry, case=case, seen=seen):
                with seen:
                    return case.call(entry, x, w)

            def truth(x, w, entry=entry, case=case, truth_of=truth_of):
                return case.call(truth_of.get(entry, entry), x, w)

            for shared, channels_last in VARIANTS:
                what = f"{entry}, case {number}, shared {shared!r}, channels last {channels_last}: result"
                check(function, truth, case, shared, channels_last, what)
        assert entry in seen.functions


@pytest.mark.parametrize("name", [*DESCRIPTIONS, *PROPERTIES])
def test_descriptions_equal_the_loop(name):
    x, w = operand((3, 2, 4), False, True), operand((4,), False, False)
    found = []

    def describe(x, w):
        for X in (x, x * w, w, x > w):
            value = getattr(X, name)
            found.append(value() if callable(value) else value)
        return x

    at_once(describe, x, w)
    describe(x[0], w[0])
    assert found[:4] == found[4:]


@pytest.mark.parametrize("name", ["requires_grad", "is_contiguous", "stride", "item", "tolist", "unique", "nonzero"])
def test_what_vmap_answers_otherwise_is_not_served(name):
    def function(x, w):
        value = getattr(x * w, name)
        value = value() if callable(value) else value
        return x

    with pytest.raises(Unserved, match=name):
        at_once(function, operand((5, 4), False, False), operand((4,), False, False))


WORDS = torch.tensor([0, 2, 1, 1])
LSTM = nn.LSTM(4, 3).double()
REFUSED = {
    "max_norm": lambda x, w: F.embedding(WORDS, x * w, max_norm=1.0),
    "sparse": lambda x, w: F.embedding(WORDS, x * w, sparse=True),
    "scale_grad_by_freq": lambda x, w: F.embedding(WORDS, x * w, scale_grad_by_freq=True),
    "running statistics": lambda x, w: F.instance_norm(x[:, :, None], torch.zeros(4), torch.ones(4)),
    "nearest-exact": lambda x, w: F.interpolate(x[None], 3, mode="nearest-exact"),
    "out": lambda x, w: torch.add(x, w, out=torch.zeros(5, 4)),
    "add_.*share": lambda x, w: torch.zeros(4).add_(1) + w,
    "relu.*share": lambda x, w: F.relu(torch.ones(4), inplace=True) + w,
    "embedding": lambda x, w: torch.embedding(x, WORDS),
    "batch_norm": lambda x, w: torch.batch_norm(x, w, w, None, None, True, 0.1, 1e-5, False),
    "select_scatter": lambda x, w: torch.select_scatter(x, w, 0, 2),
    "isclose": lambda x, w: torch.isclose(x, w),
    "median": lambda x, w: x.median() * w,
    "lstm": lambda x, w: LSTM(x)[0],
    "bernoulli": lambda x, w: torch.bernoulli(x.sigmoid()) * w,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_verified_is_not_served(reason):
    with pytest.raises(Unserved, match=reason):
        at_once(REFUSED[reason], operand((5, 4), False, False), operand((4,), False, False))


def test_functions_that_share_memory_or_not_are_entries():
    assert set(VERIFIED) >= SHARING


DROPPED = {
    "dropout": (F.dropout, (3, 5, 7), ()),
    "dropout in place": (lambda x, p, t: F.dropout(x, p, t, inplace=True), (3, 5, 7), ()),
    "dropout_": (torch.dropout_, (3, 5, 7), ()),
    "torch.dropout": (torch.dropout, (3, 5, 7), ()),
    "feature_dropout": (torch.feature_dropout, (5, 6, 7), (-1,)),
    "dropout1d": (F.dropout1d, (5, 6, 7), (-1,)),
    "dropout1d unbatched": (F.dropout1d, (30, 7), (-1,)),
    "dropout2d": (F.dropout2d, (5, 6, 2, 3), (-2, -1)),
    "dropout3d": (F.dropout3d, (5, 6, 2, 3, 2), (-3, -2, -1)),
    "alpha_dropout": (F.alpha_dropout, (3, 5, 7), ()),
    "feature_alpha_dropout": (F.feature_alpha_dropout, (5, 6, 2, 3), (-2, -1)),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_draws_a_mask_for_each_task(name):
    """y is affine in x where it is kept, and constant where it is not; whole channels are dropped together."""
    function, shape, together = DROPPED[name]
    x, w = operand(shape, False, False), operand((1,), False, False)
    [y] = at_once(lambda x, w: function(x * w, 0.5, True), x, w)
    slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0] / w.view(-1, *[1] * len(shape))
    kept = slope.detach() != 0
    assert 0.2 < kept.double().mean() < 0.8
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])
    if together:
        assert torch.equal(kept, kept.all(together, keepdim=True).expand_as(kept))
    scale = 2.0 if "alpha" not in name else slope[kept][0].item()
    shifts = (y - scale * kept * x * w.view(-1, *[1] * len(shape))).detach()
    for values in (shifts[kept], shifts[~kept]):
        torch.testing.assert_close(values, values[:1].expand_as(values))
    # By the same draws, the gradient by w and its derivative by x.
    dw = torch.autograd.grad(y.sum(), w, create_graph=True)[0]
    torch.testing.assert_close(dw.flatten(), (scale * kept * x).flatten(1).sum(1))
    torch.testing.assert_close(torch.autograd.grad(dw.sum(), x)[0], scale * kept.double())


def test_dropout_of_attention_draws_a_mask_for_each_task():
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64).expand(TASKS, -1, -1, -1)
    one = torch.eye(9, dtype=torch.float64).expand(TASKS, 2, 9, 9)
    [weights] = at_once(lambda x, one: F.scaled_dot_product_attention(x, x, one, dropout_p=0.5), x, one)
    assert not torch.equal(weights[0] == 0, weights[1] == 0)
    expected = torch.softmax(x @ x.mT / 2, -1) * 2
    torch.testing.assert_close(weights, torch.where(weights == 0, 0.0, expected))


def test_rrelu_draws_slopes_for_each_task():
    x, w = operand((40,), False, False), operand((1,), False, False)
    [y] = at_once(lambda x, w: F.rrelu(x * w, 0.1, 0.4, True), x, w)
    negative = (x * w < 0).detach()
    slopes = (y / (x * w)).detach()
    torch.testing.assert_close(slopes[~negative], torch.ones_like(slopes[~negative]))
    assert ((slopes[negative] > 0.1) & (slopes[negative] < 0.4)).all()
    assert len(slopes[negative].unique()) == negative.sum()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slopes * w)


@pytest.mark.parametrize("name", ["max", "min", "amax", "amin"])
def test_equal_largest_elements_share_the_gradient(name):
    x = torch.tensor([[0.0, 0, -1, 0], [2, 1, 2, 1], [3, 3, 3, 3]], dtype=torch.float64).requires_grad_()
    [y] = at_once(lambda x, w: getattr(torch, name)(x) * w[0], x, torch.ones(TASKS, 1, dtype=torch.float64))
    expected = torch.stack([getattr(torch, name)(row) for row in x])
    assert_equal(orders([y], [x]), orders([expected], [x]), name)


AUTOCAST = (
    "linear bilinear prelu addmm addbmm baddbmm addmv mv dot conv1d conv2d conv3d conv_transpose1d conv_transpose2d"
)


@pytest.mark.parametrize("name", AUTOCAST.split())
def test_types_under_autocast_are_those_of_the_loop(name):
    entries = [entry for entry, entry_name in ENTRIES if entry_name == name]
    for entry in entries:
        for case in CASES[name]:
            x, w = (operand(shape, False, False).detach().float() for shape in (case.x, case.w))

            def function(x, w, entry=entry, case=case):
                return case.call(entry, x, w)

            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected, received = loop(function, x, w, ""), at_once(function, x, w)
            for e, r in zip(expected, received):
                torch.testing.assert_close(r, e, rtol=0.03, atol=0.05)


@pytest.mark.skipif(not DOCS.is_dir(), reason="docs/ is not beside the tests")
def test_the_page_of_functions_is_that_of_the_table():
    functions = script("make_functions")
    assert functions.PAGE.read_text() == functions.page(), "python docs/make_functions.py writes it anew"
