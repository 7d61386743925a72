"""The Triton kernels: numbers in Triton's interpreter, registers ahead of time, and what importing does not do.

The interpreter must be on before triton is imported, so a second pytest runs this file with TRITON_INTERPRET=1: there
the tests marked `interpreted` run, and here the others.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from deadlines import seconds
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from bench import triton_resources
from kfo_ext.functional import transform
from kfo_ext.ops.transform import reference
from kfo_ext.ops.transform.op import NATIVE, OPERATOR, TRITON
from kfo_ext.ops.transform.triton import launch
from kfo_ext.problems import Problems
from kfo_ext.testing import (
    CASES,
    LARGE_CASES,
    OUTPUTS,
    Operands,
    assert_close,
    model_case,
    random_operands,
    relative_error,
    run_all,
    truth,
    with_strides,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the second pytest, under Triton's interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="runs without Triton's interpreter")

NEED_ALL = [True, True, True]
# The table of the other backends, and what only these kernels tell apart.
ALL = {
    **CASES,
    # More matrices than chunks, and a last chunk that is shorter.
    "chunks": [(9, 2, 3)],
    # Tiles in every direction beside a small problem; the products with a sum over chunks of B.
    "large": [(1, 17, 65), (1, 4, 3)],
    "large_chunks": [(9, 33, 17)],
    "empty": [],
}
PER_TASK, SHARED = (2, 2), (1, 1)
# Rows and dtype go different ways through the code, so not every pair of them is needed.
WAYS = {"per_task_float32": (PER_TASK, torch.float32), "shared_float64": (SHARED, torch.float64)}
# The interpreter takes long for these: each goes one way.
ONE_WAY = {
    "lane_edges": "per_task_float32",
    "large_chunks": "shared_float64",
    "tile_edges": "shared_float64",
    "chunks": "per_task_float32",
    "primes": "shared_float64",
}


@compiled
@needs_triton
@pytest.mark.parametrize("half", ["numbers", "rules"])
def test_under_the_interpreter(half):
    """The tests marked `interpreted` pass; in two halves, so that each says what it did."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", _HALVES[half]],
        capture_output=True,
        text=True,
        timeout=seconds(600),
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


_HALVES = {"numbers": "equals_truth", "rules": "not equals_truth"}


def check_all(operands: Operands, shapes) -> None:
    expected = truth(operands, shapes)
    for name, actual in run_all(TRITON, operands, Problems(shapes).flat).items():
        assert_close(actual, expected[name], name)


@interpreted
@pytest.mark.parametrize(
    ("case", "way"),
    [(case, way) for case in ALL if case != "empty" for way in WAYS if ONE_WAY.get(case, way) == way],
)
def test_every_order_equals_truth(case, way):
    rows, dtype = WAYS[way]
    check_all(random_operands(ALL[case], 2, rows=rows, dtype=dtype), ALL[case])


@interpreted
@pytest.mark.parametrize(("rows", "dtype"), [((1, 2), torch.float64), ((2, 1), torch.float32)], ids=["R", "L"])
@pytest.mark.parametrize("case", ["conv", "large"])
def test_one_shared_factor_equals_truth(case, rows, dtype):
    check_all(random_operands(ALL[case], 2, rows=rows, dtype=dtype), ALL[case])


@interpreted
def test_the_sum_over_many_tasks_equals_truth_but_for_one_rounding():
    from kfo_ext.ops.transform.triton import kernels

    tasks, width = 2000, 128
    parts, total = torch.rand(tasks, width), torch.empty(1, width)
    table = torch.tensor([[0, 0, 0, width, width, 1]])
    kernels.sum_kernel[(1,)](
        table, parts, parts, total, total, width, width, 0, 0, 1, tasks,
        SHARED_R=True, SHARED_L=False, ROWS=16, COLUMNS=128,
    )  # fmt: skip
    assert relative_error(total, parts.double().sum(0, keepdim=True)) < 6e-8


@interpreted
@pytest.mark.parametrize("rows", [PER_TASK, SHARED], ids=["per_task", "shared"])
@pytest.mark.parametrize("case", ["mixed", "large"])
def test_forward_adds_the_bias(case, rows):
    flat = Problems(ALL[case]).flat
    R, G, L, *_, bias = random_operands(ALL[case], 2, rows=rows)
    assert_close(TRITON.transform(R, G, L, flat, bias), reference.transform(R, G, L, flat, bias), "Y")


@interpreted
def test_groups_with_absent_factors_equal_the_reference():
    problems = Problems([(2, 2, 3), (1, 3, 2), (1, 2, 4)], sides=["RL", "R", "L"])
    sizes = (problems.R.numel, problems.packing.numel, problems.L.numel)
    leaves = [torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in sizes]
    orders = []
    for backend in ("triton", "reference"):
        Y = transform(*leaves, problems, backend=backend)
        first = torch.autograd.grad(Y.square().sum(), leaves, create_graph=True)
        orders.append([Y, *first, *torch.autograd.grad(sum(X.square().sum() for X in first), leaves)])
    for mine, other in zip(*orders, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@interpreted
@pytest.mark.parametrize("shapes", [ALL["conv"], ALL["large_chunks"]], ids=["small", "large"])
def test_outputs_not_needed_are_empty_and_the_rest_unchanged(shapes):
    shapes = [(1, *shapes[0][1:])]
    flat = Problems(shapes).flat
    R, G, L, dY, ddR, ddG, ddL, _ = random_operands(shapes, 1)
    first = TRITON.backward(R, G, L, dY, flat, NEED_ALL)
    second = TRITON.double_backward(R, G, L, dY, ddR, ddG, ddL, flat, [*NEED_ALL, True])
    for need in itertools.product([False, True], repeat=4):
        pairs = list(zip(need, TRITON.double_backward(R, G, L, dY, ddR, ddG, ddL, flat, need), second))
        pairs += zip(need[:3], TRITON.backward(R, G, L, dY, flat, need[:3]), first)
        for needed, actual, expected in pairs:
            assert actual.shape == (expected.shape if needed else (0,)), need
            if needed:
                assert torch.equal(actual, expected), need


@interpreted
@pytest.mark.parametrize("shapes", [ALL["conv"], ALL["large_chunks"]], ids=["small", "large"])
def test_missing_cotangents_are_zeros(shapes):
    shapes = [(1, *shapes[0][1:])]
    flat = Problems(shapes).flat
    operands = random_operands(shapes, 1)
    for missing in itertools.product([False, True], repeat=3):
        given = [None if gone else X for gone, X in zip(missing, operands[4:7])]
        zeros = [torch.zeros_like(X) if gone else X for gone, X in zip(missing, operands[4:7])]
        expected = truth(Operands(*operands[:4], *zeros, operands.bias), shapes)
        outputs = TRITON.double_backward(*operands[:4], *given, flat, [*NEED_ALL, True])
        for name, actual in zip(OUTPUTS["double_backward"], outputs):
            assert_close(actual, expected[name], f"{name}, without {missing}")


@interpreted
@pytest.mark.parametrize("kind", ["transposed", "sliced", "stepped", "expanded"])
@pytest.mark.parametrize("shapes", [[(2, 3, 2)], [(1, 33, 17)]], ids=["small", "large"])
def test_any_strides_on_any_operand(shapes, kind):
    plain = random_operands(shapes, 2)
    check_all(Operands(*(with_strides(X, kind) for X in plain)), shapes)
    if kind == "expanded" and shapes[0][0] > 1:
        for i in range(7):
            check_all(Operands(*(with_strides(X, kind) if i == j else X for j, X in enumerate(plain))), shapes)


@interpreted
def test_degenerate_groups():
    shapes = ALL["mixed"] + ALL["large"]
    for rows in ((0, 0), (1, 1)):
        outputs = run_all(TRITON, random_operands(shapes, 0, rows=rows), Problems(shapes).flat)
        assert outputs["Y"].shape == (0, Problems(shapes).packing.numel)
        for name in ("dR", "dL", "second_R", "second_L"):
            assert outputs[name].shape[0] == rows[0]
            assert not outputs[name].any()
    nothing = random_operands([], 2)
    assert all(output.shape == (2, 0) for output in run_all(TRITON, nothing, []).values())


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_not_finite_stays_where_it_belongs():
    """Nothing leaks from task to task, nor from a padded row or column into a real one."""
    shapes = [(1, 3, 5), (1, 2, 33)]
    flat = Problems(shapes).flat
    clean = random_operands(shapes, 3, dtype=torch.float32)
    expected = run_all(TRITON, clean, flat)
    dirty = Operands(*(X.clone() for X in clean))
    for X in dirty:
        X[1] = float("nan")
    for name, value in run_all(TRITON, dirty, flat).items():
        assert torch.equal(value[::2], expected[name][::2]), name
        assert value[1].isnan().all(), name
    infinite = clean.L.clone().abs()
    infinite[0, 0] = float("inf")
    args = clean.R.abs(), clean.G.abs(), infinite
    torch.testing.assert_close(TRITON.transform(*args, flat), reference.transform(*args, flat))


@interpreted
def test_integer_operands_are_exact():
    shapes = ALL["conv"] + ALL["large"]
    operands = Operands(*(torch.randint(-3, 4, X.shape).float() for X in random_operands(shapes, 2)))
    expected = truth(operands, shapes)
    for name, actual in run_all(TRITON, operands, Problems(shapes).flat).items():
        assert torch.equal(actual.double(), expected[name]), name


@interpreted
def test_gradcheck_and_gradgradcheck():
    problems = Problems([(1, 1, 2)])
    R, G, L, *_, bias = (X.requires_grad_() for X in random_operands(problems.shapes, 1))
    assert gradcheck(lambda *X: transform(*X[:3], problems, bias=X[3], backend="triton"), (R, G, L, bias))
    assert gradgradcheck(lambda *X: transform(*X, problems, backend="triton"), (R, G, L), fast_mode=True)


@interpreted
def test_opcheck():
    shapes = [(2, 2, 3), (1, 2, 1)]
    flat = Problems(shapes).flat
    R, G, L, dY, ddR, _, ddL, bias = (X.requires_grad_() for X in random_operands(shapes, 1))
    torch.library.opcheck(TRITON.transform, (R, G, L, flat, bias))
    torch.library.opcheck(TRITON.backward, (R, G, L, dY, flat, [True, False, True]))
    torch.library.opcheck(TRITON.double_backward, (R, G, L, dY, ddR, None, ddL, flat, [*NEED_ALL, True]))


@interpreted
def test_half_types_and_autocast_run_in_float32():
    problems = Problems([(1, 2, 3)])
    R, G, L, *_ = random_operands(problems.shapes, 1, dtype=torch.bfloat16)
    expected = reference.transform(R.float(), G.float(), L.float(), problems.flat)
    torch.testing.assert_close(transform(R, G, L, problems, backend="triton"), expected.bfloat16())
    with torch.autocast("cpu"):
        torch.testing.assert_close(TRITON.transform(R, G, L, problems.flat), expected)


CHANGES = {
    "R_columns": ("transform", {"R": lambda X: X[:, 1:]}, r"R has 306 columns, but shapes .* need 307"),
    "L_columns": ("backward", {"L": lambda X: X[:, 1:]}, "L has .* columns, but shapes"),
    "G_columns": ("transform", {"G": lambda X: X[:, 1:]}, "G has .* columns, but shapes"),
    "R_rows": ("backward", {"R": lambda X: X[:2]}, "R has 2 rows, but G has 3 tasks: expected 1 or that many"),
    "L_dims": ("transform", {"L": lambda X: X[0]}, r"L has 1 dimensions, expected 2: \(tasks, columns\)"),
    "dY_rows": ("backward", {"dY": lambda X: X[:1]}, "dY has 1 rows, but G has 3"),
    "R_dtype": ("transform", {"R": lambda X: X.float()}, "R has float32, but G has float64: expected one dtype"),
    "G_dtype": ("transform", {"G": lambda X: X.half()}, "G has float16, expected float32 or float64"),
    "bias_rows": ("transform", {"bias": lambda X: X[:2]}, "bias has 2 rows, but G has 3 tasks"),
    "ddR_rows": ("double_backward", {"ddR": lambda X: X[:1]}, "ddR has 1 rows, but R has 3"),
    "ddG_rows": ("double_backward", {"ddG": lambda X: X[:1]}, "ddG has 1 rows, but G has 3"),
    "ddL_columns": ("double_backward", {"ddL": lambda X: X[:, 1:]}, "ddL has .* columns, but shapes"),
    "need": ("backward", {"need": lambda X: X[:1]}, "need has 1 flags, expected 3"),
}


@interpreted
@pytest.mark.parametrize(("order", "change", "message"), CHANGES.values(), ids=CHANGES)
def test_operators_check_their_operands(order, change, message):
    X = random_operands(ALL["mixed"], 3)._asdict() | {"need": [True] * (4 if order == "double_backward" else 3)}
    X.update({name: make(X[name]) for name, make in change.items()})
    flat = Problems(ALL["mixed"]).flat
    operands = {
        "transform": (X["R"], X["G"], X["L"], flat, X["bias"]),
        "backward": (X["R"], X["G"], X["L"], X["dY"], flat, X["need"]),
        "double_backward": (*(X[name] for name in Operands._fields[:7]), flat, X["need"]),
    }[order]
    op = "transform_triton" if order == "transform" else f"transform_{order}_triton"
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(TRITON, order)(*operands)


@interpreted
@pytest.mark.parametrize("flat", [[1, 2], [0, 2, 2], [1, -2, 2], [2**40, 2**40, 1]], ids=str)
def test_operators_check_shapes(flat):
    with pytest.raises(ValueError, match=r"^shapes: "):
        TRITON.transform(*(torch.randn(1, 4) for _ in range(3)), flat)


@interpreted
def test_auto_never_takes_the_interpreter():
    assert OPERATOR.resolve("auto", torch.device("cpu")) == ("reference" if NATIVE is None else "native")
    assert OPERATOR.resolve("triton", torch.device("cpu")) == "triton"


@compiled
def test_a_backend_that_cannot_run_says_why(monkeypatch):
    from kfo_ext.ops import triton_support

    problems = Problems([(1, 2, 2)])
    X = random_operands(problems.shapes, 1)[:3]
    message = r"does not run on cpu: Triton.s interpreter is off"
    monkeypatch.setattr(triton_support, "_INSTALLED", True)
    with pytest.raises(RuntimeError, match=message):
        transform(*X, problems, backend="triton")
    with pytest.raises(RuntimeError, match=message):
        TRITON.transform(*X, problems.flat)
    with pytest.raises(RuntimeError, match="does not run on meta: there are no kernels for meta tensors"):
        OPERATOR.resolve("triton", torch.device("meta"))
    monkeypatch.setattr(triton_support, "_INSTALLED", False)
    with pytest.raises(RuntimeError, match="does not run on cuda: triton is not installed"):
        OPERATOR.resolve("triton", torch.device("cuda"))


@compiled
def test_auto_on_cuda_falls_back_with_a_warning(monkeypatch):
    from kfo_ext.ops import library, triton_support

    cuda = torch.device("cuda")
    monkeypatch.setitem(library._status, "cuda", (False, "of the test"))
    monkeypatch.setattr(triton_support, "_INSTALLED", True)
    assert OPERATOR.resolve("auto", cuda) == "triton"
    monkeypatch.setattr(triton_support, "_INSTALLED", False)
    with pytest.warns(RuntimeWarning, match=r"plain torch on cuda: native: of the test; triton: triton is not inst"):
        assert OPERATOR.resolve("auto", cuda) == "reference"
    monkeypatch.setitem(library._status, "cuda", (True, "of the test"))
    monkeypatch.setitem(library._problems, None, "")
    assert OPERATOR.resolve("auto", cuda) == "native"


def _python(code: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds(120), env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@compiled
def test_importing_and_calling_leave_triton_and_the_driver_alone():
    _python("""
import os, sys, torch, kfo_ext
from kfo_ext.ops import library
from kfo_ext.problems import Problems
from kfo_ext.functional import transform
problems = Problems([(2, 3, 2)])
X = [torch.randn(1, packing.numel, requires_grad=True) for packing in (problems.R, problems.packing, problems.L)]
def work(backend):
    torch.autograd.grad(transform(*X, problems, backend=backend).sum(), X)
for backend in ("auto", "reference"):
    work(backend)
assert "triton" not in sys.modules and not torch.cuda.is_initialized() and not library._problems
child = os.fork()
if not child:
    for backend in ("auto", "reference"):
        work(backend)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""")


@compiled
def test_operators_are_there_without_the_compiled_library():
    _python("""
import importlib.abc, sys, warnings
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "kfo_ext._plan":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
warnings.simplefilter("ignore")
import torch
from kfo_ext.ops.transform import op
assert op.NATIVE is None
assert op.TRITON.transform is torch.ops.kfo_ext.transform_triton.default
""")


class Recorder:
    """Stands for the module of kernels: notes the name and the compile-time arguments of each launch."""

    def __init__(self) -> None:
        self.compiled: set[tuple[str, str]] = set()

    def __getattr__(self, name: str) -> dict:
        def run(*arguments, **options):
            self.compiled.add((name, str(sorted(options.items()))))

        return defaultdict(lambda: run)


class Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func.overloadpacket in ALLOCATING and out.numel() > 0
        return out


ALLOCATING = [getattr(torch.ops.aten, name) for name in ("new_empty", "new_zeros", "empty", "empty_like", "clone")]


def every_call(operands: Operands, flat: list[int]):
    """(launch function, arguments): every order, all needed, and each subset of what is there and needed."""
    R, G, L, dY, ddR, ddG, ddL = operands[:7]
    yield launch.transform, (R, G, L, flat)
    yield launch.backward, (R, G, L, dY, flat, [True] * 3)
    yield launch.double_backward, (*operands[:7], flat, [True] * 4)
    for need in itertools.product((False, True), repeat=3):
        yield launch.backward, (R, G, L, dY, flat, list(need))
    for flags in itertools.product((False, True), repeat=7):
        given = [X if there else None for X, there in zip((ddR, ddG, ddL), flags)]
        yield launch.double_backward, (R, G, L, dY, *given, flat, list(flags[3:]))


@compiled
@pytest.mark.parametrize("rows", [PER_TASK, SHARED], ids=["per_task", "shared"])
@pytest.mark.parametrize("group", ["CNN(4)", "head_5x1600", "conv_64"])
def test_a_call_allocates_its_outputs_and_one_scratch(group, rows, monkeypatch):
    """As `gpu/test_gpu_memory.py` measures on a device."""
    shapes = model_case(4) if group == "CNN(4)" else LARGE_CASES[group]
    monkeypatch.setattr(launch, "_require", lambda device: Recorder())
    # Without data.
    operands = Operands(*(X.to("meta") for X in random_operands(shapes, 2, rows=rows, dtype=torch.float32)))
    for function, arguments in every_call(operands, Problems(shapes).flat):
        function(*arguments)
        with Allocations() as allocations:
            out = function(*arguments)
        outputs = [X for X in (out if isinstance(out, tuple) else (out,)) if X.numel()]
        assert allocations.count <= len(outputs) + 1


@compiled
def test_the_first_double_backward_compiles_nothing_new(monkeypatch):
    recorder, shapes = Recorder(), model_case(2)
    monkeypatch.setattr(launch, "_require", lambda device: recorder)
    calls = list(every_call(random_operands(shapes, 2, rows=SHARED, dtype=torch.float32), Problems(shapes).flat))
    for function, arguments in calls[:2]:
        function(*arguments)
    assert sorted(name for name, _ in recorder.compiled) == ["form_kernel", "form_kernel", "sum_kernel"]
    first = set(recorder.compiled)
    for function, arguments in calls[2:]:
        function(*arguments)
    # What is summed is known when a kernel is compiled: R, L or both.
    assert {name for name, _ in recorder.compiled - first} <= {"sum_kernel"}


@compiled
@needs_triton
def test_kernels_compile_for_amd(monkeypatch):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _, kernel, constants, options in triton_resources.configurations(["omniglot_cnn4"], ["head_R"], torch.float32):
        assert "maxnreg" not in options
        built = triton_resources.compile_for(GPUTarget("hip", "gfx942", 64), kernel, "fp32", constants, options)
        assert ".vgpr_spill_count: 0" in built.asm["amdgcn"]


@compiled
@needs_triton
def test_kernels_compile_without_spills():
    rows = triton_resources.rows
    found = list(rows(groups=["omniglot_cnn4"], products=["head_R"], architectures=[80, 100], dtypes=[torch.float32]))
    found += rows(groups=["mini_imagenet_cnn4"], products=["square"], architectures=[90])
    assert {row.arch for row in found} == {"sm_80", "sm_90", "sm_100"}
    assert all(0 < row.registers <= 255 and row.shared_bytes <= 100_000 for row in found)
    assert not [row for row in found if row.spill_bytes]
