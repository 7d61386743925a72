"""The networks of the paper: CNN(k) for few-shot images, and a small network for regression.

A block is a 3x3 convolution with padding 1, batch norm by batch statistics, ReLU and, for mini-ImageNet, max-pooling.
Convolutions start Xavier-uniform with zero bias. `INITS` names the start of the rest:

    reference   batch-norm weights uniform in (0, 1), head N(0, 1) for Omniglot and Xavier-uniform elsewhere: the start
                of the reference implementations
    zero_head   batch-norm weights 1, head 0: every task starts from equal logits, which lets plain MAML use larger
                inner rates
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _modules

from kfo_ext.choices import INITS
from kfo_ext.functional import batch_norm_relu, conv2d

# (parameters, x) -> output, of all tasks at once: parameters by name, (tasks, *shape); x and output (tasks, n, ...).
TasksForward = Callable[[Mapping[str, Tensor], Tensor], Tensor]

# Bytes of the largest activation that one forward of several tasks makes on a CPU: a larger piece of memory goes back
# to the system as soon as it is free (glibc's largest mmap threshold), and every page of the next one is zeroed again.
LARGEST_ACTIVATION = 32 << 20


class Block(nn.Module):
    """(n, in_channels, h, w) -> (n, hidden, ceil(h / stride) // pool, ceil(w / stride) // pool)."""

    def __init__(self, in_channels: int, hidden: int, *, stride: int, pool: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden, 3, stride=stride, padding=1)
        # Batch statistics always, in training and evaluation: the paper's transductive setting.
        self.norm = nn.BatchNorm2d(hidden, eps=1e-5, track_running_stats=False)
        self.pool = nn.MaxPool2d(pool) if pool > 1 else nn.Identity()
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.norm(self.conv(x))))

    def forward_tasks(
        self, parameters: Mapping[str, Tensor], prefix: str, x: Tensor, channels_last: bool = False
    ) -> Tensor:
        """The same for all tasks, channels last: (tasks, n, h, w, in_channels) -> (tasks, n, h', w', hidden).

        The bias of the convolution is left out: it shifts the mean that batch norm subtracts, and has no gradient.
        """
        weight = parameters[f"{prefix}.conv.weight"]
        stride, padding = self.conv.stride[0], self.conv.padding[0]
        y = conv2d(x, weight, stride=stride, padding=padding, channels_last=channels_last)
        norm = (parameters[f"{prefix}.norm.weight"], parameters[f"{prefix}.norm.bias"])
        y = batch_norm_relu(y.flatten(1, 3), *norm, eps=self.norm.eps).view(y.shape)
        if isinstance(self.pool, nn.Identity):
            return y
        pooled = F.max_pool2d(y.flatten(0, 1).permute(0, 3, 1, 2), self.pool.kernel_size)
        return pooled.permute(0, 2, 3, 1).unflatten(0, y.shape[:2])


class CNN(nn.Module):
    """CNN(layers): blocks, then a linear head on the spatial mean or on the flattened features.

    Args:
        layers: number of blocks.
        in_channels: of the images.
        hidden: channels of every block.
        ways: classes.
        image_size: height and width of the images.
        stride: of every convolution.
        pool: max-pool size after every block, 1 for none.
        mean: whether the head sees the spatial mean (else the flattened features).
        normal_head: with the reference start, head weights from N(0, 1) (Omniglot's), else Xavier-uniform.
        init: one of `INITS`.
        channels_last: whether torch's convolutions compute in that memory format; it changes how fast, not what. The
            compiled ones on the CPU always do.

    Raises:
        ValueError: a number that is not at least 1, an unknown init, or an image that the blocks shrink to nothing.

    Source: paper, section 5 and appendix D.
    """

    def __init__(
        self,
        layers: int,
        *,
        in_channels: int,
        hidden: int,
        ways: int,
        image_size: int,
        stride: int = 1,
        pool: int = 1,
        mean: bool = True,
        normal_head: bool = False,
        init: str = "reference",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        numbers = {
            "layers": layers,
            "in_channels": in_channels,
            "hidden": hidden,
            "ways": ways,
            "image_size": image_size,
        }
        for name, value in {**numbers, "stride": stride, "pool": pool}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
        self.blocks = nn.Sequential(
            *(Block(hidden if i else in_channels, hidden, stride=stride, pool=pool) for i in range(layers))
        )
        self.mean = mean
        self.channels_last = channels_last
        side = image_size
        for _ in range(layers):
            side = -(-side // stride) // pool
        if side < 1:
            raise ValueError(
                f"image_size: {layers} blocks of stride {stride} and pool {pool} leave nothing of {image_size} pixels"
            )
        self.head = nn.Linear(hidden if mean else hidden * side * side, ways)
        self._initialise(init, normal_head)

    def _initialise(self, init: str, normal_head: bool) -> None:
        nn.init.zeros_(self.head.bias)
        if init == "zero_head":
            nn.init.zeros_(self.head.weight)
            return
        for block in self.blocks:
            nn.init.uniform_(block.norm.weight)
        if normal_head:
            nn.init.normal_(self.head.weight)
        else:
            nn.init.xavier_uniform_(self.head.weight)

    def features(self, x: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) -> (n, head.in_features)."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.blocks(x)
        return x.mean(dim=(2, 3)) if self.mean else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) -> (n, ways) logits."""
        return self.head(self.features(x))

    def features_tasks(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`features` of all tasks: (tasks, n, in_channels, h, w) -> (tasks, n, head.in_features)."""
        x = x.movedim(2, -1).contiguous()
        for i, block in enumerate(self.blocks):
            x = block.forward_tasks(parameters, f"blocks.{i}", x, self.channels_last)
        return x.mean(dim=(2, 3)) if self.mean else x.movedim(-1, 2).flatten(2)

    def forward_tasks(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`forward` of all tasks: (tasks, n, in_channels, h, w) -> (tasks, n, ways)."""
        return linear_tasks(parameters, self.features_tasks(parameters, x), prefix="head.")


def linear_tasks(parameters: Mapping[str, Tensor], x: Tensor, *, prefix: str = "") -> Tensor:
    """A linear layer of all tasks: x (tasks, ..., in), weight (tasks, out, in), bias (tasks, out)."""
    weight, bias = parameters[f"{prefix}weight"], parameters[f"{prefix}bias"]
    rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT).view(*x.shape[:-1], weight.shape[1])


def tasks_forward(module: nn.Module) -> TasksForward | None:
    """The forward of `module` for all tasks at once, or None where there is none that does exactly what it does.

    There is one for `CNN` and for `nn.Linear` with a bias, as their constructors leave them: a subclass, a submodule
    that was exchanged, a shared parameter, a method that was replaced and a hook are seen and mean None.
    """
    if _is_plain_linear(module):
        return linear_tasks
    return module.forward_tasks if _is_plain_cnn(module) else None


def tasks_features(model: nn.Module) -> TasksForward | None:
    """The same for the `features` of a model."""
    return model.features_tasks if _is_plain_cnn(model) else None


def tasks_at_once(model: nn.Module, x: Tensor, examples: int) -> int:
    """How many of the tasks of a batch are to be in one forward, at least 1.

    On a CPU a `CNN` takes as many as keep its largest activation below `LARGEST_ACTIVATION`; else all of them.

    x: (tasks, n, ...), such as the tasks' examples are
    examples: of a task, in the largest forward
    """
    if x.device.type != "cpu" or not _is_plain_cnn(model):
        return len(x)
    conv = model.blocks[0].conv
    pixels = math.prod(-(-side // stride) for side, stride in zip(x.shape[-2:], conv.stride))
    size = examples * pixels * conv.out_channels * x.element_size()
    return min(len(x), max(1, LARGEST_ACTIVATION // max(1, size)))


def _is_plain_cnn(model: nn.Module) -> bool:
    return (
        type(model) is CNN
        and _is_plain_linear(model.head)
        and all(_as_built(module) for module in model.modules())
        and all(type(block) is Block and _is_plain_block(block) for block in model.blocks)
        and len(list(model.parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    )


def _is_plain_block(block: Block) -> bool:
    conv, norm = block.conv, block.norm
    return (
        type(conv) is nn.Conv2d
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and len(set(conv.padding)) == len(set(conv.stride)) == 1
        and type(norm) is nn.BatchNorm2d
        and norm.weight is not None
        and norm.bias is not None
        and norm.running_mean is None
        and (type(block.pool) is nn.Identity or _is_plain_pool(block.pool))
    )


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.bias is not None and _as_built(module)


def _is_plain_pool(pool: nn.Module) -> bool:
    return type(pool) is nn.MaxPool2d and pool.extra_repr() == nn.MaxPool2d(pool.kernel_size).extra_repr()


def _as_built(module: nn.Module) -> bool:
    """Whether the module computes what its class says, and its class what it said when this file was imported."""
    kind = type(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (
        not any(hooks)
        and not any(getattr(_modules, name) for name in _GLOBAL_HOOKS)
        and not any(callable(getattr(kind, name, None)) for name in vars(module))
        and all(getattr(kind, name) is method for name, method in _METHODS.get(kind, {}).items())
    )


# Hooks of every module, of torch.nn.modules.module.
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
# The methods that the forward of all tasks stands for, as they are when this file is imported.
_METHODS: dict[type, dict[str, object]] = {
    kind: {name: getattr(kind, name) for name in ("__call__", "forward", *own)}
    for kind, own in {
        CNN: ("features", "features_tasks", "forward_tasks"),
        Block: ("forward_tasks",),
        nn.Conv2d: ("_conv_forward",),
        nn.BatchNorm2d: ("_check_input_dim",),
        nn.Linear: (),
        nn.MaxPool2d: (),
        nn.Identity: (),
        nn.Sequential: (),
    }.items()
}


def omniglot_cnn(
    layers: int = 2, ways: int = 5, hidden: int = 32, init: str = "reference", channels_last: bool = False
) -> CNN:
    """CNN(layers) for 1x28x28 images: stride-2 blocks, spatial mean (paper, appendix D)."""
    return CNN(
        layers,
        in_channels=1,
        hidden=hidden,
        ways=ways,
        image_size=28,
        stride=2,
        normal_head=True,
        init=init,
        channels_last=channels_last,
    )


def cifar_fs_cnn(
    layers: int = 2, ways: int = 5, hidden: int = 32, init: str = "reference", channels_last: bool = False
) -> CNN:
    """CNN(layers) for 3x32x32 images: stride-1 blocks, spatial mean (paper, appendix D)."""
    return CNN(layers, in_channels=3, hidden=hidden, ways=ways, image_size=32, init=init, channels_last=channels_last)


def sinusoid_mlp(hidden: int = 40) -> nn.Sequential:
    """(n, 1) -> (n, 1): two hidden layers of `hidden` ReLU units (Finn et al. 2017, section 5.1)."""
    return nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
