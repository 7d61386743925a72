"""The table of calls by which test_verified.py tests the functions that the vmap route serves.

A call is an expression of the function itself, `f`, and of two random tensors of one task, `x` and `w`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Case(NamedTuple):
    """A call, and the shapes of x and w."""

    call: Callable[[Callable, Tensor, Tensor], Any]
    x: tuple[int, ...]
    w: tuple[int, ...]


CASES: dict[str, list[Case]] = defaultdict(list)
ROWS, TOKENS, SEQUENCE, IMAGE, VOLUME = (5, 4), (2, 5, 4), (3, 2, 7), (3, 2, 6, 7), (2, 2, 4, 5, 4)


def case(names: str, *calls: str | Callable, x: tuple[int, ...] = ROWS, w: tuple[int, ...] | None = None) -> None:
    """Adds calls, several to a string, of the functions of these names; w has x's last dimension unless said."""
    functions = []
    for call in calls:
        texts = call.split("; ") if isinstance(call, str) else []
        functions += [eval(f"lambda f, x, w: {text}") for text in texts] or [call]
    for name in names.split():
        CASES[name] += [Case(call, x, x[-1:] if w is None else w) for call in functions]


def index(*values: int) -> Tensor:
    return torch.tensor(values)


# One tensor.
case(
    """abs absolute ceil clone cos cosh deg2rad detach erf erfc exp exp2 expm1 floor frac lgamma nan_to_num neg negative
    positive rad2deg relu round selu celu sigmoid sign sgn sin sinc sinh square tan tanh trunc asinh atan zeros_like
    ones_like __neg__ __pos__ __abs__ hardshrink isfinite isinf isnan float double half bfloat16 long int bool""",
    "f(x * w); f((x * w).mT)",
)
case("acos asin atanh erfinv", "f((x * w).tanh() * 0.9)")
case("acosh log log10 log1p log2 sqrt rsqrt reciprocal", "f((x * w).square() + 1.5)")
case("logit", "f((x * w).sigmoid()); f((x * w).sigmoid(), 0.2)")
case("clamp clip", "f(x * w, -1, 0.5); f(x, w, None); f(x, min=w, max=w + 1)")
case("clamp clip", "f((x * w).relu(), 0.0, 1.0); f(x * w, max=0.3)")
case("clamp_max clamp_min", "f(x * w, 0.2); f(x, w); f(w, x)")
case("threshold", "f(x * w, 0.1, 0.7)")
case(
    "nan_to_num",
    "f(torch.where(x > 0, x * w, torch.nan), 0.5)",
    "f(torch.where(x > 0, x * w, -torch.inf), 0.5, 2.0, -2.0)",
)
case("softmax log_softmax", "f(x * w, -1); f(x * w, 1); f(x * w, dim=0)", x=TOKENS)
case("softmax log_softmax", "f(x * w, -1, dtype=torch.float64)", x=(4,))
case("round", "f(x * w, decimals=1)")
case("prelu", "f(x, w)", x=IMAGE, w=(2,))
case("prelu", "f(x, w)", w=(1,))
case("hardshrink", "f(x * w, 0.2)")


def selected(f, condition, x, y):
    return f(condition, x, y) if f is torch.where else f(x, condition, y)


# Two tensors: of like shape, broadcast either way, a number on either side, of no dimension.
BINARY = """add sub subtract mul multiply maximum minimum fmax fmin copysign atan2 arctan2 __rsub__
    rsub"""
case(BINARY, "f(x, w); f(x * w, x)")
case(BINARY, "f(x, w)", x=IMAGE, w=(2, 1, 7))
case(BINARY, "f(x, w)", x=(4,), w=(3, 5, 4))
case(BINARY, "f(x, w)", w=())
case("add sub subtract mul multiply rsub __rsub__", "f(x * w, 2)")
case("add sub subtract rsub", "f(x, w, alpha=2)")
case("hypot logaddexp", "f(x, w); f(x * w, x)")
DIVIDE = "div divide true_divide __rtruediv__"
case(DIVIDE, "f(x.square() + 1, w.square() + 1); f(x * x * w * w + 1, 3)")
case(DIVIDE, "f(x.square() + 1, w.square() + 1)", w=())
case("div divide", "f(x, w, rounding_mode='floor'); f(x, 0.3, rounding_mode='trunc') * w")
case("floor_divide __floordiv__", "f(x.detach(), w.detach()) * w; f((x * w).detach(), 0.3)")
case("remainder fmod", "f(x, w); f(x * w, 0.7)")
case("__rmod__", "f(x.detach(), 0.7) * w")
case("pow float_power", "f(x * w, 0); f(x * w, 1); f(x * w, 2); f(x * w, 3)")
case("pow float_power", "f(x.square() + 1, w); f((x * w).square() + 1, -0.5)")
case("pow float_power __rpow__", "f(x.square() + 1, w.square() + 1)", w=())
case("__rpow__", "f(x * w, 2); f(w, x.square() + 1)")
case("xlogy", "f(x, w.square() + 1); f((x * w).relu(), x.square() + 1)")
case("lerp", "f(x, w, 0.3); f(x, x.flip(0), w); f(x, w.expand(5, 4), w.square())")
case("addcdiv addcmul", "f(x, w, w.square() + 1, value=0.5); f(w, x, x.square() + 1)")
case("where", "selected(f, x > 0, x * w, w); selected(f, x > 0, w, x); selected(f, w > 0, x * w, 0.5)")
COMPARED = "eq ne gt lt ge le greater less greater_equal less_equal not_equal __eq__"
case(COMPARED, "torch.where(f(x, w), x * w, w); f(x * w, 0.3); f(w, x.round())")
LOGICAL = "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__"
case(LOGICAL, "f(x > 0, w > 0); f(w > 0, x > 0)")
case("logical_not bitwise_not __invert__", "f(x * w > 0)")

# Reductions and scans.
case("sum mean prod amax amin logsumexp var std nansum nanmean all any", "f(x * w, 1)", x=TOKENS)
case("sum mean amax amin logsumexp var std nansum nanmean", "f(x * w, (0, -1), keepdim=True)", x=TOKENS)
case("sum mean prod amax amin norm var std nansum nanmean all any max min", "f(x * w)")
case("sum mean var std amax", "f(x * w, dim=(2, 3)); f(x * w, dim=(0, 2, 3), keepdim=True)", x=IMAGE)
case("sum mean prod", "f(x * w, -1, True, dtype=torch.float64); f(x * w, dtype=torch.float64)")
case("prod", "f((x * w).relu(), 1); f((x * w).relu())")
case("cumprod", "f((x * w).relu(), 1)")
case("norm", "f(x * w, 1, 0); f(x * w, dim=1, keepdim=True)")
case("norm", "f(x * w, 'fro', (-2, -1)); f(x * w, torch.inf, -1); f((x * w).relu(), 2, 1)", x=TOKENS)
case(
    "var std var_mean std_mean",
    "f(x * w, dim=1, unbiased=False); f(x * w, dim=(0, 1), correction=0, keepdim=True)",
    "f(x * w, unbiased=False); f(x * w, correction=2, dim=0)",
)
case("var_mean std_mean", "f(x * w, 1); f(x * w); f(x * w, (0, 2))", x=TOKENS)
case("max min aminmax", "f(x * w, dim=1); f(x * w, dim=-1, keepdim=True)", x=TOKENS)
case("kthvalue", "f(x * w, 2, 1); f(x * w, k=1, dim=-1, keepdim=True)", x=TOKENS)
case("aminmax", "f(x * w)")
case("max min", "f((x * w).relu()); f(x.relu().round() * w)", x=IMAGE)
case("max min", "f(x * w, x); f(x, w); f(w, x)")
case("all any", "f(x * w > 0, -1); f(x * w > -9); f(x * w > 0, dim=0, keepdim=True)")
case("argmax argmin", "f(x * w); f(x * w, -1); f(x * w, dim=0, keepdim=True)")
case("argmax argmin", "F.one_hot(f(x * w, 1), 5).to(x.dtype) * w[0]", x=TOKENS)
case("argsort", "f(x * w); f(x * w, 0, True); f(x * w, dim=1, stable=True)")
case("sort", "f(x * w); f(x * w, 0); f(x * w, dim=1, descending=True, stable=True)")
case("topk", "f(x * w, 2); f(x * w, 3, 1); f(x * w, 2, dim=0, largest=False)", x=TOKENS)
case("count_nonzero", "f((x * w).relu()); f((x * w).relu(), 1)")
case("cumsum cumprod cummax cummin logcumsumexp", "f(x * w, 1); f(x * w, dim=-1)", x=TOKENS)
case("cumsum cumprod", "f(x * w, 0, dtype=torch.float64)")
case("diff", "f(x * w); f(x * w, 2, 0)")
case("trace", "f(x * w)", x=(4, 4))
case("vector_norm", "f(x * w, 3, (0, 1)); f(x * w, ord=torch.inf, dim=-1); f(x * w, ord=1, dim=1)")
case("vector_norm", "f(x * w); f(x * w, dim=(0, 2), keepdim=True)", x=TOKENS)

# Products.
case("matmul", "f(x, w); f(w.mT, x.mT)", w=(4, 3))
case("matmul", "f(x, w)", w=(4,))
case("matmul", "f(w, x)", w=(5,))
case("matmul", "f(x, w); f(w.mT, x.mT)", x=TOKENS, w=(4, 3))
case("matmul", "f(x, w)", x=(2, 1, 5, 4), w=(3, 4, 6))
case("__rmatmul__", "f(x, w)", w=(3, 5))
case("mm", "f(x, w); f(w.mT, x.mT)", w=(4, 3))
case("bmm", "f(x, w); f(w.mT, x.mT)", x=TOKENS, w=(2, 4, 3))
case("mv", "f(x, w); f(x.mT, x.sum(1)) * w")
case("dot inner vdot", "f(x, w); f(w, x)", x=(4,))
case("inner", "f(x, w)", w=(3, 4))
case("outer ger", "f(x, w); f(w, x)", x=(5,), w=(4,))
case("addmm", "f(w[0], x, w); f(x[:, :3], x, w, beta=0.5, alpha=2)", w=(4, 3))
case("addmv", "f(x[:, 0], x, w, beta=0.5, alpha=2); f(w[0], x, w)")
case("addr", "f(x, x[:, 0], w, beta=0.5, alpha=2); f(w, x[:, 0], w)")
case("baddbmm", "f(w[:, :1], x, w, beta=0.5, alpha=2); f(x[:, :, :3], x, w)", x=TOKENS, w=(2, 4, 3))
case("addbmm", "f(w[0, :1], x, w, beta=0.5, alpha=2)", x=TOKENS, w=(2, 4, 3))
case("kron", "f(x, w)", w=(2, 3))
case("dist", "f(x, w); f(x, w, 3)")
case("tensordot", "f(x, w, 1); f(x, w, ([2], [0]))", x=TOKENS, w=(4, 3))
case(
    "einsum",
    "f('nti,nsi->nts', x, x * w[:, 0]); f('nti,ij,ik->ntjk', [x, w, w]); f('nti->it', x) * w.sum()",
    "f('ij,nti->ntj', w, x)",
    *(
        f"f({e!r}, x, w)"
        for e in ("nti,ij->ntj", "...i,ij->...j", "nti,ij", "nti,ij->j", "n t i, i j -> j t n", "nti,kj->tnk")
    ),
    x=TOKENS,
    w=(4, 3),
)
case("vecdot", "f(x, w); f(x * w, x, dim=0)")
case("cross", "f(x, w[None]); f(x * w, x.flip(0))", x=(5, 3))
case("multi_dot", "f([x, w, w.mT])", w=(4, 3))
case("bilinear", "f(x, x.tanh(), w); f(x, x[..., :4], w, w[:, 0, 0])", w=(3, 4, 4))
case("bilinear", "f(x, x[..., :2] * 2, w, None)", x=TOKENS, w=(3, 4, 2))
case("cosine_similarity pairwise_distance", "f(x * w, x.flip(0)); f(x, w)")
case("cosine_similarity", "f(x * w, x.flip(1), dim=-2, eps=0.001); f((x * w).relu(), w, -1)", x=TOKENS)
case("pairwise_distance", "f(x, w, p=3, keepdim=True); f(x, w, 1.0, 0.001)")

# Shapes.
case("adjoint T mT H mH t ravel fliplr flipud contiguous atleast_1d atleast_2d atleast_3d", "f(x * w)")
case("mT mH adjoint contiguous atleast_3d ravel fliplr", "f(x * w)", x=TOKENS)
case("t atleast_1d atleast_2d atleast_3d diag", "f(x * w)", x=(4,))
case("atleast_1d atleast_2d atleast_3d", "f(x * w)", x=(), w=())
case("contiguous", "f(x * w, memory_format=torch.channels_last)", x=IMAGE)
case("to clone", "f(x * w, memory_format=torch.channels_last)", x=IMAGE)
case("cat concat concatenate stack", "f([x, x * w], 1); f((x * w, x), dim=-2); f([x.detach(), w.expand(5, 4)])")
case("cat concat concatenate", "f([w, x], 1); f([x, torch.ones(3, 1, 6, 7), w.relu()], 1)", x=IMAGE, w=(3, 4, 6, 7))
case("hstack vstack dstack row_stack", "f([x, w.expand(5, 4)]); f((w, w + x[0]))")
case("block_diag", "f(x, w, w)")
case("broadcast_tensors", "f(x, w); f(w, x)")
case("meshgrid", "torch.stack(torch.meshgrid(x[0], w, indexing='ij')); torch.meshgrid(w, x[:, 0], indexing='xy')")
case("broadcast_to expand", "f(w, (3, 4)) * x[:3]; f(x[:, None] * w, (-1 if 'expand' in f.__name__ else 5, 3, 4))")
case("expand_as", "f(w, x) * x; f(x[:, :1], x) * w")
case("chunk tensor_split", "f(x * w, 2); f(x * w, 3, dim=-1)", x=TOKENS)
case("split", "f(x * w, 2); f(x * w, [1, 3], dim=-1); f(x * w, (2, 3), 1)", x=TOKENS)
case("tensor_split", "f(x * w, (1, 3), dim=-1)")
case("split_with_sizes", "f(x * w, [1, 3], dim=-1)")
case("hsplit vsplit dsplit", "f(x * w, 2)", x=(2, 4, 6))
case("diag_embed", "f(x * w); f(x * w, 1, 0, 1)")
case("diagonal", "f(x * w); f(x * w, 1, 0, -1) if f is not torch.linalg.diagonal else f(x * w, offset=1)", x=TOKENS)
case("diag", "f(x * w); f(x * w, 1)")
case("flatten", "f(x * w); f(x * w, 1); f(x * w, start_dim=1, end_dim=-2)", x=IMAGE)
case("flip", "f(x * w, (0,)); f(x * w, [-1, 1])", x=TOKENS)
case("gather", "f(x * w, 1, (x > 0).long()); f(x * w, -1, index(0, 2).expand(5, 2)); f(w, 0, (x > 0).long()[0])")
case("take_along_dim", "f(x * w, (x > 0).long(), 1); f(x * w, index(0, 2)[None], dim=-1)")
case("index_select", "f(x * w, 0, index(0, 2, 2)); f(x * w, -1, (x > 0).long()[:, 0])")
case("index_add index_copy", "f(x, 0, index(0, 3), w.expand(2, 4)); f(w.expand(5, 4), -1, index(1, 2), x[:, :2])")
case(
    "masked_fill",
    "f(x * w, x > 0, 0.5); f(x, w > 0, -1); f(w.expand(5, 4), x > 0, float('-inf')).exp()",
    "f(x * w, index(0, 1, 1, 0).bool(), 2.0)",
)
case(
    "scatter",
    "f(x, 1, (w > 0).long().expand(5, 4)[:, :1], w[:1].expand(5, 1))",
    "f(x * w, -1, index(0, 2).expand(5, 2), 0.5)",
)
case("scatter_add", "f(x, 1, (w > 0).long().expand(5, 4), x * w)")
case("slice_scatter", "f(x, w.expand(2, 4), 0, 1, 3)")
case("moveaxis movedim", "f(x * w, 1, -1); f(x * w, (0, 1), (2, 0))", x=TOKENS)
case("narrow", "f(x * w, 1, 1, 2); f(x * w, -1, -3, 2)")
case("permute", "f(x * w, (0, 2, 3, 1)); f(x * w, (-1, 0, 1, 2))", x=IMAGE)
case("pixel_shuffle", "f(x * w, 2)", x=(2, 8, 3, 5))
case("pixel_unshuffle", "f(x * w, 2)", x=(2, 3, 4, 6))
case("repeat tile", "f(x * w, (2, 1)); f(x * w, (2, 1, 3))")
case("repeat_interleave", "f(x * w, 2); f(x * w, 3, dim=1)")
case("reshape", "f(x * w, (-1,)); f(x * w, (3, 7, -1)); f(x * w, (3, -1))", x=IMAGE)
case("view", "f(x * w, (-1,)); f(x * w, (3, 7, -1))", x=IMAGE)
case("view_as reshape_as", "f(x * w, torch.zeros(7, 36)); f(x * w, x.new_zeros(36, 7))", x=IMAGE)
case("roll", "f(x * w, 1); f(x * w, (1, -2), (0, -1))", x=TOKENS)
case("rot90", "f(x * w, 1, (-2, -1)); f(x * w, 2, (0, 1))", x=TOKENS)
case("select", "f(x * w, 1, 2); f(x * w, -1, -1)", x=TOKENS)
case("squeeze", "f((x * w)[:, None, None]); f((x * w)[:, None], 1); f((x * w)[:1, None], (0, -2)); f(x * w, 0)")
case("swapaxes swapdims transpose", "f(x * w, 0, 1); f(x * w, -1, 0)", x=TOKENS)
case("tril triu", "f(x * w); f(x * w, -1); f(x * w, diagonal=1)", x=TOKENS)
case("unbind", "f(x * w); f(x * w, -1)", x=TOKENS)
case("unflatten", "f(x * w, -1, (2, 2)); f(x * w, 1, (-1, 5))", x=TOKENS)
case("unfold", "f(x * w, 1, 3, 2) if f is not F.unfold else f((x * w)[None], (2, 3), 1, 1, 2)", x=TOKENS)
case("unfold", "f(x * w, 2, 2, 1) if f is not F.unfold else f(x * w, 2)", x=IMAGE)
case("unsqueeze", "f(x * w, 0); f(x * w, -2)")
case("constant_pad_nd", "f(x * w, (1, 2, 0, 1), 0.5)")
INDICES = (
    *(0, -1, slice(1, 3), slice(None, None, 2), None, ..., (slice(None), 1), (..., 1), (None, ..., 0, slice(0, 3, 2))),
    *(index(0, 1, 1), (slice(None), index(1, 0)), (index(0, 1), index(1, 0)), (..., index(3, 0)), [1, 0]),
    *(
        (index(0, 1), slice(None), index(1, 0)),
        (slice(None), [0, 2]),
        (index(0, 1)[:, None], index(1, 0)),
        (0, ..., [1, 2]),
    ),
    *((slice(None), index(1, 0, 1, 0, 0).bool()), (None, index(0, 1), None), index(1, 0).bool(), (1, 2), (index(1), 2)),
    (slice(None), None, index(0, 1), 2),
)
case("__getitem__", *(f"f(x * w, INDICES[{i}])" for i in range(len(INDICES))), x=TOKENS)
case(
    "__getitem__",
    "f(x * w, (w > 0).long()); f(x * w, (slice(None), (w > 0).long())); f(w, (x > 0).long())",
    "f(x, ((w > 0).long(), slice(None), index(0, 1, 2, 3))); f(x, (index(0, 1, 1, 0), (w > 0).long()))",
    x=TOKENS,
)

# Types and new tensors.
case("to", "f(x * w, torch.float32); f(x * w, 'cpu'); f(x > w, x); f(x * w, w.device, torch.float64, copy=True)")
case("type_as", "f(x > w, w) * x; f(x * w, index(1))")
case("zeros_like ones_like", "f(x, dtype=torch.bool)")
case("full_like", "f(x, 0.5) * w")
case("new_zeros new_ones", "f(x, (5, 1)) * w + x")
case("new_full", "f(x, (5, 1), 0.5) * w + x")
case("new_tensor", "f(x, [1.0, 2, 3, 4]) * w + x")
case("zeros ones", "f(5, 4, dtype=x.dtype, device=x.device) * w + x")
case("full", "f((5, 4), 0.5) * w + x")
case("arange", "f(4) * w + x; x[f(0, 5, 2, device=x.device)] * w")
case("linspace", "f(0, 1, 4) * w + x")
case("eye", "f(5, dtype=x.dtype) @ x * w")
case("tensor as_tensor", "f([1.0, 2, 3, 4], dtype=torch.float64) * w + x; f(2.0) * w * x")
case("scalar_tensor", "f(2.0) * w * x")
case("tril_indices triu_indices", "(x * w)[tuple(f(5, 4))]")


def without_gradient(f, x, w):
    f(False)
    try:
        y = x * w
    finally:
        f(True)
    return y * x


case("_set_grad_enabled", without_gradient)

# Layers.
case(
    """celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu silu softplus
    softshrink softsign tanhshrink normalize glu""",
    "f(3 * x * w)",
)
case("hardsigmoid elu silu mish hardtanh hardswish leaky_relu", "f(x * w + 0.1, inplace=True)")
case("relu6 gelu hardswish", "f(5 * x * w)", x=IMAGE)
case("celu elu", "f(x * w, 0.7); f(x * w, alpha=1.3)")
case("gelu", "f(x * w, approximate='tanh')")
case("hardtanh", "f(x * w, -0.3, 0.4)")
case("leaky_relu", "f(x * w, 0.3); f((x * w).relu(), negative_slope=0.3)")
case("rrelu", "f(x * w); f(x * w, 0.3, 0.3, True); f(x * w, 0.1, 0.4)")
case("softplus", "f(x * w, 2.0, 1.0)")
case("softshrink", "f(x * w, 0.2)")
case("softmin", "f(x * w, 1); f(x * w, dim=-1)", x=TOKENS)
case("glu", "f(x * w, 1)", x=IMAGE)
case("normalize", "f(x * w, 1.0, -1); f((x * w).relu(), dim=2, eps=0.1)", x=IMAGE)
case("linear", "f(x, w); f(x, w, w[:, 0])", w=(3, 4))
case("linear", "f(x, w); f(x[0, 0], w); f(x, w, x[0, 0, :3])", x=TOKENS, w=(3, 4))
for n, shape in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
    kernel = (3, 2, 1)[-n:]
    case(
        f"conv{n}d",
        "f(x, w); f(x, w, x[0].flatten()[:4]); f(x, w, w.flatten()[:4], 2, 1)",
        f"f(x, w, padding='valid', dilation=(1, 2, 2)[-{n}:]); f(x[0], w)",
        f"f(x, w, None, (2, 1, 3)[:{n}], (1, 0, 2)[:{n}], (1, 2, 1)[:{n}])",
        x=shape,
        w=(4, 2, *kernel),
    )
    case(
        f"conv{n}d",
        "f(x, w, None, 1, 1, 1, 2); f(x, w, w.flatten()[:4], padding=1, groups=2)",
        x=shape,
        w=(4, 1, *kernel),
    )
    case(f"conv{n}d", "f(x, w, w.flatten()[:3], padding=1); f(x, w, None, 1, 'same')", x=shape, w=(3, 2, *(3,) * n))
    case(
        f"conv_transpose{n}d",
        "f(x, w); f(x, w, w.flatten()[:3], 2, 1, 1)",
        f"f(x, w, None, (2, 1, 3)[:{n}], (1, 0, 0)[:{n}], (1, 0, 2)[:{n}], 1, (1, 2, 1)[:{n}])",
        x=shape,
        w=(2, 3, *kernel),
    )
    case(f"conv_transpose{n}d", "f(x, w, w.flatten()[:6], groups=2)", x=shape, w=(2, 3, *kernel))
    for pool in ("max", "avg"):
        case(
            f"{pool}_pool{n}d",
            "f(x * w, 2); f((x * w).relu(), 3, 2, 1); f(x * w, 3, stride=2, ceil_mode=True)",
            f"f((x * w)[0], (2, 3, 1)[:{n}], padding=(1, 1, 0)[:{n}])",
            x=shape,
        )
    case(f"max_pool{n}d max_pool{n}d_with_indices", "f(x * w, 2, dilation=2, stride=1); f((x * w).relu(), 2)", x=shape)
    case(f"avg_pool{n}d", "f(x * w, 3, 2, 1, True, False)", x=shape)
    for size in (1, 3, (1,) * n, (3, None, 1)[:n]):
        case(
            f"adaptive_avg_pool{n}d adaptive_max_pool{n}d adaptive_max_pool{n}d_with_indices",
            f"f((x * w).relu(), {size})",
            x=shape,
        )
    case(f"lp_pool{n}d", "f(x * w, 2, 2); f((x * w).abs(), 3.0, 3, 2, True)", x=shape)
    case("instance_norm", "f(x); f(x, None, None, w, w.square(), eps=0.01)", x=shape, w=(2,))
    case("group_norm", "f(x * w, 1); f(x * w, 2, eps=0.01)", x=shape)
    case("group_norm", "f(x, 1, w, w.square()); f(x, 2, w, None)", x=shape, w=(2,))
    case("local_response_norm", "f(x * w, 2); f(x * w, 3, 0.1, 0.5, 2.0)", x=shape)
    for mode in ("constant", "reflect", "replicate", "circular"):
        case("pad", f"f(x * w, (1, 2, 0, 1, 1, 1)[:{2 * n}], {mode!r})", x=shape)
    for mode in ("nearest", "area"):
        case(
            "interpolate",
            f"f(x * w, mode={mode!r}, scale_factor=2); f(x * w, mode={mode!r}, size=3)",
            f"f(x * w, mode={mode!r}, scale_factor=0.6, recompute_scale_factor=True)",
            x=shape,
        )
    linear = ("linear", "bilinear", "trilinear")[n - 1]
    for align in (True, False, None):
        case(
            "interpolate",
            f"f(x * w, scale_factor=1.7, mode={linear!r}, align_corners={align})",
            x=shape,
        )
case("pad", "f(x * w, (1, 2), value=0.7); f(x * w, (0, -1, 1, 0)); f(x * w, [0, 0, 1, 1], 'constant', 0.0)")
case(
    "interpolate",
    "f(x * w, size=(4, 9), mode='bicubic'); f(x * w, (4, 9), mode='bicubic', align_corners=True)",
    "f(x * w, (4, 3), mode='bilinear', antialias=True); f(x * w, (4, 3), mode='bicubic', antialias=True)",
    x=IMAGE,
)
case("layer_norm rms_norm", "f(x, (4,), w); f(x * w, [4], eps=0.01); f(x, (4,), x[0, 0]) * w", x=TOKENS)
case("layer_norm", "f(x, (4,), w, w.square(), 0.01)")
case("layer_norm rms_norm", "f(x, (2, 6, 7), w); f(x * w, (6, 7))", x=IMAGE, w=(2, 6, 7))
case("group_norm", "f(x, 2, w, w.square())", w=(4,))
case("group_norm", "f(x, 2, w, w.square())", x=(2, 4, 3, 5), w=(4,))
case("channel_shuffle", "f(x * w, 2)", x=(2, 4, 3, 5))
case("fold", "f(x * w, (4, 5), (2, 3), padding=1); f((x * w)[:, :, :8], (5, 3), 2, stride=1)", x=(2, 12, 25))
case("one_hot", "f((x > 0).long(), 3) * w[0]")
case("embedding", "f((x > 0).long(), w, 1); f((x > 0).long(), w, padding_idx=-3)", w=(3, 2))
case("embedding", "f((x > 0).long(), w) * x[:1, :1]; f(index(0, 2, 1, 1), w) * x[0, 0]", w=(3, 2))
case("grid_sample", "f(x, w.tanh(), align_corners=False); f(x, w, 'nearest', 'border', True)", x=IMAGE, w=(3, 4, 5, 2))
case(
    "scaled_dot_product_attention",
    "f(x @ w, x, x); f(x, x @ w, x[..., :3], is_causal=True); f(x @ w, x, x, x[0, :, :1] * w[0, 0])",
    "f(x @ w, x, x, attn_mask=x @ x.mT > -2, scale=0.7)",
    "f(x @ w, x[:, :1], x[:, 1:2], None, 0.0, False, scale=0.3, enable_gqa=True)",
    x=(2, 2, 4, 4),
    w=(4, 4),
)
case("_weight_norm", "f(x, w, 0)", w=(5, 1))
case("_weight_norm", "f(x, w, 1)", x=(2, 3, 4), w=(1, 3, 1))
case("_weight_norm", "f(x, w[0], -1)", x=(2, 3, 4), w=(1,))


def attention(need_weights=False, **options):
    """Self-attention by torch's function: x (sequence, batch, 4) and w (4, 4) as the input projection."""

    def call(f, x, w):
        projection = torch.cat([w, w.mT, w * 2])
        given = dict(training=False, need_weights=need_weights, **options)
        y = f(x, x, x, 4, 2, projection, projection[:, 0], None, None, False, 0.0, w, w[0], **given)
        return y if need_weights else y[0]

    return call


case(
    "multi_head_attention_forward",
    attention(),
    attention(need_weights=True),
    attention(need_weights=True, average_attn_weights=False),
    attention(attn_mask=torch.ones(5, 5, dtype=torch.float64).triu(1)),
    attention(attn_mask=torch.ones(5, 5).triu(1).bool(), is_causal=True),
    attention(
        attn_mask=torch.ones(5, 5).triu(1).bool(),
        key_padding_mask=index(0, 0, 0, 0, 1, 0, 0, 1, 0, 0).view(2, 5).bool(),
    ),
    x=(5, 2, 4),
    w=(4, 4),
)
for name in (
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
):
    shape = VOLUME if name == "dropout3d" else SEQUENCE if name == "dropout1d" else IMAGE
    case(
        name, "f(x * w, 0.4, False); f(x * w, 0.0, True)", *() if "alpha" in name else ["f(x * w, 1.0, True)"], x=shape
    )


# In place, on a tensor of the task's own.
def own(f, x, w, *arguments, **options):
    """f changes x * w, once where autograd has saved nothing and once after a view of it was taken."""
    y = x * w
    z = x * w + 1
    seen = z.mT if z.dim() > 1 else z[:]
    f(y, *arguments, **options)
    f(z, *arguments, **options)
    return y * x.sum(), seen * 1


case(
    """abs_ exp_ neg_ relu_ sigmoid_ square_ tanh_ tril_ triu_ zero_ selu_ celu_ sin_ cos_ elu_ hardtanh_
    leaky_relu_""",
    own,
)
case("rsqrt_ sqrt_ reciprocal_ log_", "own(lambda y: f(y.square_().add_(1)), x, w)")
CHANGING = "add_ sub_ mul_ "
case(CHANGING, "own(f, x, w, w); own(f, x, w, x); own(f, x, w, 2); own(f, x, w, w.sum())")
case("div_", "own(f, x, w, w.square() + 1); own(f, x, w, 2)")
case("pow_ __ipow__", "own(f, x, w, 3)")
case("clamp_", "own(f, x, w, -0.5, 0.5); own(f, x, w, min=0)")
case("clamp_max_ clamp_min_", "own(f, x, w, 0.2)")
case("addcdiv_ addcmul_", "own(f, x, w, w, x.square() + 1, value=0.5)")
case("copy_", "own(f, x, w, w); own(f, x, w, x.relu())")
case("fill_", "own(f, x, w, 0.5); own(f, x, w, w.sum())")
case("dropout_", "own(f, x, w, 0.0, True); own(f, x, w, 0.3, False)")
case("index_add_", "own(f, x, w, 0, index(0, 3), w.expand(2, 4))")
case("lerp_", "own(f, x, w, w.expand(5, 4), 0.3)")
case("masked_fill_", "own(f, x, w, x > 0, 0.5); own(f, x, w, index(0, 1, 1, 0).bool(), 0.5)")
case(
    "scatter_",
    "own(f, x, w, 1, (w > 0).long().expand(5, 4)[:, :1], w[:1].expand(5, 1))",
    "own(f, x, w, 1, index(0, 2).expand(5, 2), 0.5)",
)
case("scatter_add_", "own(f, x, w, 1, (w > 0).long().expand(5, 4), x)")
case("threshold_", "own(f, x, w, 0.1, 0.7)")
case(
    "__setitem__",
    "own(f, x, w, 0, w); own(f, x, w, (slice(None), 1), x[:, 0])",
    "own(f, x, w, index(0, 2), w.expand(2, 4)); own(f, x, w, index(1, 0, 1, 0, 0).bool(), 0.5)",
    "own(f, x, w, 0, 0.5); own(f, x, w, slice(1, 3), 0.5); own(f, x, w, (..., 1), 0.5)",
    "own(f, x, w, (slice(None), index(0, 2)), 0.5)",
)

# What to compare with where the second derivative of torch itself is wrong (weight norm, 2.13) or does not exist.
TRUTH = {
    torch._weight_norm: lambda v, g, dim: (
        v * g / v.square().sum([i for i in range(v.dim()) if i != dim] if dim >= 0 else None, dim >= 0).sqrt()
    ),
    F.hardsigmoid: lambda x, inplace=False: F.hardtanh(x, -3, 3) / 6 + 0.5,
}
