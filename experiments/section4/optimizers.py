"""The statements of appendix C.1 and Algorithm 1 on Kronecker-factored meta-optimizers, and that of B.1 on labels.

Matrices are random and rectangular, with small integers, so that every comparison is exact.
"""

from __future__ import annotations

import random

import sympy as sp
import torch

from kfo_ext.updates import KFO, LowRank

from .losses import ALPHA, SHALLOW, C, gradient, task_loss
from .quantities import XI
from .rows import Claim

# The sides of a parameter: R is (M, M), L is (N, N), G is (M, N).
M, N = 3, 2
# The least accuracy to be called very high.
VERY_HIGH = sp.Rational(9, 10)


def random_matrix(rows: int, columns: int, seed: int) -> sp.Matrix:
    """A matrix of integers between -9 and 9."""
    numbers = random.Random(seed)
    return sp.Matrix(rows, columns, lambda *_: numbers.randint(-9, 9))


def of_rank(rank: int, size: int, seed: int) -> sp.Matrix:
    """A random square matrix of the given rank."""
    matrix = random_matrix(size, rank, seed) * random_matrix(rank, size, seed + 100)
    assert matrix.rank() == rank
    return matrix


def kron(left: sp.Matrix, right: sp.Matrix) -> sp.Matrix:
    """The Kronecker product."""
    return sp.Matrix(sp.kronecker_product(left, right))


def by_rows(matrix: sp.Matrix) -> sp.Matrix:
    """Row-major vec: the rows below each other."""
    return sp.Matrix(len(matrix), 1, list(matrix))


def by_columns(matrix: sp.Matrix) -> sp.Matrix:
    """Column-major vec: the columns below each other."""
    return by_rows(matrix.T)


def _operands() -> tuple[sp.Matrix, sp.Matrix, sp.Matrix]:
    return random_matrix(M, M, 1), random_matrix(M, N, 2), random_matrix(N, N, 3)


def weight_has_the_shape_of_the_product() -> bool:
    """Whether R^T (x) L has the shape of W."""
    R, W, L = _operands()
    return bool(kron(R.T, L).shape == W.shape)


def product_in_rows() -> bool:
    """Whether R^T (x) L is G -> R^T G L^T row-major, and R^T (x) L^T is G -> R^T G L."""
    R, G, L = _operands()
    one = kron(R.T, L) * by_rows(G) == by_rows(R.T * G * L.T)
    other = kron(R.T, L.T) * by_rows(G) == by_rows(R.T * G * L)
    return bool(one and other)


def product_is_not_the_transform() -> bool:
    """Whether R^T (x) L differs from the map G -> R^T G L in both orders of vec."""
    R, G, L = _operands()
    W, Y = kron(R.T, L), R.T * G * L
    return all(W * vec(G) != vec(Y) for vec in (by_rows, by_columns))


def product_in_columns() -> bool:
    """Whether R^T (x) L is G -> L G R column-major, for G of shape (n, m)."""
    R, G, L = _operands()
    return bool(kron(R.T, L) * by_columns(G.T) == by_columns(L * G.T * R))


def rank_multiplies() -> bool:
    """Whether the rank of R^T (x) L is rank R * rank L, for every pair of ranks."""
    return all(
        kron(of_rank(r, M, 10 + r).T, of_rank(s, N, 20 + s)).rank() == r * s
        for r in range(1, M + 1)
        for s in range(1, N + 1)
    )


def identity_is_a_product() -> bool:
    """Whether R = L = I gives the identity, and gradient descent in `KFO`."""
    G = torch.tensor(_operands()[1].tolist(), dtype=torch.float64)
    update = KFO([G], psd=False)
    (U,) = update.transform([G])
    return kron(sp.eye(M), sp.eye(N)) == sp.eye(M * N) and U is not None and bool(torch.equal(U, G))


def cholesky_is_symmetric_and_positive() -> bool:
    """Whether L L^T of r columns is symmetric without negative eigenvalues."""
    return all(A.is_symmetric() and A.is_positive_semidefinite for A in (_cholesky(rank) for rank in range(1, M + 1)))


def cholesky_is_singular() -> bool:
    """Whether the rank of L L^T is its number of columns, if less than that of its rows."""
    return all(_cholesky(rank).rank() == rank for rank in range(1, M))


def _cholesky(rank: int) -> sp.Matrix:
    columns = random_matrix(M, rank, 30 + rank)
    return columns * columns.T


def kronecker_is_smaller_than_full() -> bool:
    """Whether m^2 + n^2 < (m n)^2 for every m, n of at least 2, and these are the library's numbers."""
    over = sp.Symbol("i", nonnegative=True), sp.Symbol("j", nonnegative=True)
    m, n = (each + 2 for each in over)
    saved = sp.Poly(sp.expand((m * n) ** 2 - m**2 - n**2), *over)
    memory = LowRank([torch.zeros(M, N)], rank=1).memory()
    stored = KFO([torch.zeros(M, N)], psd=False).phi
    return (
        all(factor > 0 for factor in saved.coeffs())
        and (memory.full, memory.kronecker) == ((M * N) ** 2, M**2 + N**2)
        and sum(row.numel() for row in stored) == memory.kronecker
    )


def rank_controls_the_memory() -> bool:
    """Whether an A of r columns for the whole parameter has r m n elements, less than R and L for r < m/n + n/m."""
    bound = sp.Rational(M, N) + sp.Rational(N, M)
    memories = [LowRank([torch.zeros(M, N)], rank=rank, whole_layer=True).memory() for rank in range(1, M * N + 1)]
    return all(
        memory.learned == rank * M * N and (memory.learned < memory.kronecker) == (rank < bound)
        for rank, memory in enumerate(memories, 1)
    )


def optimizer_gradients() -> list[bool]:
    """Whether the loss at theta_1, and at theta_2, has a gradient in xi."""
    first = task_loss(SHALLOW)
    second = first.subs(C, C - ALPHA * XI * gradient(SHALLOW)[C])
    return [sp.expand(sp.diff(loss, XI)) != 0 for loss in (first, second)]


def every_step_updates_the_optimizer() -> bool:
    """Whether lines 6 and 7 change xi at t = 1 and t = 2."""
    return all(optimizer_gradients())


def bayes_accuracy() -> sp.Expr:
    """Derive the best accuracy on labels y ~ sigma(theta^T x), with theta and x of two dimensions.

    theta^T x has a standard Laplace distribution: given x it is normal with variance norm(x)^2, and half of that is a
    standard exponential number, which gives its characteristic function. The best guess is right with probability
    sigma(abs(.)).

    Returns:
        log 2.
    """
    t, r = sp.symbols("t r", positive=True)
    characteristic = sp.integrate(sp.exp(-r) * sp.exp(-(t**2) * r), (r, 0, sp.oo))
    laplace = sp.integrate(sp.exp(-r) * sp.cos(t * r), (r, 0, sp.oo))
    assert sp.simplify(characteristic - laplace) == 0
    return sp.simplify(sp.integrate(sp.exp(-r) / (1 + sp.exp(-r)), (r, 0, sp.oo)))


def labels_allow_a_very_high_accuracy() -> bool:
    """Whether the Bayes accuracy of sampled labels is at least 90 %."""
    return bool(bayes_accuracy() >= VERY_HIGH)


def _bayes() -> str:
    accuracy = bayes_accuracy()
    return (
        f"The Bayes accuracy is ${sp.latex(accuracy)} = {float(accuracy):.3f}$ in two dimensions; labels "
        r"$1[\theta^\top x > 0]$ allow 1."
    )


CLAIMS = (
    Claim(
        "B.1",
        "With labels drawn from $\\sigma(\\theta^\\top x)$ a linear classifier attains a very high accuracy.",
        labels_allow_a_very_high_accuracy,
        "exact integral of the best guess, against 90 %",
        _bayes,
    ),
    Claim(
        "C.1",
        "$W \\in \\mathbb{R}^{m \\times n}$ equals $R^\\top \\otimes L$.",
        weight_has_the_shape_of_the_product,
        "shapes",
        "The product has $mn$ rows and columns: it is the map of the gradient of $W$.",
    ),
    Claim(
        "C.1",
        "$R^\\top \\otimes L$ is not $G \\mapsto R^\\top G L$, whatever the order of vec.",
        product_is_not_the_transform,
        "random integer matrices, both orders",
        "The paper names no order. The maps are the same, the factors transposed.",
        ours=True,
    ),
    Claim(
        "C.1",
        "Row-major, it is $G \\mapsto R^\\top G L^\\top$, and $R^\\top \\otimes L^\\top$ is $G \\mapsto R^\\top G L$.",
        product_in_rows,
        "random integer matrices",
        ours=True,
    ),
    Claim(
        "C.1",
        "Column-major, it is $G \\mapsto L G R$, as in learn2learn.",
        product_in_columns,
        "random integer matrices",
        ours=True,
    ),
    Claim(
        "C.1 (2)",
        "$R^\\top \\otimes L$ has full rank if R and L have.",
        rank_multiplies,
        "the rank is the product of the ranks: integer matrices of every rank",
    ),
    Claim(
        "C.1 (3)",
        "The identity is a Kronecker product, and gives gradient descent.",
        identity_is_a_product,
        "R = L = I, exactly, and `KFO`",
    ),
    Claim(
        "C.1 (1)",
        "The memory of R and L, $m^2 + n^2$, is less than that of a full matrix, $(mn)^2$.",
        kronecker_is_smaller_than_full,
        "for every m, n of at least 2; the numbers of `KFO` and `LowRank`",
        "Not for a vector: with n = 1 the factors have one element more.",
    ),
    Claim(
        "C.1",
        "$L L^\\top$ with r columns is symmetric and positive.",
        cholesky_is_symmetric_and_positive,
        "eigenvalues of random integer matrices of every rank",
        "Positive semidefinite: singular for r less than its size.",
    ),
    Claim(
        "C.1",
        "With fewer columns it is singular, and never the identity.",
        cholesky_is_singular,
        "rank",
        "It cannot start as gradient descent, as R and L can.",
        ours=True,
    ),
    Claim(
        "C.1",
        "Its rank r controls the memory, and it may need less than R and L.",
        rank_controls_the_memory,
        "elements of `LowRank` for the whole parameter, every r",
        "It has $r\\,mn$ elements: less for $r < m/n + n/m$, which is 2 for a square parameter.",
    ),
    Claim(
        "Alg. 1, lines 6, 7",
        "Each of the T steps updates the meta-optimizer.",
        every_step_updates_the_optimizer,
        "gradient in $\\xi$ of the loss at t = 1 and 2",
        "The first does not: $\\theta_1$ does not depend on $\\xi$. There are T - 1 updates.",
    ),
)
