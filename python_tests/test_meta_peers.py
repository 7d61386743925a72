"""bench/meta_*.py: every contender's meta-gradients are right or it is not timed; costs, stages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deadlines import seconds

from bench import (
    data_cost,
    meta_case,
    meta_contenders,
    meta_cost,
    meta_memory,
    meta_ours,
    meta_peers,
    meta_profile,
    meta_torch_func,
    meta_truth,
    precision,
    stages,
)
from kfo_ext.interop.learn2learn import light_import
from kfo_ext.ops import library
from kfo_ext.testing import EagerRecorder

ROOT = Path(__file__).resolve().parent.parent

needs_library = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")

SMALL = {"tasks": 2, "steps": 2, "lr": 0.1}


def peaks_start_anew() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


PEAKS = peaks_start_anew()
needs_peaks = pytest.mark.skipif(not PEAKS, reason="/proc/self/clear_refs is not writable: no peak of memory")


@pytest.fixture
def network():
    """Two blocks of six channels, 12x12 images of two channels, three ways."""
    return meta_case.Network(2, in_channels=2, image_size=12, stride=2, hidden=6, ways=3)


def require(name):
    """Skips where the contender's library is not installed."""
    if "learn2learn" in name:
        try:
            light_import()
        except ImportError as error:
            pytest.skip(str(error).splitlines()[0])
    for peer in ("jax", "torchopt", "higher"):
        if name.startswith(peer):
            pytest.importorskip(peer, exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param("kfo", "ours_native", marks=needs_library),
        pytest.param("kfo", "ours_user", marks=needs_library),
        pytest.param("kfo", "ours_user_loop", marks=needs_library),
        ("kfo", "ours_reference"),
        ("kfo", "learn2learn"),
        ("kfo", "learn2learn_our_kfo"),
        ("kfo", "learn2learn_our_kfo_fast_layers"),
        ("kfo", "learn2learn_fast_layers"),
        ("kfo", "our_gbml"),
        ("kfo", "our_gbml_fast_layers"),
        ("kfo", "by_hand"),
        ("kfo", "by_hand_fast_layers"),
        ("kfo", "by_step"),
        ("kfo", "by_step_fast_layers"),
        ("kfo", "jax_vmap"),
        ("kfo", "torch_func"),
        pytest.param("kfo", "torch_func_ours", marks=needs_library),
        ("maml", "ours"),
        ("maml", "ours_user"),
        ("maml", "learn2learn"),
        ("maml", "learn2learn_fast_layers"),
        ("maml", "our_gbml"),
        ("maml", "our_gbml_fast_layers"),
        ("maml", "by_hand"),
        ("maml", "by_hand_fast_layers"),
        ("maml", "by_step"),
        ("maml", "by_step_fast_layers"),
        ("maml", "torchopt"),
        ("maml", "higher"),
        ("maml", "jax_map_patches"),
        ("maml", "torch_func"),
        pytest.param("maml", "torch_func_ours", marks=needs_library),
    ],
)
def test_meta_gradients_equal_the_trusted_ones(network, method, name):
    require(name)
    case = meta_case.make_case(network, method, dtype=torch.float64, **SMALL)
    truth = meta_truth.find_truth(network, method, **SMALL)
    contender = meta_contenders.CONTENDERS[method][name](case)
    loss = float(contender.run())
    assert meta_truth.error_of(loss, meta_case.flat(contender.gradients()), truth) < 1e-10
    shapes = [X.shape for X in (*case.model.parameters(), *(X for pair in case.factors or [] for X in pair))]
    assert [gradient.shape for gradient in contender.gradients()] == shapes
    # Nothing is left over from one run for the next.
    assert float(contender.run()) == pytest.approx(loss, rel=1e-12)
    assert meta_truth.error_of(loss, meta_case.flat(contender.gradients()), truth) < 1e-10


@needs_library
@pytest.mark.parametrize("form", ["resnet", "dense"])
def test_networks_as_users_write_them(form):
    network = meta_case.Network(2, in_channels=2, image_size=12, stride=1, hidden=4, ways=3, form=form)
    truth = meta_truth.find_truth(network, "kfo", **SMALL)
    functions, rows = meta_truth.verified(network, "kfo", ["ours_user", "ours_user_loop", "jax_vmap"], truth, **SMALL)
    assert set(functions) == {"ours_user", "ours_user_loop"}, rows
    case = meta_case.make_case(network, "kfo", dtype=torch.float64, **SMALL)
    ours = meta_contenders.CONTENDERS["kfo"]["ours_user"](case)
    ours.run()
    assert ours.maml.route == "vmap"


def test_a_replayed_iteration_with_adam_gives_the_same_meta_gradients(network):
    truth = meta_truth.find_truth(network, "kfo", **SMALL)
    case = meta_case.make_case(network, "kfo", dtype=torch.float64, **SMALL)
    ours = meta_ours.OursCaptured(case, recorder=EagerRecorder)
    for _ in range(3):
        loss = float(ours.run())
        assert meta_truth.error_of(loss, meta_case.flat(ours.gradients()), truth) < 1e-10


def test_the_captured_contender_is_left_out_on_the_cpu(network):
    truth = meta_truth.find_truth(network, "kfo", **SMALL)
    functions, rows = meta_truth.verified(network, "kfo", ["ours_native_graph"], truth, **SMALL)
    assert not functions
    reason = "ValueError: cuda_graph: expected a learner on a CUDA device, got one on cpu"
    assert rows["ours_native_graph"]["status"] == reason


def away_from_kinks(network):
    """Makes networks whose ReLUs pass all they get: what batch norm gives is above -10 times its weight."""

    def make(**sizes):
        model = network(**sizes)
        with torch.no_grad():
            for block in model.blocks:
                block.norm.bias.copy_(10 * block.norm.weight)
        return model

    return make


@needs_library
def test_precision_writes_a_row_for_every_option(monkeypatch, tmp_path, capsys):
    # At a kink it is by chance whether float32 errs by 1e-6 or by 1e-2.
    monkeypatch.setattr(meta_case, "CNN", away_from_kinks(meta_case.CNN))
    out = tmp_path / "precision.json"
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert precision.main(["--quick", "--truths", str(tmp_path / "truths"), "--out", str(out)]) == 0
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    result = json.loads(out.read_text())
    assert {"torch", "commit", "command", "settings"} <= set(result)
    rows = {(row["method"], row["option"]): row for row in result["rows"]}
    options = [f"{name}{layout}" for name in ("ieee", "tf32", "bf16") for layout in ("", ", channels last")]
    assert list(rows) == [(method, option) for method in ("kfo", "maml") for option in options]
    for (_, option), row in rows.items():
        if option == "ieee" or option.startswith("bf16"):
            assert row["status"] == "ok" and row["seconds"]["median"] > 0
            low, high = (0, 1e-4) if option == "ieee" else (1e-3, 0.5)
            assert low <= row["gradients error"] < high and row["loss error"] < 0.05
        else:
            assert row["status"].startswith("left out: ") and "has no effect on device 'cpu'" in row["status"]
            assert "seconds" not in row
    assert capsys.readouterr().out.count("left out") == 6


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_torch_func_is_one_graph_for_the_compiler(network):
    truth = meta_truth.find_truth(network, "kfo", **SMALL)
    case = meta_case.make_case(network, "kfo", dtype=torch.float64, **SMALL)
    # Generating code would take minutes; the table has "inductor".
    contender = meta_torch_func.TorchFunc(case, compiled="aot_eager")
    assert meta_truth.error_of(float(contender.run()), meta_case.flat(contender.gradients()), truth) < 1e-10


def test_the_trusted_one_is_itself_checked(network, monkeypatch):
    require("learn2learn")
    assert meta_truth.find_truth(network, "kfo", **SMALL).checked.startswith("against learn2learn: ")
    assert meta_truth.find_truth(network, "kfo", **SMALL).flops > 0
    monkeypatch.setattr(meta_truth, "trusted", lambda case: meta_ours.Ours(case._replace(lr=0.11), plain=True))
    with pytest.raises(AssertionError, match="differ from learn2learn's"):
        meta_truth.find_truth(network, "kfo", **SMALL)


def test_trusted_gradients_are_kept_for_the_same_settings_alone(network, tmp_path, monkeypatch):
    truth = meta_truth.kept_truth(tmp_path / "truths", network, "maml", **SMALL)
    monkeypatch.setattr(meta_truth, "find_truth", lambda *_, **settings: f"anew with {settings}")
    again = meta_truth.kept_truth(tmp_path / "truths", network, "maml", **SMALL)
    assert torch.equal(again.gradients, truth.gradients) and again.gradients.dtype == torch.float64
    assert (again.loss, again.flops, again.checked) == (truth.loss, truth.flops, truth.checked)
    assert meta_truth.kept_truth(None, network, "maml", **SMALL) == f"anew with {SMALL}"
    for other in ((network, "kfo", SMALL), (network, "maml", SMALL | {"lr": 0.2})):
        with pytest.raises(AttributeError, match="_asdict"):
            meta_truth.kept_truth(tmp_path / "truths", *other[:2], **other[2])


def test_the_plain_network_is_the_same(network):
    case = meta_case.make_case(network, "maml", dtype=torch.float64, tasks=1, steps=1)
    x = case.batch.support.x[0]
    torch.testing.assert_close(meta_case.plain_network(case)(x), case.model(x), atol=1e-12, rtol=1e-12)
    assert x.min() >= 0 and x.max() <= 1


def test_one_wrong_gradient_is_a_row_and_not_timed(network, monkeypatch, tmp_path, capsys):

    class Wrong(meta_ours.Ours):
        def gradients(self):
            *first, last = super().gradients()
            return [*first, last + 1e-5]

    class Nan(meta_ours.Ours):
        def gradients(self):
            return [X * float("nan") for X in super().gradients()]

    class Short(meta_ours.Ours):
        def gradients(self):
            return super().gradients()[:-1]

    class Loss(meta_ours.Ours):
        def run(self):
            return super().run() + 1e-5

    def absent(case):
        raise ImportError("not here\nnor there")

    table = {"ours": meta_ours.Ours, "wrong": Wrong, "nan": Nan, "short": Short, "loss": Loss, "absent": absent}
    monkeypatch.setitem(meta_contenders.CONTENDERS, "maml", table)
    monkeypatch.setitem(meta_peers.NETWORKS, "small", network)
    out = tmp_path / "out" / "meta_peers.json"
    arguments = ["--networks", "small", "--methods", "maml", "--tasks", "2", "--steps", "2", "--repeats", "2"]
    truths = ["--truths", str(tmp_path / "truths")]
    assert meta_peers.main([*arguments, *truths, "--only-truths"]) == 0
    assert len(list((tmp_path / "truths").iterdir())) == 1 and not out.exists()
    assert meta_peers.main([*arguments, *truths, "--contenders", *table, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["settings"]["tasks"] == 2 and {"torch", "commit", "command", "torchopt"} <= set(result)
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows["absent"]["status"] == "ImportError: not here"
    for name in ("wrong", "nan", "short", "loss"):
        assert "WRONG" in rows[name]["status"] and "seconds" not in rows[name], name
    assert rows["ours"]["over_ours"] == 1 and rows["ours"]["seconds"]["repeats"] == 2
    memory = rows["ours"]["memory"]
    assert memory["peak"] > 0 if PEAKS else "/proc/self/clear_refs" in memory
    shown = capsys.readouterr().out
    assert "WRONG" in shown and "not here" in shown

    # A run that is cut off has written the tables before.
    out.unlink()
    monkeypatch.setitem(meta_peers.NETWORKS, "later", network)
    monkeypatch.setattr(meta_peers, "measure", cut_off_at("later", meta_peers.measure))
    cut = ["--networks", "small", "later", *arguments[2:], "--contenders", "ours", "--no-memory", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        meta_peers.main(cut)
    assert {row["network"] for row in json.loads(out.read_text())["rows"]} == {"small"}

    # Only a wrong one of ours fails the run.
    monkeypatch.setitem(table, "ours", Wrong)
    assert meta_peers.main([*arguments, "--contenders", "ours", "--no-memory"]) == 1


def cut_off_at(network, measure):
    """`meta_peers.measure`, interrupted at one network."""

    def measure_or_stop(name, *rest):
        if name == network:
            raise KeyboardInterrupt
        return measure(name, *rest)

    return measure_or_stop


@pytest.mark.parametrize("how", [["bench/meta_peers.py"], ["-m", "bench.meta_peers"]], ids=["path", "module"])
def test_a_script_runs_by_its_path_and_as_a_module(how):
    done = subprocess.run(
        [sys.executable, *how, "--help"], capture_output=True, text=True, timeout=seconds(60), cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: meta_peers.py"), done.stderr


def test_unknown_method(network):
    with pytest.raises(ValueError, match="method: expected one of kfo, maml, got 'anil'"):
        meta_case.make_case(network, "anil", tasks=1, steps=1)


def measured(script: str) -> dict[str, int]:
    """Memory of the script's `run`, in a process that does nothing else."""
    code = f"import json, torch\nfrom types import SimpleNamespace\nfrom bench.meta_memory import measure\n{script}\n"
    code += "print(json.dumps(measure(SimpleNamespace(run=run), torch.device('cpu'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds(120), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_peaks
def test_peak_memory_counts_what_lives_at_once():
    memory = measured("""
blocks = iter((6, 3))
def run():
    held = [torch.zeros(4 * 2**20) for _ in range(next(blocks))]
""")
    for name, blocks in (("first", 6), ("peak", 3), ("working", 3)):
        assert memory[name] / 2**24 == pytest.approx(blocks, abs=0.5), name


@needs_peaks
def test_peak_memory_counts_again_what_was_freed():
    memory = measured("""
kept = []
def run():
    # Small pieces, and a last one that stays: the C library keeps what is freed below it, unless it is asked.
    held = [torch.zeros(2**14) for _ in range(256)]
    kept.append(torch.zeros(2**10))
""")
    assert memory["working"] / 2**24 == pytest.approx(1, abs=0.2)


def test_peak_memory_reports_why_there_is_none(network):
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        meta_memory.peak_memory(network, "maml", "nobody", "cpu", **SMALL)


@pytest.mark.parametrize(
    ("names", "operation"),
    [
        (["aten::add"], True),
        (["AddBackward0", "aten::sum"], True),
        (["kfo_ext::conv2d", "Conv2d"], True),
        (["Conv2dBackward"], False),
        (["autograd::engine::evaluate_function: AddBackward0"], False),
    ],
)
def test_operations_in_a_profile(names, operation):
    assert stages.is_operation(names) is operation


def test_cost_writes_points_exponents_and_cliffs(monkeypatch, tmp_path, capsys):
    # Of 4 tasks a price that is too high.
    monkeypatch.setattr(
        meta_cost, "peak_memory", lambda *what, tasks, **_: {"peak": 2**20 * (100 if tasks == 4 else tasks)}
    )
    monkeypatch.setitem(meta_cost.AXES, "tasks", [1, 2, 4])
    out = tmp_path / "cost.json"
    arguments = ["--method", "maml", "--axes", "tasks", "--layers", "1", "--hidden", "4", "--steps", "1"]
    assert meta_cost.main([*arguments, "--repeats", "1", "--out", str(out)]) == 0
    (axis,) = json.loads(out.read_text())["axes"]
    assert [point["tasks"] for point in axis["points"]] == [1, 2, 4]
    assert all(point["seconds"] > 0 for point in axis["points"])
    assert axis["cliffs"]["peak"] == [[2, 4, 50.0]]
    assert axis["exponents"]["peak"] == pytest.approx(math.log2(50))
    assert "CLIFF: peak x 50.00 from tasks = 2 to 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "stage"),
    [
        (["aten::conv2d", "aten::convolution"], "convolution, forward"),
        (["autograd::engine::evaluate_function: ConvolutionBackward0", "aten::add_"], "convolution, backward"),
        (["ConvolutionBackward0", "aten::convolution_backward"], "convolution, backward"),
        (["ConvolutionBackwardBackward0", "aten::_convolution", "aten::convolution"], "convolution, double backward"),
        (["kfo_ext::conv2d"], "convolution, forward"),
        (["Conv2dBackward", "kfo_ext::conv2d_input"], "convolution, backward"),
        (["Conv2dWeightBackward", "kfo_ext::conv2d"], "convolution, double backward"),
        (["aten::batch_norm", "aten::native_batch_norm"], "batch norm + ReLU, forward"),
        (["aten::relu", "aten::clamp_min"], "batch norm + ReLU, forward"),
        (["NativeBatchNormBackward0"], "batch norm + ReLU, backward"),
        (["ReluBackward0", "aten::threshold_backward"], "batch norm + ReLU, backward"),
        (["NativeBatchNormBackwardBackward0", "aten::mul"], "batch norm + ReLU, double backward"),
        (["kfo_ext::batch_norm_relu"], "batch norm + ReLU, forward"),
        (["kfo_ext::batch_norm_relu_backward"], "batch norm + ReLU, backward"),
        (["kfo_ext::batch_norm_relu_double_backward"], "batch norm + ReLU, double backward"),
        (["kfo_ext::transform"], "transform, forward"),
        (["TransformBackward", "kfo_ext::transform_backward_triton"], "transform, backward"),
        (["kfo_ext::transform_double_backward"], "transform, double backward"),
        (["aten::linear", "aten::addmm"], "head and loss"),
        (["NllLossBackward0"], "head and loss"),
        (["aten::cat"], "other torch operations"),
    ],
    ids=lambda value: value[-1].replace("::", ".") if isinstance(value, list) else "",
)
def test_stage_of_an_operation(names, stage):
    assert stages.stage_of(names) == stage


def test_lineage_starts_at_the_outermost_range():
    outer = SimpleNamespace(name="ConvolutionBackwardBackward0", cpu_parent=None)
    inner = SimpleNamespace(name="aten::convolution", cpu_parent=outer)
    assert meta_profile.lineage(inner) == ["ConvolutionBackwardBackward0", "aten::convolution"]


@needs_library
def test_profile_adds_up_to_the_wall_clock(network, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(meta_profile.NETWORKS, "small", network)
    out = tmp_path / "profile.json"
    sizes = ["--networks", "small", "--tasks", "2", "--steps", "2", "--repeats", "1"]
    assert meta_profile.main([*sizes, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(entry["network"], entry["method"]) for entry in result["profiles"]] == [
        ("small", "kfo"),
        ("small", "maml"),
    ]
    kfo, maml = ({row["stage"]: row for row in entry["stages"]} for entry in result["profiles"])
    for entry in result["profiles"]:
        assert sum(row["host"] for row in entry["stages"]) == pytest.approx(entry["wall"])
    for stage in stages.STAGES:
        if stage.startswith(("convolution", "transform")):
            assert kfo[stage]["calls"] > 0, stage
        assert maml[stage]["calls"] == 0 or not stage.startswith("transform")
    assert kfo[meta_profile.OVERHEAD]["host"] > 0
    table = out.with_suffix(".md").read_text()
    assert "Made by `python bench/" in table and table.count("| Python and autograd |") == 2


def test_data_cost_times_sampling_the_iteration_and_the_streams(tmp_path, capsys):
    out = tmp_path / "data_cost.json"
    command = ["--tasks", "2", "--steps", "1", "--classes", "6", "--workers", "0", "1", "--repeats", "1"]
    assert data_cost.main([*command, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert {"processor", "torch", "command", "settings"} <= content.keys()
    names = ["draw", "batch", "sample", "iteration", "stream, workers 0", "stream, workers 1"]
    assert list(content["timings"]) == names
    assert all(timing["median"] > 0 for timing in content["timings"].values())
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names)
    assert printed.count("  iteration ") == 2
