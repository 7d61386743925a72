"""The implementations of the orders, by name: kfo_ext, learn2learn's loop, plain torch and JAX.

A provider takes a case and returns its orders; LeftOut gives the reason why it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kfo_ext.bench.cases import ORDERS, Case, Form, Leaves, packed_leaves, parameter_leaves
from kfo_ext.bench.formulas import torch_formulas, torch_formulas_compiled
from kfo_ext.bench.jax_orders import jax_missing, jax_vmap, packed_from_jax
from kfo_ext.bench.orders import (
    LeftOut,
    Orders,
    Outputs,
    Transform,
    as_matrices,
    composed,
    matmul,
    packed_already,
    packed_by_parameter,
    packed_by_task,
    plain_alone,
    task_after_task,
    through_autograd,
)
from kfo_ext.functional import transform
from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import
from kfo_ext.ops.transform.op import OPERATOR
from kfo_ext.testing import family_of, run_order
from kfo_ext.updates import KFO

# The explicit matrix of a problem has (p q)^2 elements, for every task.
KRON_SIZE = 512


def kfo_packed(case: Case, backend: str = "native") -> Orders:
    """Compute the orders by the ops on packed operands if they are the whole update, else as `kfo_rule`.

    Args:
        case: the packed operands.
        backend: of the ops.

    Returns:
        A call per order.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it does not run on the operands' device.
    """
    if backend == "reference" or not case.plain:
        return kfo_rule(case, backend)
    family, flat, operands = family_of(backend, case.G.device), case.problems.flat, case.operands

    def run(order: str) -> Outputs:
        outputs = run_order(family, order, operands, flat)
        if order == "forward":
            return list(outputs)
        dR, dG, dL, *ddY = outputs
        return [dR, dL, dG, *ddY]

    return {order: partial(run, order) for order in ORDERS}


def kfo_rule(case: Case, backend: str = "native") -> Orders:
    """Compute the orders by `KFO.rule` on packed operands, with derivatives through autograd.

    Args:
        case: the packed operands.
        backend: of the ops.

    Returns:
        A call per order.

    Raises:
        RuntimeError: the backend does not run on the operands' device.
    """
    OPERATOR.resolve(backend, case.G.device)
    parameters = [
        torch.empty(shape, dtype=case.G.dtype, device=case.G.device) for shape in case.problems.packing.shapes
    ]
    kfo = KFO(parameters, psd=case.psd, bias=False, hidden_layers=case.hidden, backend=backend)
    return through_autograd(
        lambda phi, G: [kfo.rule(tuple(X for form in phi for X in form), G[0])], packed_leaves(case)
    )  # fmt: skip


def kfo_gradients_on(case: Case) -> Orders:
    """Compute the orders by the public transform on packed operands; every order can be differentiated again.

    Args:
        case: the packed operands.

    Returns:
        A call per order.

    Raises:
        LeftOut: the case is not the plain transform.
    """
    plain_alone(case)
    return through_autograd(
        lambda phi, G: [transform(phi[0][0], G[0], phi[1][0], case.problems)], packed_leaves(case), create_graph=True
    )


def kfo_lists(case: Case) -> Orders:
    """The ops of kfo_ext, lists in and lists out: packing and unpacking included, derivatives through autograd."""
    problems = case.problems

    def layer(R: Form, G: Form, L: Form) -> Form:
        Y = transform(problems.R.pack(R), problems.packing.pack(G), problems.L.pack(L), problems)
        return problems.packing.unpack(Y)

    return through_autograd(composed(layer, case.psd), parameter_leaves(case))


def kfo_gradient_lists(case: Case) -> Orders:
    """Compute the orders as `KFO.transform`: gradients in lists, the factors packed; derivatives through autograd.

    Args:
        case: the packed operands.

    Returns:
        A call per order.

    Raises:
        LeftOut: the case is not the plain transform.
    """
    plain_alone(case)
    problems, factors = case.problems, packed_leaves(case)

    def layer(R: Form, G: Form, L: Form) -> Form:
        return problems.packing.unpack(transform(R[0], problems.packing.pack(G), L[0], problems))

    leaves = parameter_leaves(case)._replace(phi=factors.phi, ddphi=factors.ddphi)
    return through_autograd(composed(layer, False), leaves)


def packed_gradients(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs if those of the factors are packed already."""
    factors = 0 if order == "forward" else len(case.phi)
    count = len(case.problems)
    flat = [X.reshape(len(X), -1) for X in outputs[factors:]]
    return [*outputs[:factors], *(torch.cat(flat[i : i + count], 1) for i in range(0, len(flat), count))]


def einsum(R: Form, G: Form, L: Form) -> Form:
    """Layer after layer, one einsum each."""
    return [torch.einsum("...ki,...bkl,...lj->...bij", X, g, Z) for X, g, Z in zip(R, G, L, strict=True)]


def kron(R: Form, G: Form, L: Form) -> Form:
    """Apply each layer of one task by its full matrix.

    vec(R^T g L) = kron(R^T, L^T) vec(g)

    Args:
        R: (p, p) per parameter.
        G: the gradients, one per parameter.
        L: (q, q) per parameter.

    Returns:
        The updates, one per parameter.
    """
    return [
        (g.flatten(1) @ torch.kron(X.mT.contiguous(), Z.mT.contiguous()).mT).view_as(g)
        for X, g, Z in zip(R, G, L, strict=True)
    ]


def torch_batched(case: Case, layer: Transform, wrap: Callable[[Callable], Callable] = lambda rule: rule) -> Orders:
    """Plain torch, layer after layer, each batched over tasks."""
    return through_autograd(wrap(composed(layer, case.psd)), as_matrices(parameter_leaves(case), case))


def torch_loop(case: Case, layer: Transform) -> Orders:
    """Plain torch, task after task and layer after layer."""
    rule = composed(layer, case.psd)
    return task_after_task(lambda leaves: through_autograd(rule, as_matrices(leaves, case)), case)


def torch_kron(case: Case) -> Orders:
    """Compute the orders task after task and layer after layer, by explicit Kronecker products.

    Args:
        case: the packed operands.

    Returns:
        A call per order.

    Raises:
        LeftOut: a product would be too large.
    """
    widest = max(p * q for _, p, q in case.problems.shapes)
    if widest > KRON_SIZE:
        raise LeftOut(f"a matrix of {widest} x {widest} per task, more than {KRON_SIZE}")
    return torch_loop(case, kron)


def torch_compiled(case: Case) -> Orders:
    """The whole update through torch.compile, batched over tasks; torch has no double backward through it."""
    torch.compiler.reset()
    return torch_batched(case, matmul, lambda rule: torch.compile(rule, fullgraph=True, dynamic=False))


def learn2learn_loop(case: Case) -> Orders:
    """Compute the orders by learn2learn's modules, task after task and layer after layer, as in its `ParameterUpdate`.

    Args:
        case: the packed operands.

    Returns:
        A call per order.

    Raises:
        ImportError: learn2learn is not installed.
        LeftOut: the update has hidden layers, which learn2learn does not support.
    """
    if case.hidden:
        raise LeftOut("learn2learn has no Kronecker update with hidden layers")
    return task_after_task(lambda leaves: _learn2learn_task(leaves, case.psd), case)


def _learn2learn_task(leaves: Leaves, psd: bool) -> Orders:
    l2l = light_import()
    kronecker = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=psd)
    update = l2l.optim.ParameterUpdate(leaves.G, kronecker).to(leaves.G[0])
    kronecker_factors_to(update, zip(*leaves.phi, strict=True))
    modules = update.transforms_modules
    # learn2learn's factors are parameters of its modules, so they are the leaves to differentiate by.
    factors = [(module.transform.left, module.transform.right) for module in modules]
    left, right = ([pair[i] for pair in factors] for i in range(2))
    cotangents = [kronecker_factors(X, X, psd=psd)[0] for X in leaves.ddphi[0]]
    leaves = leaves._replace(ddphi=[cotangents, leaves.ddphi[1]])
    return through_autograd(
        lambda phi, G: [module(g) for module, g in zip(modules, G, strict=True)], leaves, phi=[left, right]
    )


def packed_learn2learn(order: str, outputs: Outputs, case: Case) -> list[Tensor]:
    """The packed outputs of learn2learn's loop; without psd its left factor is R^T."""
    if order != "forward" and not case.psd:
        parameters = len(case.problems)
        count = parameters * (len(case.phi) + {"backward": 1, "double_backward": 2}[order])
        outputs = [X.mT if i % count < parameters else X for i, X in enumerate(outputs)]
    return packed_by_task(order, outputs, case)


def _no_learn2learn(device: torch.device) -> None:
    light_import()


class Provider(NamedTuple):
    """An implementation of the orders, with what makes its outputs comparable.

    Attributes:
        make: returns the orders of a case; raises LeftOut if it does not apply to that case.
        pack: (order, outputs, case) -> the outputs as packed (tasks, n) tensors: dphi, dG, ddY.
        check: raises ImportError or RuntimeError if it cannot run on a device at all.
        ours: whether a wrong number is a failure of this package.
        compiled: whether compiling it takes far longer than timing it.
        streams: whether it issues its work on torch's streams (else it is timed by the wall clock everywhere).
        graph: whether to capture it in a CUDA graph.
        saves: whether the derivatives of a plain case read intermediates that the previous order saved besides
            operands.
    """

    make: Callable[[Case], Orders]
    pack: Callable[[str, Outputs, Case], list[Tensor]] = packed_by_parameter
    check: Callable[[torch.device], object] = lambda device: None
    ours: bool = False
    compiled: bool = False
    streams: bool = True
    graph: bool = True
    saves: bool = True

    def reads_saved(self, order: str, case: Case) -> bool:
        """Whether an order computes less than the cost model counts, since it reads what earlier orders saved."""
        # One op of kfo_ext saves only its operands, but a sequence of them also saves the intermediates.
        return order != "forward" and (self.saves or (self.ours and not case.plain))


def _ours(
    make: Callable[[Case], Orders], backend: str, pack: Callable = packed_already, saves: bool = False
) -> Provider:
    return Provider(make, pack, check=lambda device: OPERATOR.resolve(backend, device), ours=True, saves=saves)


PROVIDERS: dict[str, Provider] = {
    "native": _ours(kfo_packed, "native"),
    "lists": _ours(kfo_lists, "auto", packed_by_parameter, saves=True),
    "gradient-lists": _ours(kfo_gradient_lists, "auto", packed_gradients, saves=True),
    "gradients-on": _ours(kfo_gradients_on, "auto"),
    "reference": _ours(lambda case: kfo_packed(case, "reference"), "reference", saves=True),
    "triton": _ours(lambda case: kfo_packed(case, "triton"), "triton"),
    "learn2learn": Provider(learn2learn_loop, packed_learn2learn, check=_no_learn2learn, graph=False),
    "torch-loop-matmul": Provider(lambda case: torch_loop(case, matmul), packed_by_task, graph=False),
    "torch-loop-einsum": Provider(lambda case: torch_loop(case, einsum), packed_by_task, graph=False),
    "torch-matmul": Provider(lambda case: torch_batched(case, matmul)),
    "torch-einsum": Provider(lambda case: torch_batched(case, einsum)),
    "torch-formulas": Provider(torch_formulas, saves=False),
    "torch-compile": Provider(torch_compiled, compiled=True),
    "torch-formulas-compile": Provider(torch_formulas_compiled, compiled=True, saves=False),
    "torch-kron": Provider(torch_kron, packed_by_task, graph=False),
    "jax": Provider(
        jax_vmap, packed_from_jax, check=jax_missing, compiled=True, streams=False, graph=False, saves=False
    ),
}
