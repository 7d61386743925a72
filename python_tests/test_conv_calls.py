"""How many convolutions a meta-iteration runs where `conv2d` has no kernels, as on CUDA: one of all tasks at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kfo_ext import KFO, MAML
from kfo_ext.functional import conv2d
from kfo_ext.networks import CNN
from kfo_ext.ops.conv2d import grouped
from kfo_ext.ops.conv2d.autograd import GROUPED
from kfo_ext.ops.conv2d.op import OPERATOR
from kfo_ext.tasks import Examples, TaskBatch

TASKS, WAYS = 16, 3
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setattr(OPERATOR, "devices", ())


class Convolutions(TorchDispatchMode):
    """The groups and dtype of every convolution and `convolution_backward` of torch, those in our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] = []
        self.dtypes: set[torch.dtype] = set()
        self.copies = 0
        self.kernels = dict(zip(GROUPED[:3], grouped.OPERATORS.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.kernels:
            with self:
                return self.kernels[func](*args)
        places = {aten.convolution.default: 8, aten.convolution_backward.default: 9}
        if func in places:
            self.groups.append(args[places[func]])
            self.dtypes.add(args[0].dtype)
        self.copies += func is aten.clone.default
        return func(*args, **(kwargs or {}))


def convolutions(layers: int, bf16: bool = False) -> Convolutions:
    """Those of a meta-iteration of second order."""
    torch.manual_seed(0)
    model = CNN(layers, in_channels=1, hidden=4, ways=WAYS, image_size=16, stride=2)
    learner = MAML(model, update=KFO(model.named_parameters()), lr=0.1, steps=5, adapt_update=True, bf16=bf16)
    labels = torch.randint(0, WAYS, (TASKS, 4))
    batch = TaskBatch(*(Examples(torch.randn(TASKS, 4, 1, 16, 16), labels) for _ in range(2)))
    learner(batch)  # chooses the route
    with Convolutions() as seen:
        learner(batch).loss.backward()
    return seen


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(("layers", "most"), [(2, 70), (4, 166)])
def test_no_convolution_of_a_meta_iteration_is_of_one_task(layers, most, bf16):
    seen = convolutions(layers, bf16)
    assert set(seen.groups) == {TASKS}
    assert len(seen.groups) <= most
    assert seen.dtypes == {torch.bfloat16 if bf16 else torch.float32}


def test_the_derivatives_of_torch_are_loops_over_tasks(monkeypatch):
    monkeypatch.setattr(OPERATOR, "families", {"native": None})
    assert convolutions(2).groups.count(1) > 70


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_images_are_copied_once_for_all_that_read_them(channels_last):
    x = torch.randn(3, 2, 6, 5, 4, requires_grad=True)
    weight = torch.randn(3, 7, 4, 3, 3, requires_grad=True)
    with Convolutions() as seen:
        y = conv2d(x, weight, stride=2, padding=1, channels_last=channels_last)
    assert seen.copies == 1
    dy = torch.randn(y.shape)
    with Convolutions() as seen:
        dx, _ = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
    assert seen.copies == 1
    ddx = torch.randn(dx.shape)
    with Convolutions() as seen:
        torch.autograd.grad(dx, weight, ddx)
    assert seen.copies == 1
