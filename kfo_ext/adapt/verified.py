"""The functions of torch for which torch.func.vmap equals a loop over tasks in value and two derivatives.

python_tests/test_verified.py compares each entry with a loop over tasks in float64. A forward that calls another
function, or one with arguments for which `refusal` gives a reason, runs task by task.
"""

# ruff: noqa: SIM905 (lists of strings would take a line each)
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Functions of torch, methods of tensors, or both.
ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul alpha_dropout arctan2 asin asinh atan atan2 atanh ceil celu clamp
    clamp_max clamp_min clip clone copysign cos cosh deg2rad detach div divide dropout erf erfc erfinv exp exp2 expm1
    feature_alpha_dropout feature_dropout float_power floor floor_divide fmax fmin fmod frac hardshrink hypot lerp
    lgamma log log10 log1p log2 log_softmax logaddexp logit maximum minimum mul multiply nan_to_num neg negative
    positive pow prelu rad2deg reciprocal relu remainder round rsqrt rsub selu sgn sigmoid sign sin sinc sinh softmax
    sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy
""".split()
REDUCTIONS = """
    all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum diff kthvalue
    logcumsumexp logsumexp max mean min nanmean nansum norm prod sort std std_mean sum topk trace var var_mean
""".split()
PRODUCTS = """
    addbmm addmm addmv addr baddbmm bmm cosine_similarity dist dot einsum ger inner kron matmul mm mv outer
    pairwise_distance tensordot vdot
""".split()
SHAPES = """
    adjoint atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cat chunk concat concatenate
    constant_pad_nd contiguous diag diag_embed diagonal dsplit dstack expand expand_as flatten flip fliplr flipud
    gather hsplit hstack index_add index_copy index_select masked_fill meshgrid moveaxis movedim narrow
    permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll rot90 row_stack
    scatter scatter_add select slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t take_along_dim
    tensor_split tile transpose tril triu unbind unflatten unfold unsqueeze view view_as vsplit vstack
""".split()
COMPARISONS = """
    bitwise_and bitwise_not bitwise_or bitwise_xor eq ge greater greater_equal gt isfinite isinf isnan le less
    less_equal logical_and logical_not logical_or logical_xor lt ne not_equal
""".split()
FACTORIES = """
    arange as_tensor eye full full_like linspace new_full new_ones new_tensor new_zeros ones ones_like scalar_tensor
    tensor tril_indices triu_indices zeros zeros_like
""".split()
# Methods and operators of tensors that torch reports by these names.
METHODS = """
    __abs__ __and__ __eq__ __floordiv__ __getitem__ __invert__ __neg__ __or__ __pos__ __rmatmul__ __rmod__
    __rpow__ __rsub__ __rtruediv__ __xor__ bfloat16 bool double float half int long to type_as
""".split()
VIEWS = "T mT H mH".split()
# Of torch.nn.functional.
LAYERS = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices
    alpha_dropout avg_pool1d avg_pool2d avg_pool3d bilinear celu channel_shuffle conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d cosine_similarity dropout dropout1d dropout2d dropout3d elu embedding
    feature_alpha_dropout fold gelu glu grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm
    interpolate layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d
    max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices mish
    multi_head_attention_forward normalize one_hot pad pairwise_distance pixel_shuffle pixel_unshuffle prelu relu
    relu6 rms_norm rrelu scaled_dot_product_attention selu silu softmax softmin softplus softshrink softsign
    tanhshrink threshold unfold
""".split()
# Layers in torch's own namespace; its batch_norm and embedding take their arguments in another order.
LAYERS_OF_TORCH = """
    _weight_norm adaptive_avg_pool1d avg_pool1d channel_shuffle conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d group_norm layer_norm max_pool1d max_pool2d max_pool3d rms_norm
""".split()
LINALG = "cross diagonal matmul multi_dot norm vecdot vector_norm".split()
# Methods and functions that change their first argument.
CHANGING = """
    __ipow__ __setitem__ abs_ add_ addcdiv_ addcmul_ celu_ clamp_ clamp_max_ clamp_min_ copy_ cos_ div_ dropout_ exp_
    fill_ index_add_ lerp_ log_ masked_fill_ mul_ neg_ pow_ reciprocal_ relu_ rsqrt_ scatter_ scatter_add_
    selu_ sigmoid_ sin_ sqrt_ square_ sub_ tanh_ threshold_ tril_ triu_ zero_
""".split()
CHANGING_LAYERS = "celu_ elu_ hardtanh_ leaky_relu_ relu_ selu_ threshold_".split()
# Properties of a tensor that are the same under vmap and in a loop; requires_grad, is_contiguous and stride differ.
DESCRIPTIONS = """
    __len__ dim element_size get_device is_complex is_floating_point ndimension nelement numel size
""".split()
PROPERTIES = "shape ndim dtype device layout is_cuda is_cpu is_meta is_sparse is_nested is_quantized is_mkldnn".split()


def refusal(func: Callable, arguments: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Why this call is not served, or "" if it is."""
    if func not in VERIFIED and func not in IN_PLACE:
        return "has no verified rule"
    if options.get("out") is not None:
        return "writes to out"
    if (func in IN_PLACE or options.get("inplace")) and not is_mapped(arguments[0]):
        return "changes a tensor that all tasks share"
    return CONDITIONS[func](*arguments, **options) if func in CONDITIONS else ""


def is_mapped(X: Any) -> bool:
    """Whether X has a task dimension under vmap."""
    return isinstance(X, Tensor) and torch._C._functorch.is_batchedtensor(X)


def _found(names: Iterable[str], *owners: Any) -> dict[Callable, str]:
    return {getattr(owner, name): name for name in names for owner in owners if hasattr(owner, name)}


VERIFIED: dict[Callable, str] = {
    **_found(ELEMENTWISE + REDUCTIONS + PRODUCTS + SHAPES + COMPARISONS + FACTORIES, torch, Tensor),
    **_found(METHODS, Tensor),
    **{getattr(Tensor, name).__get__: name for name in VIEWS},
    **_found(LAYERS, F),
    **_found(LAYERS_OF_TORCH, torch),
    **_found(LINALG, torch.linalg),
    **_found(["_set_grad_enabled"], torch._C),
}
IN_PLACE: dict[Callable, str] = {**_found(CHANGING, torch, Tensor), **_found(CHANGING_LAYERS, F)}
DESCRIBING: frozenset[object] = frozenset(
    [*_found(DESCRIPTIONS, torch, Tensor), *(getattr(Tensor, name).__get__ for name in PROPERTIES)]
)
# Arguments for which vmap does not serve a function; torch's functions written in Python pass keywords.
CONDITIONS: dict[Callable, Callable[..., str]] = {
    F.embedding: lambda *_, max_norm=None, sparse=False, scale_grad_by_freq=False, **__: (
        "with max_norm, sparse or scale_grad_by_freq" if max_norm is not None or sparse or scale_grad_by_freq else ""
    ),
    # In a loop, torch raises for the shapes that do not fit.
    F.linear: lambda input, weight, bias=None: (
        "with a weight or a bias of more dimensions"
        if weight.dim() > 2 or (bias is not None and bias.dim() > 1)
        else ""
    ),
    F.instance_norm: lambda *_, running_mean=None, **__: "" if running_mean is None else "with running statistics",
    F.one_hot: lambda _, num_classes=-1: "without a number of classes" if num_classes == -1 else "",
    F.interpolate: lambda *_, mode="nearest", **__: f"with mode {mode!r}" if mode == "nearest-exact" else "",
}
# The memory layout decides whether their results share memory with their first argument.
SHARING: frozenset[Callable] = frozenset(
    _found("contiguous flatten ravel reshape reshape_as to view view_as".split(), torch, Tensor)
)
