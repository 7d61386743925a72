"""experiments/section4: every formula again by automatic differentiation and sampling; figures; docs/errata.md."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("experiments.section4", reason="experiments/ is not beside the tests")

import sympy as sp

from experiments.section4 import claims, errata, figures, optimizers, pictures
from experiments.section4.losses import ALPHA, DEEP, DEEP_HEAD, SHALLOW, A, B, C, maml_loss
from experiments.section4.moments import NOISE, THETA, X, expectation
from experiments.section4.quantities import QUANTITIES
from experiments.section4.rows import Claim, Formula, derived, relation, resolved, right_of
from experiments.section4.stationary import critical_rate, stationary_points
from experiments.section4.verdicts import CONSTANT, HOLDS, WRONG, compare

DRAWS = 400_000
# A sampled mean may be off by so many standard errors, an exact number by so much.
ERRORS, ROUNDING = 5, 1e-9
FORMULAS = [row for row in errata.ROWS if isinstance(row, Formula)]
Estimate = tuple[Tensor, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mean(samples: Tensor) -> Estimate:
    return samples.mean(), samples.std() / len(samples) ** 0.5


def exact(*values: Tensor) -> Estimate:
    value = torch.stack([v.reshape(()) for v in values]).squeeze()
    return value.detach(), torch.zeros_like(value)


class Point:
    """Numbers for every symbol, and the model on them in plain torch; `theta` may be one task or many."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        names = ("a", "b", "c", "theta", "alpha", "beta", "xi")
        self.leaves = {name: (0.3 + torch.rand((), dtype=torch.float64)).requires_grad_() for name in names}
        self.leaves["alpha"].data *= 0.4
        # Five support and five query examples of one task.
        self.x, self.y = normal(2, 5), normal(2, 5)
        moments = {
            f"{part}_x{kind}": (self.x[i] * (self.x if kind == "x" else self.y)[i]).mean()
            for i, part in enumerate("SQ")
            for kind in "xy"
        }
        self.numbers = {name: leaf.item() for name, leaf in (self.leaves | moments).items()}

    def __getattr__(self, name: str) -> Tensor:
        return self.leaves[name]

    def at(self, formula: Any) -> Tensor:
        """A formula's number, or numbers."""
        found = sp.Matrix([formula]) if not isinstance(formula, sp.MatrixBase) else formula
        numbers = [float(entry.subs({s: self.numbers[str(s)] for s in entry.free_symbols})) for entry in found]
        return torch.tensor(numbers, dtype=torch.float64).squeeze()

    def step(self, held: bool = False, theta: Tensor | None = None, **start: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of DEEP after one step of gradient descent on the population loss, a held fixed or not."""
        theta = self.theta if theta is None else theta
        a, b = start.get("a", self.a), start.get("b", self.b)
        # One copy per task: their gradients stay apart.
        copies = [(q + 0 * theta) if q.requires_grad else (q + 0 * theta).requires_grad_() for q in (a, b)]
        slopes = torch.autograd.grad(risk(copies[0] * copies[1], theta).sum(), copies, create_graph=True)
        moved = [q - self.alpha * slope for q, slope in zip(copies, slopes)]
        return (copies[0] if held else moved[0]), moved[1]

    def shallow_step(self, theta: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        theta = self.theta if theta is None else theta
        c = (self.c if c is None else c) + 0 * theta
        (slope,) = torch.autograd.grad(risk(c, theta).sum(), c, create_graph=True)
        return c - self.alpha * slope

    def solution(self) -> tuple[Tensor, Tensor]:
        a = (1 / self.alpha.detach().sqrt()).requires_grad_()
        return a, torch.zeros((), dtype=torch.float64, requires_grad=True)


def risk(slope: Tensor, theta: Tensor) -> Tensor:
    """1/2 E (y - slope x)^2, by hand; `test_risk` samples it."""
    return ((theta - slope) ** 2 + 1) / 2


def sampled(slope: Tensor, theta: Tensor) -> Estimate:
    """The same by sampling x and the noise, and theta if it has many values."""
    x, noise = normal(DRAWS), normal(DRAWS)
    return mean(((theta * x + noise - slope * x) ** 2 / 2).detach())


def grad(loss: Tensor, *leaves: Tensor) -> Estimate:
    return exact(*torch.autograd.grad(loss, leaves))


def polynomial(p: Point) -> list[Tensor]:
    """p1, p2, p3: the slope after one step through three values of theta."""
    theta = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    a, b = p.step(theta=theta)
    zero, plus, minus = a * b
    return [zero, (plus - minus) / 2, (plus + minus) / 2 - zero]


def quadrature_loss(place: Tensor, alpha: Tensor) -> Tensor:
    """DEEP's MAML loss, by Gauss-Hermite quadrature, which is exact for this degree."""
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(6))
    a, b = place
    error = a * b - nodes
    f = (a - alpha * b * error) * (b - alpha * a * error)
    return (weights / weights.sum() * risk(f, nodes)).sum()


def hessian(p: Point, a: float, b: float) -> Estimate:
    root = 1 / math.sqrt(p.alpha.item())
    place = torch.tensor([a * root, b * root], dtype=torch.float64)
    H = torch.autograd.functional.hessian(lambda q: quadrature_loss(q, p.alpha.detach()), place)
    return H.reshape(-1), torch.zeros(4, dtype=torch.float64)


def head_loss_of_samples(p: Point) -> Estimate:
    """The gradient in b of the query loss of real examples, after one step of b on support examples."""
    a, b = p.solution()
    (slope,) = torch.autograd.grad(((p.y[0] - a * b * p.x[0]) ** 2).mean() / 2, b, create_graph=True)
    after = b - p.alpha * slope
    return grad(((p.y[1] - a * after * p.x[1]) ** 2).mean() / 2, b)


def axis_gradient(p: Point) -> Estimate:
    place = torch.stack([p.a.detach(), torch.zeros((), dtype=torch.float64)]).requires_grad_()
    (slope,) = torch.autograd.grad(quadrature_loss(place, p.alpha.detach()), place)
    return slope, torch.zeros(2, dtype=torch.float64)


def optimizer_step(p: Point) -> Tensor:
    (slope,) = torch.autograd.grad(risk(p.c, p.theta), p.c, create_graph=True)
    return p.c - p.alpha * p.xi * slope


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] * pair[1]


def many() -> Tensor:
    return normal(DRAWS)


def head_update(p: Point, a: Tensor, b: Tensor) -> Estimate:
    after = product(p.step(held=True, a=a, b=b))
    (slope,) = torch.autograd.grad(risk(after, p.theta), b)
    return exact(b - p.beta * slope)


def shallow_update(p: Point, c: Tensor) -> Estimate:
    (slope,) = torch.autograd.grad(risk(p.shallow_step(c=c), p.theta), c)
    return exact(c - p.beta * slope)


def solution_gradient(p: Point) -> Estimate:
    a, b = p.solution()
    return grad(risk(product(p.step(a=a, b=b)), p.theta), a, b)


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64, requires_grad=True)


def maml_estimate(p: Point, step: Any) -> Estimate:
    theta = many()
    return sampled(step(theta), theta)


def moments(p: Point) -> Estimate:
    theta = many()
    found = [mean(theta**k) for k in (2, 3, 4)]
    return torch.stack([value for value, _ in found]), torch.stack([error for _, error in found])


ORACLES = {
    "SHALLOW: loss of a task": lambda p: sampled(p.c, p.theta),
    "SHALLOW: gradient": lambda p: grad(risk(p.c, p.theta), p.c),
    "SHALLOW: step": lambda p: exact(p.shallow_step()),
    "SHALLOW: step from 0": lambda p: exact(p.shallow_step(c=zero())),
    "SHALLOW: loss after a step": lambda p: sampled(p.shallow_step(), p.theta),
    "SHALLOW: gradient after a step": lambda p: grad(risk(p.shallow_step(), p.theta), p.c),
    "SHALLOW: meta-step": lambda p: shallow_update(p, p.c),
    "SHALLOW: meta-step from 0": lambda p: shallow_update(p, zero()),
    "SHALLOW: MAML loss": lambda p: maml_estimate(p, p.shallow_step),
    "DEEP: loss of a task": lambda p: sampled(p.a * p.b, p.theta),
    "DEEP: gradient in a": lambda p: grad(risk(p.a * p.b, p.theta), p.a),
    "DEEP: gradient in b": lambda p: grad(risk(p.a * p.b, p.theta), p.b),
    "DEEP: step of a": lambda p: exact(p.step()[0]),
    "DEEP: step of b": lambda p: exact(p.step()[1]),
    "DEEP, a held: gradient after a step": lambda p: grad(risk(product(p.step(held=True)), p.theta), p.b),
    "DEEP, a held: meta-step": lambda p: head_update(p, p.a, p.b),
    "DEEP, a held: meta-step at the solution": lambda p: head_update(p, *p.solution()),
    "DEEP, a held: gradient of sampled tasks at the solution": head_loss_of_samples,
    "DEEP, a held: step from any b": lambda p: exact(p.step(held=True, a=p.solution()[0])[1]),
    "DEEP: slope after a step from any b": lambda p: exact(product(p.step(a=p.solution()[0]))),
    "DEEP: slope after a step from the solution": lambda p: exact(
        product(p.step(a=p.solution()[0], b=p.solution()[1]))
    ),
    "DEEP: gradient after a step at the solution": solution_gradient,
    "DEEP: slope after a step": lambda p: exact(product(p.step())),
    "DEEP: squared slope": lambda p: exact(product(p.step()) ** 2),
    "DEEP: p1": lambda p: exact(polynomial(p)[0]),
    "DEEP: p2": lambda p: exact(polynomial(p)[1]),
    "DEEP: p3": lambda p: exact(polynomial(p)[2]),
    "DEEP: mean squared slope": lambda p: mean(product(p.step(theta=many())).detach() ** 2),
    "DEEP: mean of theta times slope": lambda p: (lambda theta: mean(theta * product(p.step(theta=theta)).detach()))(
        many()
    ),
    "DEEP: MAML loss": lambda p: maml_estimate(p, lambda theta: product(p.step(theta=theta))),
    "DEEP: MAML gradient on the a-axis": axis_gradient,
    "DEEP: Hessian at the origin": lambda p: hessian(p, 0, 0),
    "DEEP: Hessian on the a-axis": lambda p: hessian(p, 1, 0),
    "DEEP: Hessian on the b-axis": lambda p: hessian(p, 0, 1),
    "moments of theta": moments,
    "meta-optimizer: step": lambda p: exact(optimizer_step(p)),
    "meta-optimizer: gradient after a step": lambda p: grad(risk(optimizer_step(p), p.theta), p.c, p.xi),
}


def is_close(found: Tensor, oracle: Estimate, factor: float = 1) -> bool:
    value, error = oracle
    return bool(((found - value).abs() <= abs(factor) * (ERRORS * error + ROUNDING)).all())


def test_every_quantity_has_an_oracle():
    assert set(ORACLES) == set(QUANTITIES) >= {row.of for row in FORMULAS}


def test_risk():
    theta, slope = normal(()), normal(())
    assert is_close(risk(slope, theta), sampled(slope, theta))


@pytest.mark.parametrize("name", ORACLES)
def test_derived_formulas_equal_plain_torch(name):
    for seed in range(2):
        point = Point(seed)
        assert is_close(point.at(derived(name)), ORACLES[name](point)), name


@pytest.mark.parametrize("row", FORMULAS, ids=[f"{row.number}-{i}" for i, row in enumerate(FORMULAS)])
def test_a_verdict_on_a_formula_holds_numerically(row):
    verdict, factor, shift = relation(row)
    right_of(row)
    for seed in range(2):
        point = Point(seed)
        value, error = ORACLES[row.of](point)
        printed = point.at(resolved(row.printed))
        if verdict == WRONG:
            # Off by more than a doubt at each point.
            assert not is_close(printed, (value, 2 * error)), row.number
        else:
            expected = float(factor) * value + point.at(shift)
            assert is_close(printed, (expected, error), float(factor)), row.number
        assert (verdict == HOLDS) == is_close(printed, (value, error)), row.number


def test_claims_that_do_not_hold():
    found = [(row, relation.verdict) for row, relation in errata.verdicts() if isinstance(row, Claim)]
    failed = {(row.number, row.says) for row, verdict in found if verdict == WRONG}
    assert {number for number, _ in failed} == {"10 to 11", "43 to 53", "B.1", "C.1", "Alg. 1, lines 6, 7"}
    assert len(failed) == 5
    assert all(verdict == HOLDS for row, verdict in found if row.ours)


@pytest.mark.parametrize("model", [SHALLOW, DEEP, DEEP_HEAD], ids=["SHALLOW", "DEEP", "DEEP_HEAD"])
def test_losses_depend_on_their_parameters_alone(model):
    assert maml_loss(model).free_symbols == {ALPHA, *model.slope.free_symbols}


def test_expectations():
    assert expectation(X**4 * NOISE**2 + X * NOISE + 3 * THETA, X, NOISE) == 3 + 3 * THETA
    with pytest.raises(ValueError, match="expected a polynomial"):
        expectation(sp.exp(X), X)
    with pytest.raises(ValueError, match="at least one symbol"):
        expectation(X)


@pytest.mark.parametrize(
    ("printed", "constants", "exact", "verdict"),
    [
        (C**2, (), False, HOLDS),
        (3 * C**2 - 1, (), False, CONSTANT),
        (3 * C**2 - 1, (), True, WRONG),
        (3 * C**2 - ALPHA, (), False, WRONG),
        (3 * C**2 - ALPHA, (ALPHA,), False, CONSTANT),
        (-3 * C**2, (), False, WRONG),
        (ALPHA * C**2, (), False, WRONG),
        (C**2 + C, (), False, WRONG),
        (sp.Integer(2), (), False, WRONG),
    ],
)
def test_verdicts(printed, constants, exact, verdict):
    assert compare(printed, C**2, constants, exact=exact).verdict == verdict


def test_verdicts_on_matrices():
    right = sp.diag(ALPHA, ALPHA**2)
    assert compare(2 * right, right).factor == 2
    assert compare(sp.diag(2 * ALPHA, 3 * ALPHA**2), right).verdict == WRONG
    assert compare(sp.diag(ALPHA**2, ALPHA), right).verdict == WRONG
    # One constant for all entries would be no constant of a Hessian.
    assert compare(right + sp.diag(1, 2), right).verdict == WRONG
    assert compare(sp.Integer(2), sp.Integer(0)).verdict == WRONG
    with pytest.raises(ValueError, match="matrices of one shape"):
        compare(right, ALPHA)


@pytest.mark.parametrize(("rate", "count"), [("1/10", 17), ("1/2", 9)])
def test_stationary_points_are_all(rate, count):
    """Newton's method from many starts finds these points and no others."""
    points = stationary_points(sp.Rational(rate))
    assert len(points) == count
    alpha = torch.tensor(float(sp.Rational(rate)), dtype=torch.float64)

    def loss(place: Tensor) -> Tensor:
        return quadrature_loss(place, alpha)

    slopes, curvatures = torch.func.vmap(torch.func.grad(loss)), torch.func.vmap(torch.func.hessian(loss))
    known = torch.tensor([(point.a, point.b) for point in points], dtype=torch.float64)
    assert slopes(known).abs().max() < 1e-9
    signs = torch.linalg.eigvalsh(curvatures(known)).sign().sum(1).tolist()
    assert [{2.0: "minimum", 0.0: "saddle", -2.0: "maximum"}[sign] for sign in signs] == [p.kind for p in points]
    places = 2 * normal(1000, 2) / alpha.sqrt()
    for _ in range(100):
        H = curvatures(places) + 1e-12 * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(H, slopes(places))
        places = places - step * (1 / step.norm(dim=1, keepdim=True)).clamp(max=1)
    places = places[slopes(places).norm(dim=1) < 1e-10]
    nearest = torch.cdist(places, known).min(1)
    assert nearest.values.max() < 1e-6
    assert len(places) > 500
    assert len(nearest.indices.unique()) == count


def test_the_number_of_stationary_points_changes_at_the_critical_rate():
    rate = float(critical_rate())
    counts = [len(stationary_points(sp.Rational(round(factor * rate * 10**6), 10**6))) for factor in (0.99, 1.01)]
    assert counts == [17, 9]
    with pytest.raises(ValueError, match="positive rational"):
        stationary_points(sp.Integer(0))


def test_the_step_size_turns_where_the_page_says():
    alpha = 0.3
    a = np.linspace(0, 1 / math.sqrt(alpha), 100_001)
    turn = a[np.argmax(a * (1 - alpha * a**2) ** 2)]
    (found,) = claims._turns()
    assert float(found.subs(ALPHA, alpha)) == pytest.approx(turn, abs=1e-4)


def test_the_bayes_accuracy_of_sampled_labels():
    theta, x = normal(DRAWS, 2), normal(DRAWS, 2)
    value, error = mean((theta * x).sum(1).abs().sigmoid())
    assert abs(value - float(optimizers.bayes_accuracy())) < ERRORS * error


def test_kronecker_products_in_torch():
    R, G, L = normal(3, 3), normal(3, 5), normal(5, 5)
    W = torch.kron(R.T.contiguous(), L)
    torch.testing.assert_close(W @ G.reshape(-1), (R.T @ G @ L.T).reshape(-1))
    assert not torch.allclose(W @ G.reshape(-1), (R.T @ G @ L).reshape(-1))
    assert torch.linalg.matrix_rank(W) == 15
    assert optimizers.optimizer_gradients() == [False, True]


def test_the_population_batch_has_the_population_loss():
    for seed in range(3):
        torch.manual_seed(seed)
        model = figures.deep_regression().double()
        b, a = model.parameters()
        loss = figures.learner(model, 0.3)(figures.population()).loss
        at = {ALPHA: 0.3, A: a.item(), B: b.item()}
        assert loss.item() == pytest.approx(float(maml_loss(DEEP).subs(at)), rel=1e-12)
        slopes = [float(sp.diff(maml_loss(DEEP), q).subs(at)) for q in (B, A)]
        assert [g.item() for g in torch.autograd.grad(loss, [b, a])] == pytest.approx(slopes, rel=1e-10)


def test_trajectories_converge_to_the_four_solutions():
    numbers = figures.figure2(rate=0.5, iterations=300)
    ends = torch.tensor([(t["a"][-1], t["b"][-1]) for t in numbers["trajectories"]])
    nearest = torch.cdist(ends, torch.tensor(numbers["solutions"])).min(1)
    assert nearest.values.max() < 1e-3
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    grid = np.array(numbers["loss"])
    i, j = 10, 35
    at = {ALPHA: 0.5, A: numbers["axis"][j], B: numbers["axis"][i]}
    assert grid[i, j] == pytest.approx(float(maml_loss(DEEP).subs(at)), rel=1e-3)


def test_figure_1_on_the_left(monkeypatch):
    monkeypatch.setattr(figures, "TEST_TASKS", 50)
    monkeypatch.setattr(figures, "LONGEST", 5)
    numbers = figures.figure1_left(seeds=(0,), iterations=250)
    ends = {model: curves["0"]["population_mse"][-1] for model, curves in numbers["curves"].items()}
    assert numbers["lines"] == pytest.approx({"SHALLOW, best": 1.81, "DEEP, best": 1, "noise": 1})
    assert 1.8 < ends["SHALLOW"] < 1.9
    assert 1 < ends["DEEP"] < 1.1


@pytest.mark.parametrize("iterations", [1, 2])
def test_figures_of_few_iterations(iterations, monkeypatch):
    monkeypatch.setattr(figures, "TEST_TASKS", 5)
    one = figures.figure1_left((3, 4), iterations)
    assert one == json.loads(json.dumps(one)) == figures.figure1_left((3, 4), iterations)
    assert one["curves"]["DEEP"]["3"]["iteration"] == list(range(iterations + 1))
    two = figures.figure2(iterations=iterations)
    assert two == json.loads(json.dumps(two))
    assert [len(t["a"]) for t in two["trajectories"]] == 4 * [iterations + 1]


def test_curves_are_thinned():
    kept = figures.thinned(5000, 40)
    assert {0, 5000} <= kept
    assert len(kept) <= 40
    assert figures.thinned(3, 40) == {0, 1, 2, 3}


def test_figures_refuse_no_seed_and_no_iteration():
    with pytest.raises(ValueError, match="seeds: expected at least one"):
        figures.figure1_left(())
    for call in (figures.figure1_left, figures.figure2):
        for bad in (0, True, 2.0):
            with pytest.raises(ValueError, match="iterations: expected an integer"):
                call(iterations=bad)


def test_pictures_repeat_byte_by_byte(monkeypatch):
    monkeypatch.setattr(figures, "TEST_TASKS", 5)
    left, right = figures.figure1_left((0, 1), 2), figures.figure2(iterations=2)
    draws = [
        (pictures.draw_figure1_left, left),
        (pictures.draw_figure2_left, right),
        (pictures.draw_figure2_right, right),
    ]
    for i, (draw, numbers) in enumerate(draws):
        written = [draw(json.loads(json.dumps(numbers))) for _ in range(2)]
        assert written[0] == written[1], i
        assert b"<svg" in written[0]
        assert b"<dc:date>" not in written[0]


@pytest.mark.skipif(not errata.PAGE.parent.is_dir(), reason="docs/ is not beside the tests")
def test_the_page_is_what_the_table_generates(tmp_path):
    assert errata.PAGE.read_text() == errata.page()
    errata.write(tmp_path / "errata.md")
    assert (tmp_path / "errata.md").read_bytes() == errata.PAGE.read_bytes()
