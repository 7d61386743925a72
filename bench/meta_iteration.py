"""One meta-iteration, gradients of network and factors: ours against learn2learn's GBML with KroneckerTransform.

    python bench/meta_iteration.py --device cuda --out meta_iteration.json

times it on a device by every backend of ours, and by learn2learn where that is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfo_ext import KFO, MAML
from kfo_ext.bench.device_timing import events
from kfo_ext.bench.timing import environment, interleaved, wall_clock
from kfo_ext.interop.learn2learn import kronecker_factors, kronecker_factors_to, light_import
from kfo_ext.models import omniglot_cnn
from kfo_ext.tasks import Glyphs, TaskBatch
from kfo_ext.transform import BACKENDS, native

Gradients = list[Tensor]


class Ours:
    """`MAML(model, update=KFO, adapt_update=True)`, factors near the identity."""

    def __init__(
        self, model: nn.Module, batch: TaskBatch, *, lr: float, steps: int, psd: bool = True, backend: str = "auto"
    ) -> None:
        self.kfo = KFO(model.named_parameters(), psd=psd, backend=backend)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for factor in (X for pair in self.kfo.factors() for X in pair):
                factor.add_(torch.randn(factor.shape, generator=generator).to(factor), alpha=0.05)
        self.maml = MAML(model, update=self.kfo, lr=lr, steps=steps, adapt_update=True)
        self.model, self.batch = model, batch

    def run(self) -> Tensor:
        self.maml.zero_grad()
        result = self.maml(self.batch)
        result.loss.backward()
        return result.loss.detach()

    def gradients(self) -> Gradients:
        """Per parameter, then dR and dL per parameter."""
        factors = copy.deepcopy(self.kfo)
        with torch.no_grad():
            for into, parameter in zip(factors.parameters(), self.kfo.parameters(), strict=True):
                into.copy_(parameter.grad)
        return [p.grad for p in self.model.parameters()] + [X.detach() for pair in factors.factors() for X in pair]


class Learn2learn:
    """learn2learn's meta-training loop, from the same model and factors."""

    def __init__(self, model: nn.Module, ours: Ours, batch: TaskBatch, *, lr: float, steps: int, psd: bool) -> None:
        l2l = light_import()
        transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, psd=psd)
        self.gbml = l2l.algorithms.GBML(model, transform=transform, lr=lr, adapt_transform=True)
        self.gbml.to(next(model.parameters()))
        kronecker_factors_to(self.gbml.compute_update, ours.kfo.factors())
        self.batch, self.steps = batch, steps

    def run(self) -> Tensor:
        self.gbml.zero_grad()
        tasks, total = len(self.batch.support.x), 0.0
        for x, y, query_x, query_y in zip(*self.batch.support, *self.batch.query, strict=True):
            learner = self.gbml.clone()
            for _ in range(self.steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            loss = F.cross_entropy(learner(query_x), query_y) / tasks
            loss.backward()
            total += loss.detach()
        return total

    def gradients(self) -> Gradients:
        """Per parameter, then dR and dL per parameter."""
        layers = [module.transform for module in self.gbml.compute_update.transforms_modules]
        pairs = [kronecker_factors(layer.left.grad, layer.right.grad, psd=layer.psd) for layer in layers]
        return [p.grad for p in self.gbml.module.parameters()] + [X for pair in pairs for X in pair]


def seeded(make_model: Callable[[], nn.Module], batch: TaskBatch, dtype: torch.dtype) -> tuple[nn.Module, TaskBatch]:
    """The same model whenever it is called, and the batch, in one dtype and on the batch's device."""
    torch.manual_seed(0)
    return make_model().to(batch.support.x.device, dtype), batch.to(dtype=dtype)


def contenders(
    make_model: Callable[[], nn.Module],
    batch: TaskBatch,
    dtype: torch.dtype,
    *,
    lr: float,
    steps: int,
    psd: bool = True,
) -> tuple[Ours, Learn2learn]:
    """Both ways over the same model, factors and tasks."""
    model, batch = seeded(make_model, batch, dtype)
    ours = Ours(copy.deepcopy(model), batch, lr=lr, steps=steps, psd=psd)
    return ours, Learn2learn(model, ours, batch, lr=lr, steps=steps, psd=psd)


def verify(make_model: Callable[[], nn.Module], batch: TaskBatch, **settings) -> dict[str, float]:
    """Compare loss and meta-gradients of one meta-iteration: in float64 to 1e-10, in float32 roughly.

    Returns: of each contender in float32, the error of all meta-gradients together, relative to float64

    Raises:
        AssertionError: they differ.
    """
    ours, theirs = contenders(make_model, batch, torch.float64, **settings)
    torch.testing.assert_close(ours.run(), theirs.run(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours.gradients(), theirs.gradients(), atol=1e-10, rtol=1e-10)

    truth = _flat(theirs.gradients())
    if not truth.isfinite().all():
        raise AssertionError("the meta-gradients are not finite: choose a smaller lr")
    errors = {}
    for name, contender in zip(
        ("kfo", "learn2learn"), contenders(make_model, batch, torch.float32, **settings), strict=True
    ):
        contender.run()
        errors[name] = ((_flat(contender.gradients()) - truth).norm() / truth.norm()).item()
    # Rounding takes some ReLU to the other side of its kink, here or there by chance: float32 errs by 1e-5 or by 1e-2.
    if not max(errors.values()) <= 0.1:
        raise AssertionError(f"float32 meta-gradients: errors relative to float64 {errors}")
    return errors


def _flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.double().reshape(-1) for gradient in gradients])


def on_device(layers: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """One row per contender: its time, or why there is none. Each is compared with float64 on the CPU first.

    In float64 all meta-gradients together must agree to 1e-8; in float32 roughly, as in `verify`.
    """
    device = torch.device(options.device)
    settings = {"lr": options.lr, "steps": options.steps}
    batch = Glyphs("train").sample(0, options.tasks)

    def make_model() -> nn.Module:
        return omniglot_cnn(layers)

    def ours(backend: str) -> Callable[[torch.dtype], Ours]:
        return lambda dtype: Ours(*seeded(make_model, batch.to(device), dtype), **settings, backend=backend)

    def theirs(dtype: torch.dtype) -> Learn2learn:
        return contenders(make_model, batch.to(device), dtype, **settings)[1]

    makers = {f"kfo {name}": ours(name) for name in BACKENDS if name != "auto"} | {"learn2learn": theirs}
    right = Ours(*seeded(make_model, batch, torch.float64), **settings, backend="reference")
    right.run()
    truth, functions, rows = _flat(right.gradients()), {}, {}
    for name, make in makers.items():
        rows[name] = {"network": f"CNN({layers})", "tasks": options.tasks, "contender": name, "status": "ok"}
        try:
            for dtype, allowed in ((torch.float64, 1e-8), (torch.float32, 0.1)):
                contender = make(dtype)
                contender.run()
                error = ((_flat(contender.gradients()).cpu() - truth).norm() / truth.norm()).item()
                rows[name][f"{dtype} error"] = error
                if not error <= allowed:
                    raise AssertionError(f"WRONG: {dtype} meta-gradients are off by {error:.1e}")
            functions[name] = contender.run
        except Exception as error:  # whatever it is, it is the finding
            rows[name]["status"] = f"{type(error).__name__}: {error}".splitlines()[0]
    sample = events if device.type == "cuda" else wall_clock
    for name, timing in interleaved(functions, options.repeats, sample=sample).items():
        rows[name]["seconds"] = timing._asdict()
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    """1 if a contender of ours gave wrong meta-gradients, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="networks: Omniglot CNN(layers)")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="inner steps")
    parser.add_argument("--lr", type=float, default=0.1, help="inner learning rate")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    # Otherwise convolutions of float32 round to 10 bits on a GPU, in everybody's iteration.
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for layers in options.layers:
        for row in on_device(layers, options):
            rows.append(row)
            time = f"{1e3 * row['seconds']['median']:9.1f} ms" if "seconds" in row else row["status"]
            print(f"{row['network']:8} {row['contender']:16} {time}", flush=True)
    if options.out:
        facts = environment() | {"backends": native.status()}
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts | {"settings": settings, "rows": rows}, indent=1) + "\n")
    return int(any("WRONG" in row["status"] for row in rows if row["contender"].startswith("kfo")))


if __name__ == "__main__":
    raise SystemExit(main())
