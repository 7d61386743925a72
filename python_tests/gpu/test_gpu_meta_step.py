"""A meta-iteration captured as one CUDA graph: the same as eager ones, optimizer included; options of convolutions."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch

from kfo_ext import ANIL, KFO, MAML
from kfo_ext.networks import omniglot_cnn
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.testing import EagerRecorder
from kfo_ext.trainer import Config, Trainer
from kfo_ext.trainer.captured_step import CapturedMetaStep
from kfo_ext.trainer.meta_step import MetaStep, outer_rate
from kfo_ext.trainer.optimizers import OPTIMIZERS
from kfo_ext.trainer.precision import convolution_precision

pytestmark = pytest.mark.gpu

TASKS, WAYS = 4, 5
RATES = [0.01, 0.003, 0.02, 0.007, 0.01]
# Adam makes a step of any size up to the rate of a float32 gradient that is nothing but rounding.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
LEARNERS = {
    "maml": (MAML, {"adapt_update": True}),
    "by-task": (MAML, {"adapt_update": True, "route": "loop"}),
    "first-order": (MAML, {"adapt_update": True, "first_order": True}),
    "anil": (ANIL, {"adapt_update": True}),
}


@pytest.fixture(autouse=True)
def ieee():
    with convolution_precision("ieee"):
        yield


def make_learner(kind, dtype, device, backend="auto", **changes) -> MAML:
    learner, options = LEARNERS[kind]
    torch.manual_seed(0)
    model = omniglot_cnn(2, hidden=8).to(dtype)
    update = KFO((model if learner is MAML else model.head).named_parameters(), backend=backend)
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    return learner(model, update=update, lr=0.1, steps=3, **{**options, **changes}).to(device)


def make_batch(seed, dtype, device, tasks=TASKS) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def examples(count: int) -> Examples:
        x = torch.rand(tasks, count, 1, 28, 28, generator=generator, dtype=torch.float64).to(dtype)
        return Examples(x, torch.randint(0, WAYS, (tasks, count), generator=generator))

    return TaskBatch(examples(10), examples(5)).to(device)


def make_step(learner: MAML, graph: bool, optimizer: str = "adam", settings=None, **options) -> MetaStep:
    parameters = list(learner.parameters())
    groups = [{"params": parameters, "lr": outer_rate(1.0, parameters[0].device)}]
    outer = OPTIMIZERS[optimizer].make(groups, **(settings or {}))
    if not graph:
        return MetaStep(learner, outer, **options)
    if parameters[0].device.type == "cuda":
        return CapturedMetaStep(learner, outer, **options)
    # KFO_TEST_DEVICE=cpu: everything but the capture.
    outer.param_groups[0]["lr"] = torch.tensor(1.0, dtype=torch.float64)
    return CapturedMetaStep(learner, outer, recorder=EagerRecorder(learner), **options)


def state_of(step: MetaStep) -> dict[str, torch.Tensor]:
    """Parameters and Adam's state, but for what has no gradient but rounding: Adam makes steps of it."""
    return {
        f"{name} {kind}": X.detach().clone()
        for name, p in step.learner.named_parameters()
        if not name.endswith("conv.bias")
        for kind, X in {"value": p, **step.optimizer.state[p]}.items()
    }


def assert_close(a: MetaStep, b: MetaStep, tolerance: float) -> None:
    ours, theirs = state_of(a), state_of(b)
    for name, X in theirs.items():
        error = (ours[name].double() - X.double()).abs().max() / X.double().abs().max().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


@dtypes
@pytest.mark.parametrize("clip_norm", [0.0, 0.05], ids=["free", "clipped"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_captured_iterations_equal_eager_ones(device, kind, clip_norm, dtype):
    steps = [make_step(make_learner(kind, dtype, device), graph, clip_norm=clip_norm) for graph in (True, False)]
    for number, rate in enumerate(RATES):
        batch = make_batch(number, dtype, device)
        report, expected = (step(batch, rate).on_host() for step in steps)
        for name, a, b in zip(report._fields, report, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=name)
        assert_close(*steps, TOLERANCE[dtype])
    assert {X.item() for name, X in state_of(steps[0]).items() if name.endswith(" step")} == {float(len(RATES))}


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adam", {"weight_decay": 0.1}),
        ("adamw", {}),
        ("sgd", {}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_optimizers_accumulate_and_leave_out_what_is_not_finite(device, optimizer, settings, graph):
    """Two meta-batches as one larger one; the first iteration is not finite, and changes nothing."""
    step = make_step(make_learner("maml", torch.float64, device), graph, optimizer, settings)
    plain = make_step(make_learner("maml", torch.float64, device), False, optimizer, settings)
    broken = make_batch(9, torch.float64, device)
    broken.query.x[1] = math.nan
    start = copy.deepcopy(step.learner.state_dict())
    with pytest.raises(FloatingPointError, match=f"the query loss of task {TASKS + 1} is nan"):
        step.check_finite(step([make_batch(8, torch.float64, device), broken], 0.01).on_host())
    same = (torch.equal(X, start[name]) for name, X in step.learner.state_dict().items() if torch.is_tensor(X))
    assert all(same)
    for number, rate in enumerate(RATES):
        pair = [make_batch(2 * number + half, torch.float64, device) for half in (0, 1)]
        whole = TaskBatch(*(Examples(*map(torch.cat, zip(*part))) for part in zip(*pair)))
        step(pair, rate)
        plain(whole, rate)
    assert_close(step, plain, 1e-6)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_each_backend_is_captured(cuda, backend):
    try:
        steps = [make_step(make_learner("maml", torch.float64, cuda, backend), graph) for graph in (True, False)]
        steps[1](make_batch(9, torch.float64, cuda), 0.0)
    except RuntimeError as error:
        pytest.skip(str(error))
    steps[0](make_batch(9, torch.float64, cuda), 0.0)
    for number, rate in enumerate(RATES[:3]):
        for step in steps:
            step(make_batch(number, torch.float64, cuda), rate)
    assert_close(*steps, 1e-10)


@dtypes
def test_captured_in_the_middle(device, dtype):
    """The warm-up is undone: of Adam's state, too, and of the random state."""
    learner = make_learner("maml", dtype, device)
    eager = make_step(learner, False)
    for number in range(2):
        eager(make_batch(number, dtype, device), RATES[number])
    twin = copy.deepcopy(learner)
    second = make_step(twin, True)
    for p, q in zip(learner.parameters(), twin.parameters(), strict=True):
        second.optimizer.state[q] = {name: X.clone() for name, X in eager.optimizer.state[p].items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    for number in range(2, 5):
        second(make_batch(number, dtype, device), RATES[number])
        eager(make_batch(number, dtype, device), RATES[number])
        assert_close(second, eager, TOLERANCE[dtype])
    assert torch.equal(torch.get_rng_state(), rng[0])
    if rng[1] is not None:
        assert torch.equal(torch.cuda.get_rng_state(device), rng[1])


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_what_is_not_finite_leaves_everything_as_it_was(device, graph):
    step = make_step(make_learner("maml", torch.float32, device), graph, clip_norm=1.0)
    step(make_batch(0, torch.float32, device), 0.01)
    before = state_of(step)
    batch = make_batch(1, torch.float32, device)
    batch.query.x[2] = math.nan
    with pytest.raises(FloatingPointError, match="the query loss of task 2 is nan"):
        step.check_finite(step(batch, 0.01).on_host())
    assert all(torch.equal(X, before[name]) for name, X in state_of(step).items())
    step.check_finite(step(make_batch(1, torch.float32, device), 0.01).on_host())
    assert all(not torch.equal(X, before[name]) for name, X in state_of(step).items() if name.endswith(" step"))


@pytest.mark.parametrize("kind", LEARNERS)
def test_no_eager_iteration_waits_for_the_device(cuda, kind):
    step = make_step(make_learner(kind, torch.float32, cuda), False, clip_norm=1.0)
    batch = make_batch(0, torch.float32, cuda)
    for _ in range(2):
        step(batch, 0.01)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        report = step(batch, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.check_finite(report.on_host())


def test_a_replay_follows_another_stream(cuda):
    steps = [make_step(make_learner("maml", torch.float32, cuda), graph) for graph in (True, False)]
    side = torch.cuda.Stream()
    for number, rate in enumerate(RATES):
        batch = make_batch(number, torch.float32, cuda)
        steps[1](batch, rate)
        torch.cuda.synchronize()
        with torch.cuda.stream(side if number % 2 else torch.cuda.current_stream()):
            steps[0](batch, rate)
        torch.cuda.synchronize()
    assert_close(*steps, TOLERANCE[torch.float32])


READS_A_VALUE = """
import torch
from kfo_ext import MAML
from kfo_ext.tasks import Examples, TaskBatch
from kfo_ext.trainer.captured_step import CapturedMetaStep
from kfo_ext.trainer.meta_step import make_adam

def loss(output, y):
    return (output - y).square().mean() * (output.max().item() > -9)

learner = MAML(torch.nn.Linear(3, 2).cuda(), lr=0.1, steps=2, loss=loss)
examples = Examples(torch.ones(2, 4, 3).cuda(), torch.ones(2, 4, 2).cuda())
step = CapturedMetaStep(learner, make_adam(learner.parameters(), 0.1))
before = [p.detach().cpu() for p in learner.parameters()]
stream = torch.cuda.current_stream()
try:
    step(TaskBatch(examples, examples), 0.01)
except RuntimeError as error:
    print(error)
assert torch.cuda.current_stream() == stream
assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(before, learner.parameters()))
print("unchanged")
"""


def test_what_cannot_be_captured_says_why(cuda):
    """In a process of its own: a capture that failed may leave torch's allocator or generator in the middle of it."""
    done = subprocess.run([sys.executable, "-c", READS_A_VALUE], capture_output=True, text=True, timeout=120)
    assert "cuda_graph: the meta-iteration cannot be captured: " in done.stdout, done.stdout + done.stderr[-2000:]
    assert "capturing" in done.stdout
    assert done.stdout.endswith("unchanged\n"), done.stdout + done.stderr[-2000:]


TINY = {
    "shots": 2, "queries": 2, "hidden": 4, "steps": 2, "meta_batch": 2, "validation_tasks": 4,
    "iterations": 4, "validation_every": 2, "dtype": "float64", "schedule": "half_life",
    "meta_lr_half_life": 2, "device": "cuda",
}  # fmt: skip


@pytest.mark.parametrize("options", [{"ways": 2}, {"ways": 2, "method": "anil"}, {"dataset": "sinusoid"}], ids=str)
def test_a_captured_run_resumes_and_equals_an_eager_one(cuda, options, tmp_path):
    config = Config(**{**TINY, **options})
    whole = Trainer.start(config, tmp_path / "eager")
    whole.fit()
    parts = {**TINY, **options, "iterations": 2, "cuda_graph": True}
    Trainer.start(Config(**parts), tmp_path / "parts").fit()
    second = Trainer.resume(tmp_path / "parts", iterations=4)
    assert type(second.meta_step) is CapturedMetaStep
    second.fit()
    assert_close(second.meta_step, whole.meta_step, 1e-10)
    # An eager part may follow a captured one.
    Trainer.resume(tmp_path / "parts", iterations=5, cuda_graph=False).fit()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("precision", "allowed"), [("ieee", 1e-4), ("tf32", 0.1), ("bf16", 0.3)])
def test_options_of_the_convolutions(cuda, precision, allowed, channels_last):
    """Meta-gradients are ill-conditioned: bfloat16's 8 bits are wrong by several percent after three steps."""

    def gradients(dtype, **changes):
        learner = make_learner("maml", dtype, cuda, **changes)
        learner.model.channels_last = channels_last and dtype == torch.float32
        loss = learner(make_batch(0, dtype, cuda)).loss
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(learner.update.parameters()))])

    with convolution_precision(precision):
        rough = gradients(torch.float32, bf16=precision == "bf16")
    right = gradients(torch.float64)
    error = (rough - right).norm() / right.norm()
    assert error < allowed
    # TF32 is a permission, which torch need not use; bfloat16 is not.
    assert (error > 1e-3) == (precision == "bf16") or precision == "tf32"
