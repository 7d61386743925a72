"""torch.func: each program gives what an explicit loop over plain torch gives, by our kernels where it says native."""

from __future__ import annotations

import contextlib
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch_func_cases import (
    COLUMNS,
    EXAMPLES,
    GRAPHS,
    PROBLEMS,
    TASKS,
    Functorch,
    Loops,
    Seen,
    operands,
    plain_batch_norm,
)

from bench import meta_case
from bench import torch_func as bench_torch_func
from kfo_ext import KFO
from kfo_ext.functional import adjoint, batch_norm_relu, conv2d, transform
from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="needs the compiled CPU library")
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


# Of the transforms, the operator, a scalar of it, operands of one example, and those of all with their dimensions.
def squares(T, function):
    """The sum of squares of the gradients of `function`, which is one order more."""
    return lambda *X: sum(g.square().sum() for g in T.grad(function)(*X))


def mapped_sum(T, function, dims):
    return lambda *X: T.vmap(function, dims)(*X).sum()


def autograd_outside(T, scalar, X, dims):
    leaves = [x.detach().requires_grad_() for x in X]
    gradients = T.vmap(T.grad(scalar), dims)(*leaves)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)


def cosines(X):
    return tuple(x.cos() for x in X)


def twice(dims):
    """The dimensions of a second mapping, in front of operands that are mapped at `dims` by the first."""
    return tuple(None if dim is None else 0 for dim in dims)


PROGRAMS = {
    "vmap": lambda T, f, s, x, X, dims: T.vmap(f, dims)(*X),
    "vmap(vmap)": lambda T, f, s, x, X, dims: T.vmap(T.vmap(f, dims), twice(dims))(
        *(a if dim is None else torch.stack([a, a.sin()]) for a, dim in zip(X, dims))
    ),
    "grad": lambda T, f, s, x, X, dims: T.grad(s)(*x),
    "grad(grad)": lambda T, f, s, x, X, dims: T.grad(squares(T, s))(*x),
    "grad(grad(grad))": lambda T, f, s, x, X, dims: T.grad(squares(T, squares(T, s)))(*x),
    "vmap(grad)": lambda T, f, s, x, X, dims: T.vmap(T.grad(s), dims)(*X),
    "vmap(grad(grad))": lambda T, f, s, x, X, dims: T.vmap(T.grad(squares(T, s)), dims)(*X),
    "vmap(grad(grad(grad)))": lambda T, f, s, x, X, dims: T.vmap(T.grad(squares(T, squares(T, s))), dims)(*X),
    "grad(vmap)": lambda T, f, s, x, X, dims: T.grad(mapped_sum(T, s, dims))(*X),
    "grad(vmap(grad))": lambda T, f, s, x, X, dims: T.grad(mapped_sum(T, squares(T, s), dims))(*X),
    "grad(grad(vmap(grad)))": lambda T, f, s, x, X, dims: T.grad(squares(T, mapped_sum(T, squares(T, s), dims)))(*X),
    "vmap(grad(vmap))": lambda T, f, s, x, X, dims: T.vmap(T.grad(mapped_sum(T, s, dims)), twice(dims))(
        *(a if dim is None else torch.stack([a, a.sin()]) for a, dim in zip(X, dims))
    ),
    "autograd of vmap(grad)": lambda T, f, s, x, X, dims: autograd_outside(T, s, X, dims),
    "vjp": lambda T, f, s, x, X, dims: T.vjp(f, x, f(*x).detach().sin()),
    "jacrev": lambda T, f, s, x, X, dims: T.jacrev(f)(*x),
    "jvp": lambda T, f, s, x, X, dims: T.jvp(f, x, cosines(x)),
    "jvp of grad": lambda T, f, s, x, X, dims: T.jvp(T.grad(s), x, cosines(x)),
    "vmap(jvp)": lambda T, f, s, x, X, dims: T.vmap(lambda *a: T.jvp(f, a, cosines(a)), dims)(*X),
    "linearize": lambda T, f, s, x, X, dims: T.linearize(f, x, cosines(x)),
    "hessian": lambda T, f, s, x, X, dims: T.hessian(lambda a: s(a, *x[1:]))(x[0]),
    "functionalize(grad)": lambda T, f, s, x, X, dims: T.functionalize(T.grad(s))(*x),
    "compile(grad)": lambda T, f, s, x, X, dims: T.compile(T.grad(s))(*x),
    "compile(vmap(grad))": lambda T, f, s, x, X, dims: T.compile(T.vmap(T.grad(s), dims))(*X),
}  # fmt: skip

# Which route each program takes. Batch norm's third order is plain torch's in eager mode too.
ROUTES = """
program                   transform  adjoint    conv2d     batch_norm
vmap                      native     native     native     native
vmap(vmap)                native     native     native     native
grad                      native     native     native     native
grad(grad)                native     native     native     native
grad(grad(grad))          native     native     native     native
vmap(grad)                native     native     native     native
vmap(grad(grad))          native     native     native     native
vmap(grad(grad(grad)))    native     native     native     native
grad(vmap)                native     native     native     native
grad(vmap(grad))          native     native     native     native
grad(grad(vmap(grad)))    native     native     native     native
vmap(grad(vmap))          native     native     native     native
autograd of vmap(grad)    native     native     native     native
vjp                       native     native     native     native
jacrev                    native     native     native     native
jvp                       reference  reference  reference  reference
jvp of grad               reference  reference  reference  reference
vmap(jvp)                 reference  reference  reference  reference
linearize                 reference  reference  reference  reference
hessian                   reference  reference  reference  reference
functionalize(grad)       reference  reference  reference  reference
compile(grad)             reference  reference  reference  reference
compile(vmap(grad))       reference  reference  reference  reference
"""
HEADER, *LINES = [[cell.strip() for cell in line.split("  ") if cell] for line in ROUTES.strip().splitlines()]
CELLS = [
    (program, column, route)
    for program, *routes in LINES
    for operator, route in zip(HEADER[1:], routes, strict=True)
    for column in COLUMNS
    if column.partition(",")[0] == operator and ("," not in column or "compile" not in program)
]


def tensors(results):
    return results if isinstance(results, tuple) else (results,)


def test_the_table_has_every_program():
    assert [line[0] for line in LINES] == list(PROGRAMS)


@pytest.mark.parametrize(("program", "name", "route"), CELLS, ids=[f"{p}-{c}" for p, c, _ in CELLS])
def test_programs_equal_loops_and_take_their_route(program, name, route):
    column = COLUMNS[name]
    one, every = operands(column)

    def run(T, function):
        scalar = lambda *X: (function(*X) + 0.3).pow(3).sum()  # noqa: E731
        return PROGRAMS[program](T, function, scalar, one, every, column.dims)

    expected = run(Loops, column.plain)
    # Under a mode nothing is compiled.
    compiled = "compile" in program
    GRAPHS.clear()
    with contextlib.nullcontext() if compiled else Seen() as seen:
        found = run(Functorch, column.ours)
    for X, Y in zip(tensors(found), tensors(expected), strict=True):
        close(X, Y)
    if compiled:
        assert GRAPHS and route == "reference" and not any("kfo_ext" in target for target in GRAPHS)
        return
    third = program.count("grad") > 2 and "batch_norm" in name
    kernel = f"kfo_ext::{column.kernels}"
    derivatives = [name for name in seen.ours() if "backward" in name or "conv2d_" in name]
    if route == "native":
        assert kernel in seen.calls
        assert third or column.reference_op not in seen.calls
        assert derivatives or (program.startswith("vmap") and "grad" not in program)
    else:
        # linearize computes the value first, under no transform.
        assert seen.ours() <= ({kernel} if program == "linearize" else set())
        assert column.reference_op in seen.calls


# A network of a convolution, batch norm + ReLU and a linear layer, and its whole meta-iteration.
SIZES = {"conv": (4, 2, 3, 3), "norm.weight": (4,), "norm.bias": (4,), "head.weight": (3, 4), "head.bias": (3,)}


def our_network(theta, x):
    """x: (images, height, width, channels)."""
    y = conv2d(x[None], theta["conv"][None], stride=2, padding=1)
    rows = batch_norm_relu(y.flatten(1, 3), theta["norm.weight"][None], theta["norm.bias"][None], eps=1e-2)
    features = rows[0].unflatten(0, y.shape[1:4]).mean((1, 2))
    return F.linear(features, theta["head.weight"], theta["head.bias"])


def plain_network(theta, x):
    y = F.conv2d(x.permute(0, 3, 1, 2), theta["conv"], stride=2, padding=1).permute(0, 2, 3, 1)
    rows = y.reshape(1, -1, 4)
    rows = plain_batch_norm(rows, theta["norm.weight"][None], theta["norm.bias"][None], relu=True)
    return F.linear(rows.reshape(y.shape).mean((1, 2)), theta["head.weight"], theta["head.bias"])


def loss_of(network):
    return lambda theta, x, y: F.cross_entropy(network(theta, x), y)


def tasks_and_theta(tasks=3, dtype=torch.float64):
    torch.manual_seed(0)
    theta = {name: torch.randn(size, dtype=dtype) for name, size in SIZES.items()}
    x = torch.randn(2, tasks, 6, 5, 5, 2, dtype=dtype)
    return theta, x, torch.randint(3, (2, tasks, 6))


class Updates(nn.Module):
    """What functional_call can call: the updates of gradients."""

    def __init__(self, kfo):
        super().__init__()
        self.kfo = kfo

    def forward(self, gradients):
        return self.kfo.transform(gradients)


def random_kfo(theta, **options):
    kfo = KFO(theta.items(), **options)
    with torch.no_grad():
        for parameter in kfo.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return kfo, {f"kfo.{name}": parameter.detach() for name, parameter in kfo.named_parameters()}


def plain_updates(kfo, phi, G):
    """R^T R g L^T L per parameter, by the shapes that KFO documents."""
    R, L = phi["kfo.layers.0.R"][0], phi["kfo.layers.0.L"][0]
    U, r, k = {}, 0, 0
    for name, g in G.items():
        B, p, q = (g.shape[0], g.shape[1], g[0, 0].numel()) if g.dim() > 2 else (1, g.shape[0], g[0].numel())
        left, right = R[r : r + p * p].reshape(p, p), L[k : k + q * q].reshape(q, q)
        U[name] = (left.mT @ left @ g.reshape(B, p, q) @ right.mT @ right).reshape(g.shape)
        r, k = r + p * p, k + q * q
    return U


def test_gradients_of_each_example_of_a_network():
    theta, x, y = tasks_and_theta()
    with Seen() as seen:
        found = torch.vmap(torch.func.grad(loss_of(our_network)), in_dims=(None, 0, 0))(theta, x[0], y[0])
    assert {"kfo_ext::conv2d", "kfo_ext::conv2d_weight", "kfo_ext::batch_norm_relu_backward"} <= seen.ours()
    assert "aten::convolution" not in seen.calls
    for i in range(x.shape[1]):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        loss_of(plain_network)(leaves, x[0, i], y[0, i]).backward()
        for name, leaf in leaves.items():
            close(found[name][i], leaf.grad)


@pytest.mark.parametrize("own", [False, True], ids=["shared_phi", "phi_per_task"])
def test_a_meta_iteration_with_kfo(own):
    """Two inner steps: the meta-gradients by theta and phi."""
    theta, x, y = tasks_and_theta()
    kfo, phi = random_kfo(theta)
    count = x.shape[1]
    if own:
        phi = {name: torch.stack([value * (1 + i / 10) for i in range(count)]) for name, value in phi.items()}

    def task_loss(theta, phi, x, y, query_x, query_y):
        for _ in range(2):
            G = torch.func.grad(loss_of(our_network))(theta, x, y)
            U = functional_call(Updates(kfo), phi, (G,))
            theta = {name: value - 0.1 * U[name] for name, value in theta.items()}
        return loss_of(our_network)(theta, query_x, query_y)

    def meta_loss(theta, phi):
        dims = (None, 0 if own else None, 0, 0, 0, 0)
        return torch.vmap(task_loss, in_dims=dims)(theta, phi, x[0], y[0], x[1], y[1]).mean()

    with Seen() as seen:
        d_theta, d_phi = torch.func.grad(meta_loss, argnums=(0, 1))(theta, phi)
    assert {"kfo_ext::transform_backward", "kfo_ext::batch_norm_relu_double_backward"} <= seen.ours()
    assert "aten::convolution" not in seen.calls
    # One call for all tasks.
    assert seen.calls["kfo_ext::conv2d"] < 4 * count + 6

    theta = {name: value.requires_grad_() for name, value in theta.items()}
    phi = {name: value.requires_grad_() for name, value in phi.items()}
    total = 0
    for i in range(count):
        fast = theta
        for _ in range(2):
            inner = loss_of(plain_network)(fast, x[0, i], y[0, i])
            gradients = torch.autograd.grad(inner, fast.values(), create_graph=True)
            mine = {name: value[i] if own else value for name, value in phi.items()}
            U = plain_updates(kfo, mine, dict(zip(fast, gradients)))
            fast = {name: value - 0.1 * U[name] for name, value in fast.items()}
        total = total + loss_of(plain_network)(fast, x[1, i], y[1, i]) / count
    expected = torch.autograd.grad(total, (*theta.values(), *phi.values()))
    for X, Y in zip((*d_theta.values(), *d_phi.values()), expected, strict=True):
        close(X, Y)


@pytest.mark.parametrize("options", [{}, {"hidden_layers": 1}, {"max_factor": 3, "bias": True}], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared_phi", "phi_per_task"])
def test_rule_under_vmap_equals_rows(options, own):
    theta, _, _ = tasks_and_theta()
    kfo, _ = random_kfo(theta, **options)
    phi = tuple(row.detach() for row in kfo.phi)
    G = torch.randn(3, 1, kfo.packing.numel, dtype=torch.float64)
    if own:
        phi = tuple(torch.stack([row, row.sin(), row.cos()]) for row in phi)
    value = lambda phi, g: kfo.rule(phi, g).pow(3).sum()  # noqa: E731
    found = torch.vmap(torch.func.grad(value, argnums=(0, 1)), in_dims=(0 if own else None, 0))(phi, G)
    for i in range(3):
        mine = [(row[i] if own else row).clone().requires_grad_() for row in phi]
        g = G[i].clone().requires_grad_()
        expected = torch.autograd.grad(value(mine, g), (*mine, g))
        for X, Y in zip((*found[0], found[1]), expected, strict=True):
            close(X[i], Y)


def test_kfo_called_with_a_loss():
    """Right where the parameters are those of a transform; otherwise the error names the other way."""
    theta, x, y = tasks_and_theta()
    kfo, phi = random_kfo(theta)
    phi = {name.removeprefix("kfo."): value for name, value in phi.items()}

    def stepped(theta, phi):
        inner = loss_of(our_network)(theta, x[0, 0], y[0, 0])
        U = functional_call(kfo, phi, (inner, theta), {"create_graph": True})
        return loss_of(our_network)({n: value - 0.1 * U[n] for n, value in theta.items()}, x[1, 0], y[1, 0])

    found = torch.func.grad(stepped, argnums=(0, 1))(theta, phi)
    leaves = [{n: value.clone().requires_grad_() for n, value in of.items()} for of in (theta, phi)]
    expected = torch.autograd.grad(stepped(*leaves), [*leaves[0].values(), *leaves[1].values()])
    for X, Y in zip((*found[0].values(), *found[1].values()), expected, strict=True):
        close(X, Y)
    with pytest.raises(ValueError, match=r"does not require a gradient; under torch\.func, call transform\(\)"):
        torch.func.grad(stepped, argnums=1)(theta, phi)
    # Leaves from outside take no part in the transform's own graph.
    with pytest.raises(ValueError, match=r"the loss does not depend on it|it has no graph"):
        torch.func.grad(lambda phi: stepped(leaves[0], phi))(phi)


# What a mapped dimension may be, and where the operands come from.


def test_bad_mapped_dimensions_are_named():
    (G, R, L), (Gs, _, _) = operands(COLUMNS["transform"])
    f = lambda G, R, L: transform(R, G, L, PROBLEMS)  # noqa: E731
    with pytest.raises(ValueError, match=r"same size in the mapped dimension, got sizes \[3, 4\]"):
        torch.vmap(f, in_dims=(0, 0, None))(Gs, R.expand(4, *R.shape), L)
    with pytest.raises(ValueError, match="transform: R has 5 rows, but G has 2 tasks: expected 1 or that many"):
        torch.vmap(f, in_dims=(0, None, None))(Gs, R.expand(5, -1), L)
    with pytest.raises(ValueError, match="adjoint: L has 5 rows, but G has 2 tasks"):
        torch.vmap(lambda g: adjoint(R, g, L.expand(5, -1), PROBLEMS))(Gs)
    x, w = operands(COLUMNS["conv2d"])[0]
    with pytest.raises(ValueError, match="weight: expected 2 tasks as x has, got 1"):
        torch.vmap(lambda x: conv2d(x, w[:1]))(torch.stack([x, x]))
    with pytest.raises(ValueError, match=r"G: expected 2 dimensions \(tasks, elements\)"):
        torch.vmap(f, in_dims=(0, None, None))(G, R, L)


@pytest.mark.parametrize("name", COLUMNS)
def test_no_examples(name):
    """A mapped dimension of size 0: results of no examples, and gradients of what they share are zeros."""
    column = COLUMNS[name]
    X = [x if dim is None else x.narrow(dim, 0, 0) for x, dim in zip(operands(column)[1], column.dims)]
    one = column.ours(*operands(column)[0])
    assert torch.vmap(column.ours, in_dims=column.dims)(*X).shape == (0, *one.shape)
    scalar = lambda *P: column.ours(*P).square().sum()  # noqa: E731
    each = torch.vmap(torch.func.grad(scalar, argnums=tuple(range(len(X)))), in_dims=column.dims)(*X)
    assert [tuple(g.shape) for g in each] == [(0, *size) for size in column.sizes]
    total = torch.func.grad(lambda *P: torch.vmap(scalar, in_dims=column.dims)(*P).sum(), argnums=tuple(range(len(X))))
    assert all(g.shape == x.shape and not g.any() for g, x in zip(total(*X), X, strict=True))


@pytest.mark.parametrize("name", COLUMNS)
def test_any_strides_and_no_grad(name):
    column = COLUMNS[name]
    _, X = operands(column)
    scalar = lambda *P: column.ours(*P).pow(3).sum()  # noqa: E731
    gradients = torch.vmap(torch.func.grad(scalar, argnums=tuple(range(len(X)))), in_dims=column.dims)
    expected = gradients(*X)
    strided = [x.mT.contiguous().mT.repeat_interleave(2, -1)[..., ::2] for x in X]
    with torch.no_grad():
        for found in (gradients(*strided), gradients(*(x.requires_grad_() for x in strided))):
            for Y, Z in zip(found, expected, strict=True):
                close(Y, Z)
                assert not Y.requires_grad
    constant = lambda *P: torch.no_grad()(column.ours)(*P).sum() + P[0].sum()  # noqa: E731
    assert torch.equal(
        torch.func.grad(constant)(*operands(column)[0]), torch.ones(column.sizes[0], dtype=torch.float64)
    )


@pytest.mark.parametrize("name", ["transform", "conv2d", "batch_norm"])
def test_float32_half_types_and_autocast(name):
    column = COLUMNS[name]
    X = [x.float() for x in operands(column)[1]]
    scalar = lambda *P: column.ours(*P).float().square().sum()  # noqa: E731
    each = torch.vmap(torch.func.grad(scalar, argnums=tuple(range(len(X)))), in_dims=column.dims)

    def loop(*P):
        return Loops.vmap(Loops.grad(scalar), column.dims)(*P)

    for Y, Z in zip(each(*X), loop(*X), strict=True):
        torch.testing.assert_close(Y, Z, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = each(*X), loop(*X)
    for Y, Z in zip(found, expected, strict=True):
        assert Y.dtype == torch.float32
        torch.testing.assert_close(Y, Z, rtol=0.05, atol=0.05)
    half = [x.bfloat16() for x in X]
    for Y, Z in zip(each(*half), loop(*half), strict=True):
        assert Y.dtype == torch.bfloat16
        torch.testing.assert_close(Y, Z, rtol=0.02, atol=0.02)
    with pytest.raises(TypeError, match=r"expected torch\.float32 as"):
        each(X[0], *(x.double() for x in X[1:]))


def test_a_shared_factor_is_one_row_for_all_examples():
    """vmap hands it to the operator as it is; the rows of each example are made where each has its own gradient."""
    _, (G, R, L) = operands(COLUMNS["transform"])
    rows = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "kfo_ext":
                rows.append((func.name(), len(args[0]), len(args[2])))
            return func(*args, **(kwargs or {}))

    f = lambda G, R, L: transform(R, G, L, PROBLEMS).square().sum()  # noqa: E731
    with Rows():
        torch.func.grad(lambda *X: torch.vmap(f, in_dims=(0, None, None))(*X).sum(), argnums=(0, 1, 2))(G, R, L)
        torch.vmap(torch.func.grad(f), in_dims=(0, None, None))(G, R, L)
        torch.vmap(torch.func.grad(f, argnums=1), in_dims=(0, None, None))(G, R, L)
    together, backward = "kfo_ext::transform", "kfo_ext::transform_backward"
    assert rows == [
        *((together, 1, 1), (backward, 1, 1)) * 2,
        (together, 1, 1),
        (backward, EXAMPLES * TASKS, 1),
    ]


def test_batched_cotangents_of_a_graph_made_outside():
    """vmap over torch.autograd.grad, a Jacobian row by row."""
    for column in COLUMNS.values():
        X = [x.requires_grad_() for x in operands(column)[0]]
        y = column.ours(*X)
        rows = torch.randn(4, *y.shape, dtype=torch.float64)
        pull = lambda dy: torch.autograd.grad(y, X, dy, retain_graph=True)  # noqa: B023, E731
        with Seen() as seen:
            found = torch.vmap(pull)(rows)
        assert seen.ours()
        for X_i, Y in zip(found, Loops.vmap(pull, (0,))(rows), strict=True):
            close(X_i, Y)


def test_forward_mode_over_a_pullback_made_outside_is_refused():
    (G, R, L), _ = operands(COLUMNS["transform"])
    _, pull = torch.func.vjp(lambda G: transform(R, G, L, PROBLEMS), G)
    with pytest.raises(NotImplementedError, match=r"call kfo_ext\.transform inside them"):
        torch.func.jvp(pull, (G,), (G,))


@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
def test_the_benchmark_in_small(tmp_path, monkeypatch):
    small = meta_case.Network(2, in_channels=1, image_size=8, stride=2, hidden=4, ways=3)
    monkeypatch.setitem(meta_case.NETWORKS, "omniglot_cnn2", small)
    out = tmp_path / "torch_func.json"
    assert bench_torch_func.main(["--tasks", "2", "--steps", "2", "--repeats", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["contender"], row["status"]) for row in rows] == [
        (method, program, "ok") for method in meta_case.METHODS for program in bench_torch_func.PROGRAMS
    ]
    assert all(row["speed_up"] > 0 for row in rows if row["contender"] == bench_torch_func.OURS)


def test_second_derivatives_of_a_mapped_gradient_from_outside():
    """Where torch 2.13's own batch norm is wrong: autograd over vmap(grad(...)), by a convolution in front of it."""
    generator = torch.Generator().manual_seed(0)
    x, kernels, scales, weights = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((3, 6, 4, 5, 5), (3, 4, 4, 3, 3), (3, 4), (4,))
    )
    kernels, scales = kernels.requires_grad_(), scales.requires_grad_()

    def loss(parameters, x):
        kernel, scale = parameters
        rows = torch.nn.functional.conv2d(x, kernel).movedim(1, -1).reshape(1, -1, 4)
        y = batch_norm_relu(rows, scale[None], torch.zeros_like(scale)[None])
        return (y[0].square().mean(0) * weights).sum()

    mapped = torch.func.vmap(torch.func.grad(loss))((kernels, scales), x)
    found = torch.autograd.grad(sum(G.square().sum() for G in mapped), (kernels, scales))
    for i in range(3):
        own = (kernels[i].detach().requires_grad_(), scales[i].detach().requires_grad_())
        rows = torch.nn.functional.conv2d(x[i], own[0]).movedim(1, -1).reshape(-1, 4)
        z = (rows - rows.mean(0)) * (rows.var(0, unbiased=False) + 1e-5).rsqrt() * own[1]
        value = (z.relu().square().mean(0) * weights).sum()
        first = torch.autograd.grad(value, own, create_graph=True)
        second = torch.autograd.grad(sum(G.square().sum() for G in first), own)
        for ours, truth in zip((*mapped, *found), (*first, *second)):
            torch.testing.assert_close(ours[i], truth, rtol=1e-10, atol=1e-10)
