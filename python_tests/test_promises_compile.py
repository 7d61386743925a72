"""Promises about torch.compile, torch.export and autocast: few compilations, a saved program, one table of types."""

from __future__ import annotations

import io
import itertools
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kfo_ext.functional import batch_norm_relu, conv2d
from kfo_ext.testing import random_operands, relative_error
from kfo_ext.transform import Problems, transform
from kfo_ext.transform.op import NATIVE

SHAPES = [(3, 2, 3), (1, 4, 5)]
PROBLEMS = Problems(SHAPES)
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


# What a user calls, and operands for so many tasks.
PUBLIC = {
    "transform": (lambda R, G, L: transform(R, G, L, PROBLEMS), lambda tasks: random_operands(SHAPES, tasks)[:3]),
    "batch_norm_relu": (batch_norm_relu, lambda tasks: (draw(tasks, 9, 4), draw(tasks, 4), draw(tasks, 4))),
    "conv2d": (conv2d, lambda tasks: (draw(tasks, 3, 6, 6, 2), draw(tasks, 4, 2, 3, 3))),
}
public = pytest.mark.parametrize("name", PUBLIC)


@public
def test_compilations_do_not_grow_with_the_number_of_task_counts(name):
    """One for the first number of tasks, one for any other; forward and backward."""
    function, make = PUBLIC[name]
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for tasks in (2, 3, 4, 5, 7, 9, 2, 6):
        operands = [X.requires_grad_() for X in make(tasks)]
        grads = []
        for run in (compiled, function):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Y = run(*operands)
                grads.append((Y.detach(), *torch.autograd.grad((Y * Y.detach().cos()).sum(), operands)))
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert counter.frame_count <= 2


@pytest.mark.skipif(NATIVE is None, reason="the compiled CPU library is not built")
@public
def test_an_exported_program_survives_saving(name):
    """With a dynamic number of tasks, too."""
    function, make = PUBLIC[name]

    class Layer(torch.nn.Module):
        def forward(self, *operands):
            return function(*operands)

    operands = tuple(make(3))
    tasks = torch.export.Dim("tasks", min=2)
    program = torch.export.export(Layer(), operands, dynamic_shapes=((dict.fromkeys([0], tasks),) * len(operands),))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert "kfo_ext" in str(program.graph)
    for count in (3, 5):
        operands = make(count)
        torch.testing.assert_close(loaded(*operands), function(*operands), rtol=1e-12, atol=1e-12)


def type_of_output(name: str, dtypes: list[torch.dtype], autocast: torch.dtype | None) -> torch.dtype | None:
    """The table of types; None where they are refused."""
    if autocast is None:
        return dtypes[0] if len(set(dtypes)) == 1 else None
    if torch.float64 in dtypes:
        return torch.float64 if len(set(dtypes)) == 1 else None
    # A convolution under autocast is torch's own.
    return autocast if name == "conv2d" else torch.float32


@pytest.mark.parametrize("autocast", [None, *HALVES.values()], ids=["off", *HALVES])
@public
def test_table_of_types(name, autocast):
    """Every mixture: the type of the output, that of each gradient, and an error no larger than the types' own."""
    function, make = PUBLIC[name]
    wide = make(2)
    for dtypes in itertools.product([torch.float32, torch.float64, *HALVES.values()], repeat=len(wide)):
        operands = [X.to(dtype).requires_grad_() for X, dtype in zip(wide, dtypes)]
        expected = type_of_output(name, list(dtypes), autocast)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            if expected is None:
                with pytest.raises(TypeError, match=r"expected torch\.\w+ as \w has"):
                    function(*operands)
                continue
            Y = function(*operands)
        assert Y.dtype == expected, dtypes
        gradients = torch.autograd.grad(Y, operands, torch.ones_like(Y))
        exact = [X.detach().double().requires_grad_() for X in operands]
        right = function(*exact)
        truth = torch.autograd.grad(right, exact, torch.ones_like(right))
        # One rounding of an output or gradient in its type; torch's convolution rounds its operands as well.
        rounded = 8 if expected == autocast else 1
        for operand, X, true in zip([None, *operands], (Y, *gradients), (right, *truth), strict=True):
            assert operand is None or X.dtype == operand.dtype, dtypes
            kinds = [X.dtype, expected] if expected != torch.float64 else [X.dtype]
            allowed = max(torch.finfo(kind).eps for kind in [*kinds, torch.float32 if autocast else X.dtype])
            assert relative_error(X, true.detach()) <= rounded * max(allowed, 1e-5 * (X.dtype != torch.float64)), dtypes
