"""The rules of the convolution operators for torch.func.vmap; see `kfo_ext.ops.mapping`.

Two operands that are not mapped need no copy for each example, since the result has a dimension that the examples can
join: with one weight for all, their images are more images; with one x for all, their weights make more out channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kfo_ext.ops.mapping import Operand, Rule, apart

if TYPE_CHECKING:
    from kfo_ext.ops.conv2d.autograd import ConvFamily


def _joined(X: Operand, examples: int, dim: int) -> Tensor:
    """(tasks, ..., examples * n, ...): the examples join dimension `dim` of each, of size n."""
    return X.of_each(examples).movedim(0, dim).flatten(dim, dim + 1)


def _split(Y: Tensor, examples: int, dim: int) -> Tensor:
    """(examples, tasks, ..., n, ...): undoes `_joined`."""
    return Y.unflatten(dim, (examples, Y.shape[dim] // examples)).movedim(dim, 0)


IMAGES, OUT, CHANNELS = 1, 1, 4


def rules(family: ConvFamily) -> tuple[Rule, Rule, Rule]:
    """The rules of a family of convolution operators.

    Args:
        family: the operators, which the rules call with all examples folded into the tasks.

    Returns:
        A rule for each operator, in the order of the family.
    """

    def conv2d(examples: int, x: Operand, weight: Operand, stride: int, padding: int) -> Tensor:
        if examples and not weight.mapped:
            return _split(family.conv2d(_joined(x, examples, IMAGES), weight.X, stride, padding), examples, IMAGES)
        if examples and not x.mapped:
            return _split(family.conv2d(x.X, _joined(weight, examples, OUT), stride, padding), examples, CHANNELS)
        tasks = x.shape[0]
        rows_x, rows_weight = (X.folded(examples, tasks) for X in (x, weight))
        return apart(family.conv2d(rows_x, rows_weight, stride, padding), examples, tasks)

    def input(examples: int, dy: Operand, weight: Operand, size: list[int], stride: int, padding: int) -> Tensor:
        if examples and not weight.mapped:
            dx = family.input(_joined(dy, examples, IMAGES), weight.X, size, stride, padding)
            return _split(dx, examples, IMAGES)
        tasks = dy.shape[0]
        rows_dy, rows_weight = (X.folded(examples, tasks) for X in (dy, weight))
        return apart(family.input(rows_dy, rows_weight, size, stride, padding), examples, tasks)

    def weight(examples: int, x: Operand, dy: Operand, kernel_size: list[int], stride: int, padding: int) -> Tensor:
        if examples and not x.mapped:
            dweight = family.weight(x.X, _joined(dy, examples, CHANNELS), kernel_size, stride, padding)
            return _split(dweight, examples, OUT)
        tasks = x.shape[0]
        rows_x, rows_dy = (X.folded(examples, tasks) for X in (x, dy))
        return apart(family.weight(rows_x, rows_dy, kernel_size, stride, padding), examples, tasks)

    return conv2d, input, weight
