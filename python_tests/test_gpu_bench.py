"""What is for a GPU, on the CPU: the groups of `kfo bench` are the tests' cases, and a wrong number does not pass."""

from __future__ import annotations

import pytest

from bench import sanitize_case
from kfo_ext.bench.points import GROUPS
from kfo_ext.ops import library
from kfo_ext.testing import LARGE_CASES, model_case

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")


def test_groups_are_those_of_the_tests():
    groups = {name: list(problems.shapes) for name, problems in GROUPS.items()}
    cases = {f"CNN({layers})": model_case(layers) for layers in (2, 4, 6)}
    assert groups == cases | {name: LARGE_CASES[name] for name in ("conv_64", "head_5x1600")}


def test_sanitize_case_fails_on_a_wrong_number(monkeypatch, capsys):
    assert sanitize_case.main(["--device", "cpu"]) == 0
    right = sanitize_case.run_order
    monkeypatch.setattr(sanitize_case, "run_order", lambda *arguments: [X + 1e-3 for X in right(*arguments)])
    assert sanitize_case.main(["--device", "cpu", "--operators", "transform"]) == 1
    assert "Y of forward is off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("operator", "function", "wrong"),
    [("batch_norm", "batch_norm_relu", "second gradient 0"), ("conv2d", "conv2d", "second gradient 1")],
)
def test_sanitize_case_fails_on_a_wrong_second_derivative(operator, function, wrong, monkeypatch, capsys):
    """What is added is zero, and so is its gradient: the other orders stay right."""
    right = getattr(sanitize_case, function)

    def slightly_off(x, weight, *rest, **options):
        y = right(x, weight, *rest, **options)
        moved = weight if operator == "conv2d" else x
        return y + (moved - moved.detach()).square().sum()

    assert sanitize_case.main(["--device", "cpu", "--operators", operator]) == 0
    monkeypatch.setattr(sanitize_case, function, slightly_off)
    assert sanitize_case.main(["--device", "cpu", "--operators", operator]) == 1
    printed = capsys.readouterr().out
    assert f"{wrong} is off by" in printed and not any(f": {name} is off" in printed for name in ("y", "gradient 0"))


def test_sanitize_case_says_what_has_no_kernels(monkeypatch, capsys):
    monkeypatch.setattr(sanitize_case.OPERATORS["conv2d"], "devices", ())
    assert sanitize_case.main(["--device", "cpu", "--operators", "conv2d"]) == 0
    assert capsys.readouterr().out.startswith("conv2d: left out: backend 'native' does not run on cpu")
