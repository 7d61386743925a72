"""Functions of torch composed of others, because torch.func.vmap has no rule for them, a slow one or a wrong one.

They are called inside a vmapped forward, with the arguments of the function that they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from kfo_ext.ops import per_task

from .verified import is_mapped


def _named(name: str, *owners: Any) -> list[Callable]:
    return [getattr(owner, name) for owner in owners if hasattr(owner, name)]


def _in_autocast(func: Callable) -> Callable:
    """`func` with float32 operands rounded as autocast rounds them, which torch omits under vmap."""

    def call(*arguments: Any, **options: Any) -> Any:
        device = next(X for X in tree_leaves((arguments, options)) if isinstance(X, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return func(*arguments, **options)
        dtype = torch.get_autocast_dtype(device)
        low = (torch.float32, torch.float16, torch.bfloat16)
        rounded = lambda X: X.to(dtype) if isinstance(X, Tensor) and X.dtype in low else X  # noqa: E731
        return func(*tree_map(rounded, arguments), **tree_map(rounded, options))

    return call


def _out_of_autocast(func: Callable) -> Callable:
    """`func`, which autocast leaves alone; under vmap torch would round its operands."""

    def call(X: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(X.device.type, enabled=False):
            return func(X, *arguments, **options)

    return call


def _over_all(func: Callable, reduced: Callable) -> Callable:
    # Under vmap, torch's own function sends the gradient to one of several equal elements instead of to all.
    return lambda X, *arguments, **options: func(X, *arguments, **options) if arguments or options else reduced(X)


def _of_contiguous(func: Callable) -> Callable:
    # The vmap rule of group norm accepts no other memory format.
    return lambda input, *arguments, **options: func(input.contiguous(), *arguments, **options)


def _by_copy(func: Callable) -> Callable:
    return lambda X, *arguments, **options: X.copy_(func(X.clone(), *arguments, **options))


def _in_any_format(func: Callable) -> Callable:
    return lambda *arguments, memory_format=None, **options: func(*arguments, **options)


def _view(X: Tensor, *size: Any, **options: Any) -> Tensor:
    # Activations are channels last, for which torch's own view would raise.
    return X.view(*size, **options) if options or isinstance(size[0], torch.dtype) else X.reshape(*size)


def _mean(*arguments: Any, **options: Any) -> Tensor:
    images = options.keys() <= {"dim", "keepdim"} and _means_images(*arguments, **options)
    return (_mean_of_images if images else torch.mean)(*arguments, **options)


def _means_images(X: Tensor, dim: Any = None, keepdim: bool = False) -> bool:
    """Whether it is the mean over height and width of channels-last images."""
    del keepdim
    if X.dim() != 4 or X.stride(1) != 1 or X.dtype not in (torch.float32, torch.float64):
        return False
    both = isinstance(dim, (tuple, list)) and len(dim) == 2
    return both and {axis + 4 if axis < 0 else axis for axis in dim} == {2, 3}


def _mean_of_images(X: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    del dim
    # The gradient of torch's mean is not channels last; a sum's is an expanded tensor, which our layers copy once.
    height, width = X.shape[2:]
    y = X.permute(0, 2, 3, 1).sum((1, 2), keepdim) / (height * width)
    return y.permute(0, 3, 1, 2) if keepdim else y


def _adaptive_avg_pool(func: Callable, axes: int) -> Callable:
    def pool(input, output_size):
        if output_size in (1, (1,) * axes, [1] * axes):
            return _mean(input, tuple(range(-axes, 0)), keepdim=True)
        return func(input, output_size)

    return pool


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    # torch's fused kernels have no second derivative.
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
    return torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _multi_head_attention(*arguments, need_weights=True, **options):
    # With weights torch computes products and softmax; without them it calls its fused kernels.
    y, weights = F.multi_head_attention_forward(*arguments, need_weights=True, **options)
    return y, weights if need_weights else None


def _embedding(input, weight, padding_idx=None, **options):
    # torch's own function would read another task's rows for an index out of range.
    y = weight.index_select(0, input.flatten()).reshape(*input.shape, weight.shape[1])
    if padding_idx is None:
        return y
    return torch.where((input != padding_idx % len(weight)).unsqueeze(-1), y, y.detach())


def _one_hot(input, num_classes=-1):
    # torch's own function accepts any number under vmap.
    return input.new_zeros(*input.shape, num_classes).scatter(-1, input.unsqueeze(-1), 1)


def _linear(input, weight, bias=None):
    # Under vmap torch's own also multiplies the bias by 1.
    if bias is not None and (input.dim(), weight.dim(), bias.dim()) == (2, 2, 1) and is_mapped(weight):
        return per_task.linear(input, weight, bias)
    y = input @ (weight.mT if weight.dim() == 2 else weight)
    return y if bias is None else y + bias


def _bilinear(input1, input2, weight, bias=None):
    y = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return y if bias is None else y + bias


def _weight_norm(v, g, dim=0):
    others = [axis for axis in range(v.dim()) if dim == -1 or axis != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


def _prelu(input, weight):
    slope = weight.view(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else weight
    return torch.where(input > 0, input, slope * input)


def _hardsigmoid(input, inplace=False):
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def _rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    slope = torch.rand_like(input) * (upper - lower) + lower if training else (lower + upper) / 2
    y = torch.where(input > 0, input, input * slope)
    return input.copy_(y) if inplace else y


_IN_PLACE = ("addcdiv", "addcmul", "clamp", "lerp", "scatter", "square", "tril", "triu")
_CONVOLUTIONS = [f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)]
_LOWERED = ("addmm", "addbmm", "baddbmm", *_CONVOLUTIONS)
_NOT_LOWERED = ("addmv", "dot", "inner", "mv")

# The replacement of each function.
COMPOSED: dict[Callable, Callable] = {
    Tensor.view: _view,
    Tensor.view_as: lambda X, other: X.reshape(other.shape),
    **dict.fromkeys((torch.moveaxis, Tensor.moveaxis), torch.movedim),
    **{func: _in_any_format(func) for func in (Tensor.contiguous, Tensor.to, Tensor.clone, torch.clone)},
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **{func: _over_all(func, torch.amax) for func in (torch.max, Tensor.max)},
    **{func: _over_all(func, torch.amin) for func in (torch.min, Tensor.min)},
    **{func: _in_autocast(func) for name in _LOWERED for func in _named(name, F, torch, Tensor)},
    **{func: _out_of_autocast(func) for name in _NOT_LOWERED for func in _named(name, torch, Tensor)},
    **{func: _by_copy(getattr(torch, name)) for name in _IN_PLACE for func in _named(f"{name}_", torch, Tensor)},
    **{func: _adaptive_avg_pool(func, 1) for func in (F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d)},
    F.adaptive_avg_pool2d: _adaptive_avg_pool(F.adaptive_avg_pool2d, 2),
    F.adaptive_avg_pool3d: _adaptive_avg_pool(F.adaptive_avg_pool3d, 3),
    **{func: _of_contiguous(func) for func in (F.group_norm, torch.group_norm)},
    F.linear: _in_autocast(_linear),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.embedding: _embedding,
    F.one_hot: _one_hot,
    F.bilinear: _out_of_autocast(_bilinear),
    torch._weight_norm: _weight_norm,
    **dict.fromkeys((torch.prelu, Tensor.prelu), _in_autocast(_prelu)),
    F.hardsigmoid: _hardsigmoid,
    F.rrelu: _rrelu,
}
