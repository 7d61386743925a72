"""The three orders as Triton kernels. Importing this imports triton: only `launch` does, at the first call.

The small problems of a whole group go in one launch of `form_kernel`, or two: with F = sum <R^T G L, dY>, an output is
the gradient of F by one slot, summed over terms in which a cotangent replaces the operand of another slot (see
`kfo_ext.ops.transform.autograd`). A program computes one output of some of the B matrices of one problem, for one task:
with all outputs in one program, registers spill. `CLASSES` are the padded (p, q) of the group; a program branches to
the body of its class, so that a bias is not padded to the size of a convolution.

`form_kernel` is compiled once for the slot of Y and once for those of R, G and L. The outputs and their terms are
arguments of the launch: after a forward and a backward, a double backward compiles nothing.

Work table, int64, one row per program of a task and output (offsets in elements, into one packed row):

    class  p  q  matrices  R  L  G (of the first matrix)  bias  dR  dL (of this program's partial sums)

A larger problem is a sequence of tiled `product_kernel`s. Partial dR and dL are added in a fixed order by `sum_kernel`:
there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORK_COLUMNS = tl.constexpr(10)
SUM_COLUMNS = tl.constexpr(6)
OUTPUT_BITS = tl.constexpr(9)
# Slots of F, the outputs of `form_kernel`.
SLOT_R = tl.constexpr(0)
SLOT_G = tl.constexpr(1)
SLOT_L = tl.constexpr(2)
SLOT_Y = tl.constexpr(3)


def _kernel(function):
    """`triton.jit` without specialisation on values: another stride or task count must not compile anew."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        do_not_specialize=[name for name in names if name.startswith(("s_", "n_"))],
        do_not_specialize_on_alignment=[name for name in names if name.startswith("p_")],
    )(function)


@triton.jit
def _dot(b_x, b_y):
    return tl.dot(b_x, b_y, input_precision="ieee")


@triton.jit
def _load(p_x, m, n, M: tl.constexpr, N: tl.constexpr):
    """The row-major (m, n) matrix at p_x, padded with zeros to (M, N)."""
    o_m = tl.arange(0, M)[:, None]
    o_n = tl.arange(0, N)[None, :]
    return tl.load(p_x + o_m * n + o_n, mask=(o_m < m) & (o_n < n), other=0.0)


@triton.jit
def _store(p_x, b_x, m, n, M: tl.constexpr, N: tl.constexpr):
    o_m = tl.arange(0, M)[:, None]
    o_n = tl.arange(0, N)[None, :]
    tl.store(p_x + o_m * n + o_n, b_x, mask=(o_m < m) & (o_n < n))


@triton.jit
def _inside(b_x, m, n, M: tl.constexpr, N: tl.constexpr):
    # Outside, zero times infinity is not a number, and the next product would sum over it.
    return tl.where((tl.arange(0, M)[:, None] < m) & (tl.arange(0, N)[None, :] < n), b_x, 0.0)


@triton.jit
def _write(
    p_row, p_R, p_G, p_L, p_dY, p_ddR, p_ddG, p_ddL, p_bias, p_out, first, last, step, has_bias,
    SLOT: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Compute one output of one row of the work table.

    p_row is the row; the other pointers are the operands and outputs of its task. SLOT is the output, P and Q are the
    padded sizes of the row's class. first, last (exclusive) and step enumerate the terms: 0, 1 and 2 replace R, G or L
    by ddR, ddG or ddL, and 3 replaces nothing. With has_bias, the slot of Y adds the bias.
    """
    p = tl.load(p_row + 1).to(tl.int32)
    q = tl.load(p_row + 2).to(tl.int32)
    count = tl.load(p_row + 3).to(tl.int32)
    i_R = tl.load(p_row + 4)
    i_L = tl.load(p_row + 5)
    i_G = tl.load(p_row + 6)
    p_R += i_R
    p_ddR += i_R
    p_L += i_L
    p_ddL += i_L
    # The shape of R, L or G; a sum over the matrices only for the factors.
    M: tl.constexpr = Q if SLOT == SLOT_L else P
    N: tl.constexpr = P if SLOT == SLOT_R else Q
    # G and Y are written per matrix; R and Y come from N = G L, the others from M = R dY.
    IS_MATRIX: tl.constexpr = SLOT % 2 == 1
    FROM_RIGHT: tl.constexpr = SLOT % 3 == 0
    b_out = tl.zeros((M, N), p_G.dtype.element_ty)
    for _ in range(count):
        if IS_MATRIX:
            b_out = tl.zeros((M, N), p_G.dtype.element_ty)
        # A loop when it runs, even of one turn: unrolled, operands of every turn stay in registers, which then spill.
        for term in range(first, last, step):
            p_A = p_R
            p_X = p_G
            p_B = p_L
            if term == 0:
                p_A = p_ddR
            if term == 1:
                p_X = p_ddG
            if term == 2:
                p_B = p_ddL
            if FROM_RIGHT:
                b_N = _dot(_load(p_X + i_G, p, q, P, Q), _load(p_B, q, q, Q, Q))
                b_N = _inside(b_N, p, q, P, Q)
            else:
                b_M = _dot(_load(p_A, p, p, P, P), _load(p_dY + i_G, p, q, P, Q))
                b_M = _inside(b_M, p, q, P, Q)
            if SLOT == SLOT_R:
                b_out += _dot(b_N, tl.trans(_load(p_dY + i_G, p, q, P, Q)))
            elif SLOT == SLOT_G:
                b_out += _dot(b_M, tl.trans(_load(p_B, q, q, Q, Q)))
            elif SLOT == SLOT_L:
                b_out += _dot(tl.trans(_load(p_X + i_G, p, q, P, Q)), b_M)
            else:
                b_out += _dot(tl.trans(_load(p_A, p, p, P, P)), b_N)
        if SLOT == SLOT_Y:  # noqa: SIM102  the one is known when compiled, the other when run
            if has_bias:
                b_out += _load(p_bias + tl.load(p_row + 7), p, q, P, Q)
        if IS_MATRIX:
            _store(p_out + i_G, b_out, p, q, P, Q)
        i_G += p * q
    if SLOT == SLOT_R:
        _store(p_out + tl.load(p_row + 8), b_out, p, p, P, P)
    if SLOT == SLOT_L:
        _store(p_out + tl.load(p_row + 9), b_out, q, q, Q, Q)


@_kernel
def form_kernel(
    p_table, p_R, p_G, p_L, p_dY, p_ddR, p_ddG, p_ddL, p_bias, p_out_R, p_out_G, p_out_L, p_out_Y,
    s_R, s_G, s_L, s_dY, s_ddR, s_ddG, s_ddL, s_bias, s_out_R, s_out_G, s_out_L, s_out_Y,
    n_rows, n_outputs, n_bias, SLOTS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Compute outputs of every small problem of one order; the gradients of R and L are partial sums.

    Grid: (tasks * rows of the work table, outputs). p_table is the work table, of n_rows rows; p_X and s_X are a packed
    operand or output and its stride from task to task in elements, 0 for a row that the tasks share. n_outputs has
    `OUTPUT_BITS` bits for each output: its slot (2 bits), and first (2), last (3) and step (2) of its terms. n_bias is
    1 if there is a bias, else 0. SLOTS are the slots that this compilation has code for.
    """
    pid = tl.program_id(0).to(tl.int64)
    output = n_outputs >> (tl.program_id(1) * OUTPUT_BITS)
    slot = output & 3
    first = (output >> 2) & 3
    last = (output >> 4) & 7
    step = (output >> 7) & 3
    task = pid // n_rows
    p_row = p_table + (pid % n_rows) * WORK_COLUMNS
    own = tl.load(p_row)
    p_R += task * s_R
    p_G += task * s_G
    p_L += task * s_L
    p_dY += task * s_dY
    p_ddR += task * s_ddR
    p_ddG += task * s_ddG
    p_ddL += task * s_ddL
    p_bias += task * s_bias
    for j in tl.static_range(len(SLOTS)):
        if slot == SLOTS[j]:
            if SLOTS[j] == SLOT_R:
                p_out = p_out_R + task * s_out_R
            elif SLOTS[j] == SLOT_G:
                p_out = p_out_G + task * s_out_G
            elif SLOTS[j] == SLOT_L:
                p_out = p_out_L + task * s_out_L
            else:
                p_out = p_out_Y + task * s_out_Y
            for c in tl.static_range(len(CLASSES)):
                if own == c:
                    _write(
                        p_row, p_R, p_G, p_L, p_dY, p_ddR, p_ddG, p_ddL, p_bias, p_out, first, last, step, n_bias != 0,
                        SLOTS[j], CLASSES[c][0], CLASSES[c][1],
                    )  # fmt: skip


@triton.jit
def _product_tile(b_C, p_A, p_B, i_m, i_n, m, n, k, TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, BK: tl.constexpr):
    """b_C plus rows i_m of op(A) times columns i_n of op(B); every matrix is dense, row after row."""
    for k_0 in range(0, k, BK):
        i_k = k_0 + tl.arange(0, BK).to(tl.int64)
        # Loaded as stored, then turned: the last dimension is the contiguous one for every operand.
        if TRANS_A:
            o_A = i_k[:, None] * m + i_m[None, :]
            b_A = tl.trans(tl.load(p_A + o_A, mask=(i_k[:, None] < k) & (i_m[None, :] < m), other=0.0))
        else:
            o_A = i_m[:, None] * k + i_k[None, :]
            b_A = tl.load(p_A + o_A, mask=(i_m[:, None] < m) & (i_k[None, :] < k), other=0.0)
        if TRANS_B:
            o_B = i_n[:, None] * k + i_k[None, :]
            b_B = tl.trans(tl.load(p_B + o_B, mask=(i_n[:, None] < n) & (i_k[None, :] < k), other=0.0))
        else:
            o_B = i_k[:, None] * n + i_n[None, :]
            b_B = tl.load(p_B + o_B, mask=(i_k[:, None] < k) & (i_n[None, :] < n), other=0.0)
        b_C += _dot(b_A, b_B)
    return b_C


@_kernel
def product_kernel(
    p_A, p_B, p_A2, p_B2, p_bias, p_C,
    s_A, s_B, s_A2, s_B2, s_bias, s_C,
    s_A_matrix, s_B_matrix, s_A2_matrix, s_B2_matrix, s_C_chunk,
    n_m, n_n, n_k, n_matrices, n_chunk, n_chunks,
    HAS_2: tl.constexpr, HAS_BIAS: tl.constexpr, TRANS_A: tl.constexpr, TRANS_B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute C = op(A) op(B) (+ op(A2) op(B2)) (+ bias), (m, n), summed over the matrices of a chunk.

    Grid: tasks * chunks * tiles. Every matrix is dense and row-major: C (n_m, n_n), op(A) (n_m, n_k), op(B) (n_k, n_n);
    TRANS_A and TRANS_B say whether op transposes. s_X is a stride from task to task, s_X_matrix from matrix to matrix
    (0 for a factor) and s_C_chunk from chunk to chunk, in elements. A task has n_matrices matrices in n_chunks chunks
    of n_chunk. A tile of C is (BM, BN), and sums BK products at a time.
    """
    m = n_m.to(tl.int64)
    n = n_n.to(tl.int64)
    k = n_k.to(tl.int64)
    pid = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(n, BN)
    tiles = tl.cdiv(m, BM) * tiles_n
    i_m = (pid % tiles) // tiles_n * BM + tl.arange(0, BM).to(tl.int64)
    i_n = (pid % tiles) % tiles_n * BN + tl.arange(0, BN).to(tl.int64)
    chunk = pid // tiles % n_chunks
    task = pid // tiles // n_chunks
    inside = (i_m[:, None] < m) & (i_n[None, :] < n)
    o_C = i_m[:, None] * n + i_n[None, :]
    b_C = tl.zeros((BM, BN), p_C.dtype.element_ty)
    first = chunk * n_chunk
    for i in range(first, tl.minimum(first + n_chunk, n_matrices)):
        p_x = p_A + task * s_A + i * s_A_matrix
        p_y = p_B + task * s_B + i * s_B_matrix
        b_C = _product_tile(b_C, p_x, p_y, i_m, i_n, m, n, k, TRANS_A, TRANS_B, BK)
        if HAS_2:
            p_x = p_A2 + task * s_A2 + i * s_A2_matrix
            p_y = p_B2 + task * s_B2 + i * s_B2_matrix
            b_C = _product_tile(b_C, p_x, p_y, i_m, i_n, m, n, k, TRANS_A, TRANS_B, BK)
    if HAS_BIAS:
        b_C += tl.load(p_bias + task * s_bias + o_C, mask=inside, other=0.0)
    tl.store(p_C + task * s_C + chunk * s_C_chunk + o_C, b_C, mask=inside)


@triton.jit
def _sum(p_row, p_from, p_to, s_from, task, tasks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One stretch of a factor's gradient: its partial sums over the chunks of `tasks` tasks, added in order."""
    o_to = tl.load(p_row + 1)
    o_from = tl.load(p_row + 2)
    width = tl.load(p_row + 3)
    size = tl.load(p_row + 4)
    chunks = tl.load(p_row + 5)
    for i_0 in range(0, width, COLUMNS):
        i_column = i_0 + tl.arange(0, COLUMNS).to(tl.int64)
        # In float64, so that the error does not grow with the number of tasks.
        b_sum = tl.zeros((COLUMNS,), tl.float64)
        for j_0 in range(0, tasks * chunks, ROWS):
            j = j_0 + tl.arange(0, ROWS).to(tl.int64)
            o_j = (task + j // chunks) * s_from + j % chunks * size
            mask = (j[:, None] < tasks * chunks) & (i_column[None, :] < width)
            b_part = tl.load(p_from + o_from + o_j[:, None] + i_column[None, :], mask=mask, other=0.0)
            b_sum += tl.sum(b_part.to(tl.float64), axis=0)
        tl.store(p_to + o_to + i_column, b_sum, mask=i_column < width)


@_kernel
def sum_kernel(
    p_table, p_part_R, p_part_L, p_dR, p_dL, s_part_R, s_part_L, s_dR, s_dL, n_rows, n_tasks,
    SHARED_R: tl.constexpr, SHARED_L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of dR and dL; the gradient of a shared factor sums over the tasks too.

    Grid: tasks * rows of the sum table, whose int64 columns are: 0 for dR or 1 for dL, offset into the gradient, offset
    into the partial sums, elements of this row, elements of the factor (from chunk to chunk), chunks.

    p_table is the sum table, of n_rows rows; s_X is the stride of p_X from task to task, in elements. SHARED_R and
    SHARED_L say which factor the tasks share. A step adds ROWS partial sums of COLUMNS elements.
    """
    pid = tl.program_id(0).to(tl.int64)
    task = pid // n_rows
    p_row = p_table + (pid % n_rows) * SUM_COLUMNS
    if tl.load(p_row) == 0:
        if SHARED_R:
            if task == 0:
                _sum(p_row, p_part_R, p_dR, s_part_R, task, n_tasks.to(tl.int64), ROWS, COLUMNS)
        else:
            _sum(p_row, p_part_R, p_dR + task * s_dR, s_part_R, task, 1, ROWS, COLUMNS)
    else:
        if SHARED_L:
            if task == 0:
                _sum(p_row, p_part_L, p_dL, s_part_L, task, n_tasks.to(tl.int64), ROWS, COLUMNS)
        else:
            _sum(p_row, p_part_L, p_dL + task * s_dL, s_part_L, task, 1, ROWS, COLUMNS)
