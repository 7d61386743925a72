"""The operators `kfo_ext::transform*_triton`: schemas, checks, and launches of the kernels of `kernels`.

Importing this touches neither triton nor a driver; the first call does. The operators run on CUDA tensors, and on CPU
tensors in Triton's interpreter (TRITON_INTERPRET=1 in the environment before kfo_ext and triton are imported).

Launches of one call: one for all small problems and all tasks, two in a double backward; for each larger problem a
sequence of tiled products (two, five or nine) over scratch of the size of its G; one that adds the partial dR and dL,
where there are any. All scratch of a call is one allocation.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kfo_ext.ops import triton_support
from kfo_ext.ops.transform.checks import check
from kfo_ext.ops.transform.triton.options import SUM_ROWS, group_options, product_options, sum_options
from kfo_ext.ops.transform.triton.outputs import FORMS, PLAIN, Terms, double_backward_terms, packed, wanted_outputs
from kfo_ext.ops.transform.triton.plan import SUM_COLUMNS, Part, Plan, plan_of

_SCHEMAS = (
    "transform_triton(Tensor R, Tensor G, Tensor L, int[] shapes, Tensor? bias=None) -> Tensor",
    "transform_backward_triton(Tensor R, Tensor G, Tensor L, Tensor dY, int[] shapes, bool[] need)"
    " -> (Tensor, Tensor, Tensor)",
    "transform_double_backward_triton(Tensor R, Tensor G, Tensor L, Tensor dY, Tensor? ddR, Tensor? ddG, Tensor? ddL,"
    " int[] shapes, bool[] need) -> (Tensor, Tensor, Tensor, Tensor)",
)


@cache
def _kernels() -> ModuleType:
    kernels = importlib.import_module("kfo_ext.ops.transform.triton.kernels")
    if hasattr(kernels.sum_kernel, "cache_key") == triton_support.INTERPRETED:
        raise RuntimeError(
            "backend 'triton': TRITON_INTERPRET changed after kfo_ext was imported: set it before Python starts"
        )
    return kernels


def _require(device: torch.device) -> ModuleType:
    if not triton_support.available(device):
        raise RuntimeError(f"backend 'triton' does not run on {device.type}: {triton_support.reason(device.type)}")
    return _kernels()


def _rows(X: Tensor) -> Tensor:
    """X with contiguous rows: itself, whatever its row stride, or a copy."""
    return X if X.shape[1] <= 1 or X.stride(1) == 1 else X.contiguous()


def _step(X: Tensor) -> int:
    """Elements from task to task; one row is shared by all."""
    return 0 if X.shape[0] == 1 else X.stride(0)


class _Launch:
    """One call of an order: its plan, its tasks, and the launches."""

    def __init__(self, kernels: ModuleType, plan: Plan, G: Tensor, tasks: int) -> None:
        self.kernels = kernels
        self.plan = plan
        self.tasks = tasks
        self.like = G
        self.work_for_none = tasks == 0 or plan.G == 0

    def out(self, needed: bool, rows: int, columns: int) -> Tensor:
        """Allocate (rows, columns), or (0,) if not needed; without tasks the gradient of a shared factor is zero."""
        shape = (rows, columns) if needed else (0,)
        return self.like.new_zeros(shape) if self.tasks == 0 else self.like.new_empty(shape)

    def reserve(self, gradients: Sequence[tuple[Tensor, bool, int]], matrices: int) -> tuple[Tensor, ...]:
        """Allocate the scratch of the call.

        Args:
            gradients: each of dR and dL, whether it is needed, and the columns of its partial sums.
            matrices: how many operands of the size of a large problem's G its products keep at most.

        Returns:
            What the kernels write for each gradient: the gradient, or scratch (tasks, columns) that `add` sums.
        """
        own = [not needed or (self.plan.single and X.shape[0] == self.tasks) for X, needed, _ in gradients]
        partial = sum(columns for (_, _, columns), kept in zip(gradients, own) if not kept)
        largest = max((part.B * part.p * part.q for part in self.plan.large), default=0)
        size = self.tasks * (partial + matrices * largest)
        self.memory = self.like.new_empty(size) if size else self.like
        self.used = 0
        places = [X if kept else self.take(columns) for (X, _, columns), kept in zip(gradients, own)]
        self.kept = self.used
        return tuple(places)

    def take(self, columns: int) -> Tensor:
        """Take the next (tasks, columns) of the scratch."""
        start, self.used = self.used, self.used + self.tasks * columns
        return self.memory[start : self.used].view(self.tasks, columns)

    def large(self) -> Iterator[Part]:
        """Yield the large problems; each reuses the scratch of the previous one, whose kernels run first."""
        for part in self.plan.large:
            self.used = self.kept
            yield part

    def group(
        self,
        operands: Sequence[Tensor],
        outputs: Sequence[Tensor],
        terms: Sequence[Terms | None],
        bias: Tensor | None = None,
    ) -> None:
        """Compute outputs of every small problem, in one launch for each compilation of `form_kernel`.

        Args:
            operands: R, G, L, dY, ddR, ddG and ddL.
            outputs: for the slots of R, G, L and Y.
            terms: the terms of each output, or None if it is not needed.
            bias: (tasks or 1, sum of p*q), or None.
        """
        plan = self.plan
        if not plan.work_rows:
            return
        wanted = wanted_outputs(terms)
        tensors = (*operands, operands[1] if bias is None else bias, *outputs)
        # An output that is not wanted has no rows to step over.
        steps = [_step(X) if X.dim() == 2 else 0 for X in tensors]
        for slots in FORMS:
            own = [output for output in wanted if output[0] in slots]
            if own:
                self.kernels.form_kernel[(plan.work_rows * self.tasks, len(own))](
                    plan.work(self.like.device), *tensors, *steps,
                    plan.work_rows, packed(own), int(bias is not None),
                    SLOTS=slots, CLASSES=plan.classes, **group_options(plan.classes),
                )  # fmt: skip

    def scratch(self, part: Part) -> Tensor:
        """Take scratch of the size of a problem's G: (tasks, B*p*q)."""
        return self.take(part.B * part.p * part.q)

    def product(
        self,
        C: Tensor,
        sizes: tuple[int, int, int],
        terms: Sequence[tuple[Tensor, Tensor]],
        part: Part,
        *,
        turned: tuple[bool, bool] = (False, False),
        bias: Tensor | None = None,
        over_B: bool = False,
    ) -> None:
        """Compute C = sum of op(A) op(B) over one or two terms (+ bias), per matrix or summed over each chunk of B.

        Args:
            C: (tasks, matrices or chunks, m*n), dense rows.
            sizes: m, n and k.
            terms: pairs of (tasks or 1, elements), a factor or the B matrices of a problem.
            part: the problem.
            turned: whether the first and the second operand are transposed.
            bias: (tasks or 1, m*n).
            over_B: whether to sum over the matrices of a chunk.
        """
        m, n, k = sizes
        (A, B), (A2, B2) = terms[0], terms[-1]
        stored = (m * k, k * n, m * k, k * n)
        operands = (A, B, A2, B2)
        # A tensor that holds one matrix per task is a factor, or the only matrix: either way it has no step over B.
        matrix_steps = [size if X.shape[1] > size else 0 for X, size in zip(operands, stored)]
        chunk, chunks = (part.chunk, part.chunks) if over_B else (1, part.B)
        options = product_options(m, n, self.like.dtype)
        tiles = -(-m // options["BM"]) * -(-n // options["BN"])
        bias_or_C = C if bias is None else bias
        self.kernels.product_kernel[(tiles * chunks * self.tasks,)](
            *operands, bias_or_C, C, *map(_step, operands), _step(bias_or_C), _step(C), *matrix_steps, m * n,
            m, n, k, part.B, chunk, chunks,
            HAS_2=len(terms) > 1, HAS_BIAS=bias is not None, TRANS_A=turned[0], TRANS_B=turned[1], **options,
        )  # fmt: skip

    def add(self, part_R: Tensor, part_L: Tensor, dR: Tensor, dL: Tensor) -> None:
        """Add partial sums, as `reserve` placed them, into dR and dL, unless the kernels wrote these themselves."""
        sum_R, sum_L = part_R is not dR, part_L is not dL
        if not (sum_R or sum_L):
            return
        table = self.plan.sums(self.like.device, sum_R, sum_L)
        steps = [_step(X) if X.dim() == 2 else 0 for X in (part_R, part_L, dR, dL)]
        self.kernels.sum_kernel[(table.shape[0] * self.tasks,)](
            table, part_R, part_L, dR, dL, *steps, table.shape[0], self.tasks,
            SHARED_R=sum_R and dR.shape[0] != self.tasks, SHARED_L=sum_L and dL.shape[0] != self.tasks,
            ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, **sum_options(),
        )  # fmt: skip


def _cut(X: Tensor, start: int, count: int) -> Tensor:
    return X.narrow(1, start, count)


def _factors(part: Part, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    return _cut(R, part.R, part.p**2), _cut(L, part.L, part.q**2)


def _matrices(part: Part, X: Tensor) -> Tensor:
    return _cut(X, part.G, part.B * part.p * part.q)


def _partials(part: Part, part_R: Tensor, part_L: Tensor, need_R: bool, need_L: bool) -> tuple[Tensor, Tensor]:
    dR = _cut(part_R, part.part_R, part.chunks * part.p**2) if need_R else part_R
    dL = _cut(part_L, part.part_L, part.chunks * part.q**2) if need_L else part_L
    return dR, dL


def transform(R: Tensor, G: Tensor, L: Tensor, shapes: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """Y = R^T G L (+ bias): the operator `transform_triton`.

    Args:
        R: (tasks or 1, sum of p*p).
        G: (tasks, sum of B*p*q).
        L: (tasks or 1, sum of q*q).
        shapes: flat (B, p, q) triples.
        bias: (tasks or 1, sum of p*q), added to each of the B matrices, or None.

    Returns:
        Y: (tasks, sum of B*p*q).
    """
    kernels, plan = _require(G.device), plan_of(shapes)
    tasks = check("transform_triton", plan.columns, R, G, L, bias=bias)
    launch = _Launch(kernels, plan, G, tasks)
    Y = launch.out(True, tasks, plan.G)
    if launch.work_for_none:
        return Y
    R, G, L = _rows(R), _rows(G), _rows(L)
    bias = None if bias is None else _rows(bias)
    launch.reserve((), matrices=1)
    with torch.cuda.device_of(G):
        launch.group((R, G, L, G, R, G, L), (Y, Y, Y, Y), (None, None, None, PLAIN), bias)
        for part in launch.large():
            p, q = part.p, part.q
            R_i, L_i = _factors(part, R, L)
            G_i, Y_i = _matrices(part, G), _matrices(part, Y)
            N = launch.scratch(part)
            launch.product(N, (p, q, q), [(G_i, L_i)], part)
            bias_i = None if bias is None else _cut(bias, part.bias, p * q)
            launch.product(Y_i, (p, q, p), [(R_i, N)], part, turned=(True, False), bias=bias_i)
    return Y


def backward(
    R: Tensor, G: Tensor, L: Tensor, dY: Tensor, shapes: Sequence[int], need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <transform(R, G, L), dY>: the operator `transform_backward_triton`.

    Operands as for `transform`, and dY (tasks, sum of B*p*q); need says which of dR, dG and dL are needed.

    Returns:
        dR, dG and dL, of their operands' shapes; (0,) where not needed.
    """
    kernels, plan = _require(G.device), plan_of(shapes)
    tasks = check("transform_backward_triton", plan.columns, R, G, L, dY=dY, need=(need, 3))
    need_R, need_G, need_L = need
    launch = _Launch(kernels, plan, G, tasks)
    dR = launch.out(need_R, R.shape[0], plan.R)
    dG = launch.out(need_G, tasks, plan.G)
    dL = launch.out(need_L, L.shape[0], plan.L)
    if launch.work_for_none or not any(need):
        return dR, dG, dL
    R, G, L, dY = (_rows(X) for X in (R, G, L, dY))
    part_R, part_L = launch.reserve(((dR, need_R, plan.part_R), (dL, need_L, plan.part_L)), matrices=2)
    with torch.cuda.device_of(G):
        terms = [PLAIN if needed else None for needed in need]
        launch.group((R, G, L, dY, R, G, L), (part_R, dG, part_L, dG), terms)
        for part in launch.large():
            p, q = part.p, part.q
            R_i, L_i = _factors(part, R, L)
            G_i, dY_i = _matrices(part, G), _matrices(part, dY)
            dR_i, dL_i = _partials(part, part_R, part_L, need_R, need_L)
            if need_G or need_L:
                M = launch.scratch(part)
                launch.product(M, (p, q, p), [(R_i, dY_i)], part)
            if need_G:
                launch.product(_matrices(part, dG), (p, q, q), [(M, L_i)], part, turned=(False, True))
            if need_R:
                N = launch.scratch(part)
                launch.product(N, (p, q, q), [(G_i, L_i)], part)
                launch.product(dR_i, (p, p, q), [(N, dY_i)], part, turned=(False, True), over_B=True)
            if need_L:
                launch.product(dL_i, (q, q, p), [(G_i, M)], part, turned=(True, False), over_B=True)
        launch.add(part_R, part_L, dR, dL)
    return dR, dG, dL


def double_backward(
    R: Tensor,
    G: Tensor,
    L: Tensor,
    dY: Tensor,
    ddR: Tensor | None,
    ddG: Tensor | None,
    ddL: Tensor | None,
    shapes: Sequence[int],
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <backward(R, G, L, dY), (ddR, ddG, ddL)>: the operator `transform_double_backward_triton`.

    Operands as for `backward`, and the cotangents ddR, ddG and ddL of its outputs; None is zero. need says which of dR,
    dG, dL and ddY are needed.

    Returns:
        dR, dG, dL and ddY, of the shapes of R, G, L and dY; (0,) where not needed.
    """
    kernels, plan = _require(G.device), plan_of(shapes)
    tasks = check(
        "transform_double_backward_triton", plan.columns, R, G, L, dY=dY, ddR=ddR, ddG=ddG, ddL=ddL, need=(need, 4)
    )
    need_R, need_G, need_L, need_Y = need
    launch = _Launch(kernels, plan, G, tasks)
    dR = launch.out(need_R, R.shape[0], plan.R)
    dG = launch.out(need_G, tasks, plan.G)
    dL = launch.out(need_L, L.shape[0], plan.L)
    ddY = launch.out(need_Y, tasks, plan.G)
    if launch.work_for_none or not any(need):
        return dR, dG, dL, ddY
    R, G, L, dY = (_rows(X) for X in (R, G, L, dY))
    ddR, ddG, ddL = (None if X is None else _rows(X) for X in (ddR, ddG, ddL))
    part_R, part_L = launch.reserve(((dR, need_R, plan.part_R), (dL, need_L, plan.part_L)), matrices=4)
    has = [X is not None for X in (ddR, ddG, ddL)]
    # The kernels never read the operand that stands in for an absent one.
    present = [X if dd is None else dd for X, dd in zip((R, G, L), (ddR, ddG, ddL))]
    with torch.cuda.device_of(G):
        operands, outputs = (R, G, L, dY, *present), (part_R, dG, part_L, ddY)
        launch.group(operands, outputs, double_backward_terms(has, need))
        for part in launch.large():
            _large_double_backward(launch, part, operands, outputs, has, need)
        launch.add(part_R, part_L, dR, dL)
    return dR, dG, dL, ddY


def _large_double_backward(
    launch: _Launch,
    part: Part,
    operands: Sequence[Tensor],
    outputs: Sequence[Tensor],
    has: Sequence[bool],
    need: Sequence[bool],
) -> None:
    """Compute one large problem of `double_backward` by products; operands and outputs as for `_Launch.group`."""
    R, G, L, dY, ddR, ddG, ddL = operands
    part_R, dG, part_L, ddY = outputs
    has_R, has_G, has_L = has
    need_R, need_G, need_L, need_Y = need
    p, q = part.p, part.q
    R_i, L_i = _factors(part, R, L)
    ddR_i, ddL_i = _factors(part, ddR, ddL)
    G_i, dY_i, ddG_i = (_matrices(part, X) for X in (G, dY, ddG))
    dR_i, dL_i = _partials(part, part_R, part_L, need_R, need_L)

    def matrices(sizes: tuple[int, int, int], *terms: tuple[Tensor, Tensor]) -> Tensor:
        out = launch.scratch(part)
        launch.product(out, sizes, terms, part)
        return out

    def write(
        out: Tensor, sizes: tuple[int, int, int], terms: list[Any], turned: tuple[bool, bool], over_B: bool
    ) -> None:
        if terms:
            launch.product(out, sizes, terms, part, turned=turned, over_B=over_B)
        else:
            out.zero_()

    terms: list[tuple[Any, Any]]
    S = matrices((p, q, p), (ddR_i, dY_i)) if has_R and (need_G or need_L) else None
    M = matrices((p, q, p), (R_i, dY_i)) if (has_L and need_G) or (has_G and need_L) else None
    if need_G:
        terms = [(S, L_i)] * has_R + [(M, ddL_i)] * has_L
        write(_matrices(part, dG), (p, q, q), terms, (False, True), False)
    if need_L:
        terms = [(G_i, S)] * has_R + [(ddG_i, M)] * has_G
        write(dL_i, (q, q, p), terms, (True, False), True)
    K_terms = [(ddG_i, L_i)] * has_G + [(G_i, ddL_i)] * has_L
    K = matrices((p, q, q), *K_terms) if K_terms and (need_R or need_Y) else None
    if need_R:
        write(dR_i, (p, p, q), [(K, dY_i)] * (K is not None), (False, True), True)
    if need_Y:
        N = matrices((p, q, q), (G_i, L_i)) if has_R else None
        terms = [(ddR_i, N)] * has_R + [(R_i, K)] * (K is not None)
        write(_matrices(part, ddY), (p, q, p), terms, (True, False), False)


def define(library: torch.library.Library) -> None:
    """Define the three operators and their kernels; `autograd.register(library, "_triton")` adds the rest."""
    for schema, function in zip(_SCHEMAS, (transform, backward, double_backward)):
        library.define(schema)
        # Without the interpreter the CPU kernel says so, where the dispatcher would list its keys.
        for key in ("CPU", "CUDA"):
            library.impl(schema.partition("(")[0], function, key)
