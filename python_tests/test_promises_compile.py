"""Promises about torch.compile, torch.export, torch.func and autocast: for every layer, and for a whole learner."""

from __future__ import annotations

import io
import itertools
import warnings

import pytest
import torch
from meta_steps import make_batch, make_learner
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from kfo_ext.functional import batch_norm_relu, conv2d, transform
from kfo_ext.ops.transform.op import NATIVE
from kfo_ext.problems import Problems
from kfo_ext.testing import random_operands, relative_error

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


# Plain torch for each of them.
PLAIN = {
    "transform": lambda R, G, L: transform(R, G, L, PROBLEMS, backend="reference"),
    "batch_norm_relu": lambda x, w, b: (
        (x - x.mean(1, True)) * (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt() * w[:, None] + b[:, None]
    ).relu(),
    "conv2d": lambda x, w: torch.stack([
        torch.nn.functional.conv2d(a.movedim(-1, 1), b).movedim(1, -1) for a, b in zip(x.unbind(), w.unbind())
    ]),
}  # fmt: skip


def quadratic(function):
    return lambda *X: (function(*X) ** 2).sum()


def with_first(function, X):
    return lambda first: function(first, *X[1:])


FUNC_PROGRAMS = {
    "grad": lambda f, X: torch.func.grad(quadratic(f), argnums=tuple(range(len(X))))(*X),
    "nested_grad": lambda f, X: torch.func.grad(
        lambda *Y: torch.func.grad(quadratic(f), argnums=1)(*Y).square().sum(), argnums=tuple(range(len(X)))
    )(*X),
    "vmap": lambda f, X: torch.vmap(with_first(f, X))(torch.stack([X[0], 2 * X[0]])),
    "vmap_grad": lambda f, X: torch.vmap(torch.func.grad(with_first(quadratic(f), X)))(torch.stack([X[0], -X[0]])),
    "jvp": lambda f, X: torch.func.jvp(f, X, tuple(x.cos() for x in X))[1],
    "jvp_of_grad": lambda f, X: torch.func.jvp(torch.func.grad(with_first(quadratic(f), X)), X[:1], (X[0].cos(),))[1],
    "vjp": lambda f, X: torch.func.vjp(f, *X)[1](f(*X).cos()),
    "hessian": lambda f, X: torch.func.hessian(lambda w: quadratic(f)(X[0], w, *X[2:]))(X[1]),
    "batched_grads": lambda f, X: torch.autograd.grad(
        f(*(leaves := [x.clone().requires_grad_() for x in X])),
        leaves,
        torch.stack([f(*X).cos(), f(*X).sin()]),
        is_grads_batched=True,
    ),
    "compiled_grad": lambda f, X: torch.compile(
        lambda *Y: torch.func.grad(quadratic(f), argnums=tuple(range(len(Y))))(*Y), backend="aot_eager"
    )(*X),
}


@pytest.mark.parametrize("program", FUNC_PROGRAMS)
@public
def test_torch_func_equals_plain_torch(name, program):
    X = tuple(PUBLIC[name][1](2))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = FUNC_PROGRAMS[program](PUBLIC[name][0], X)
    torch.testing.assert_close(actual, FUNC_PROGRAMS[program](PLAIN[name], X), rtol=1e-9, atol=1e-9)


LEARNER_PROGRAMS = {
    "grad": lambda loss, phi: torch.func.grad(loss)(phi),
    "vmap_grad": lambda loss, phi: {
        name: g[1]
        for name, g in torch.vmap(torch.func.grad(loss))({n: torch.stack([X, X]) for n, X in phi.items()}).items()
    },
    "compiled_grad": lambda loss, phi: torch.compile(torch.func.grad(loss), backend="aot_eager")(phi),
}


@pytest.mark.parametrize(
    ("kind", "program"),
    # Compiling takes seconds: one kind has it.
    [(kind, program) for kind in ("maml-psd", "by-task", "anil") for program in ("grad", "vmap_grad")]
    + [("maml-psd", "compiled_grad")],
)
def test_a_learner_under_torch_func_equals_autograd(kind, program):
    learner, batch = make_learner(kind), make_batch(0)
    named = dict(learner.named_parameters())
    expected = torch.autograd.grad(learner(batch).loss, list(named.values()), materialize_grads=True, allow_unused=True)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = LEARNER_PROGRAMS[program](
            lambda values: torch.func.functional_call(learner, values, (batch,)).loss,
            {name: p.detach() for name, p in named.items()},
        )
    for (name, gradient), right in zip(actual.items(), expected, strict=True):
        torch.testing.assert_close(
            gradient, right, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["maml-psd", "by-task", "anil"])
def test_a_learner_in_forward_mode_is_right(kind):
    """With parameters that require gradients; torch.func.jvp takes that from them, and is refused."""
    learner, batch = make_learner(kind), make_batch(0)
    named = dict(learner.named_parameters())
    gradients = torch.autograd.grad(
        learner(batch).loss, list(named.values()), materialize_grads=True, allow_unused=True
    )
    expected = sum((g * p.cos()).sum() for g, p in zip(gradients, named.values(), strict=True))
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, p.cos()) for name, p in named.items()}
        tangent = forward_ad.unpack_dual(torch.func.functional_call(learner, duals, (batch,)).loss).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-8, atol=1e-12)
    values = {name: p.detach() for name, p in named.items()}
    with pytest.raises(ValueError, match="was frozen"):
        torch.func.jvp(lambda phi: torch.func.functional_call(learner, phi, (batch,)).loss, (values,), (values,))


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
