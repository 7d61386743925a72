"""bench/conv_forms.py: every formulation of the convolution is right in every order, or it is not timed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import conv_forms
from bench.meta_case import Network
from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")

NAMES = ["ours", "grouped", "grouped_closed", "loop", "loop_closed", "vmap", "patches"]
ORDERS = ["forward", "backward", "double_backward"]
TASKS = 3


@pytest.fixture
def forms(monkeypatch):
    """The script, with a network of its own: two small layers."""
    tiny = Network(2, in_channels=2, image_size=5, stride=2, hidden=4)
    monkeypatch.setitem(conv_forms.NETWORKS, "tiny", tiny)
    # It is for the whole process, and for good; and threads need no rest before what is not compared.
    monkeypatch.setattr(conv_forms, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(conv_forms, "rested", lambda sample: sample)
    return conv_forms


def by_autograd(operands, layer):
    """The orders' outputs by names, of torch's convolution of each task in turn."""
    x, weight, dy = (X.clone().requires_grad_() for X in operands[:3])
    conv = torch.nn.functional.conv2d
    y = torch.stack(
        [conv(a.movedim(-1, 1), b, stride=layer.stride, padding=1).movedim(1, -1) for a, b in zip(x, weight)]
    )
    dx, dweight = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
    inner = (dweight * operands.ddweight).sum() + (0 if layer.first else (dx * operands.ddx).sum())
    names = ("second_x", "second_weight", "second_dy")
    second = torch.autograd.grad(inner, (x, weight, dy), allow_unused=True)
    return {"y": y, "dx": dx, "dweight": dweight, **dict(zip(names, second))}


@pytest.mark.parametrize("number", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("at_once", [TASKS, 2], ids=["together", "in_groups"])
@pytest.mark.parametrize("name", [*NAMES, "ours_grouped"])
def test_every_order_equals_float64(forms, name, at_once, number):
    layer = forms.layers_of(forms.NETWORKS["tiny"])[number]
    form = (forms.contenders("cpu") | forms.contenders("cuda"))[name]
    operands = forms.random_operands(layer, TASKS)
    expected = by_autograd(operands, layer)
    orders = forms.orders_of(form, operands, layer, at_once)
    assert list(orders) == ORDERS
    assert len(orders["forward"]()) == (TASKS if name.startswith("loop") else -(-TASKS // at_once))
    for order, call in orders.items():
        for _ in range(2):
            outputs = forms.named(form, layer, order, call())
            right = {output: expected[output].detach() for output in outputs}
            assert forms.error_of(outputs, right, 1e-12) <= 1e-12
    assert list(forms.contenders("cpu")) == NAMES


def test_layers_are_those_of_the_network(forms):
    for network in (forms.NETWORKS[name] for name in ("omniglot_cnn4", "cifar_fs_cnn2")):
        x = torch.rand(2, network.in_channels, network.image_size, network.image_size)
        blocks, layers = network.make().blocks, forms.layers_of(network)
        for block, layer in zip(blocks, layers, strict=True):
            y = block(x)
            sizes = layer.in_channels, layer.size, layer.out_channels, layer.out_size
            assert (*x.shape[1:3], *y.shape[1:3]) == sizes
            x = y
        assert [layer.first for layer in layers] == [True, *[False] * (network.layers - 1)]


def test_tasks_go_in_the_groups_of_a_meta_iteration(forms):
    sizes = [forms.group_size(forms.NETWORKS[name], 16, "cpu") for name in ("omniglot_cnn2", "cifar_fs_cnn2")]
    assert sizes == [16, 8]


class WrongSecond(torch.autograd.Function):
    """x * 2, whose derivative is right, and the derivative of that is not."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy + 0.01 * (dy - dy.detach())


@pytest.mark.parametrize(
    ("wrong", "statuses"),
    [
        (lambda y: 1.01 * y, ["WRONG: y is off by", "WRONG: dx is off by", "WRONG: second_x is off by"]),
        (lambda y: y[..., :-1], ["RuntimeError: Mismatch in shape"] * 3),
        (lambda y: y * float("nan"), ["WRONG: y is off by nan", "WRONG: dx is off by nan", "WRONG: second_x"]),
        (lambda y: WrongSecond.apply(y) / 2, ["ok", "ok", "WRONG: second_dy is off by"]),
        (lambda y: y.detach(), ["RuntimeError: element 0 of tensors does not require grad"] * 3),
    ],
    ids=["scaled", "shape", "nan", "second", "no_graph"],
)
def test_a_wrong_contender_is_refused(forms, monkeypatch, wrong, statuses):
    right = forms.PEERS["grouped"]
    monkeypatch.setattr(forms, "PEERS", {"bad": right._replace(conv=lambda *a, **b: wrong(right.conv(*a, **b)))})
    layer = forms.layers_of(forms.NETWORKS["tiny"])[1]
    rows = forms.measure(layer, TASKS, TASKS, "cpu", 1)
    assert [(row["contender"], row["order"]) for row in rows] == [
        (name, order) for order in ORDERS for name in ("ours", "bad")
    ]
    bad = [row for row in rows if row["contender"] == "bad"]
    for row, status in zip(bad, statuses, strict=True):
        assert row["status"].removeprefix("AssertionError: ").startswith(status)
        assert ("seconds" in row) == (status == "ok")
    assert all(row["status"] == "ok" and row["seconds"]["median"] > 0 for row in rows if row["contender"] == "ours")
    entry = {
        "network": "tiny",
        "tasks_at_once": TASKS,
        "rows": [{"layer": 2, "sizes": str(layer)} | row for row in rows],
    }
    table = forms.table(entry)
    assert f"- bad, layer 2, double_backward: {bad[-1]['status']}\n" in table
    # No sum of what is not all there.
    assert table.splitlines()[7].startswith("| sum |  | **") and table.splitlines()[7].endswith("** | - |")


def test_an_output_of_another_shape_is_wrong(forms):
    with pytest.raises(AssertionError, match=r"WRONG: dx is \(2, 1\), expected \(2, 3\)"):
        forms.error_of({"dx": torch.zeros(2, 1)}, {"dx": torch.zeros(2, 3)})


def test_the_fastest_is_bold(forms):
    assert forms.cells([0.002, None, 0.0011, 0.01]) == ["2.00", "-", "**1.10**", "10.00"]
    assert forms.cells([None, None]) == ["-", "-"]


def test_main_writes_both_files(forms, tmp_path, capsys):
    out = tmp_path / "conv_forms.json"
    assert forms.main(["--networks", "tiny", "--tasks", "2", "--repeats", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"torch", "commit", "command", "settings"} <= set(result)
    (entry,) = result["networks"]
    places = [(layer, order, name) for layer in (1, 2) for order in ORDERS for name in NAMES]
    assert [(row["layer"], row["order"], row["contender"]) for row in entry["rows"]] == places
    assert all(row["status"] == "ok" and 0 <= row["error"] < 1e-5 for row in entry["rows"])
    text = out.with_suffix(".md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == f"| layer | order | {' | '.join(NAMES)} |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        *(["| 1: 2x5x5 to 4x3x3", order.replace("_", " ")] for order in ORDERS),
        *(["| 2: 4x3x3 to 4x2x2", order.replace("_", " ")] for order in ORDERS),
        ["| sum", ""],
    ]
    assert all(line.count("**") == 2 for line in lines[2:])
    medians = [row["seconds"]["median"] for row in entry["rows"] if row["contender"] == "ours"]
    assert lines[-1].split(" | ")[2].strip("*") == f"{1e3 * sum(medians):.2f}"
    assert all(f"{name}" in text for name in NAMES)
    assert "### tiny, 2 tasks at once" in capsys.readouterr().out


def test_a_wrong_one_of_ours_is_a_failure(forms, monkeypatch):
    right = forms.conv2d
    monkeypatch.setattr(forms, "conv2d", lambda *a, **b: 2 * right(*a, **b))
    monkeypatch.setattr(forms, "PEERS", {})
    assert forms.main(["--networks", "tiny", "--tasks", "2", "--repeats", "1"]) == 1
