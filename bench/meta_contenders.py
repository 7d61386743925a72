"""The table of contenders: the implementations of the meta-iteration, by method and name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench import meta_task_loops
from bench.meta_case import Contender, MetaCase
from bench.meta_jax import Jax
from bench.meta_ours import Ours, OursCaptured
from bench.meta_torch_func import TorchFunc, TorchFuncFast
from kfo_ext.ops.dispatch import BACKENDS

Factory = Callable[[MetaCase], Contender]

FUNCTIONAL: dict[str, Factory] = {
    "jax_vmap": partial(Jax, tasks="vmap"),
    "jax_map": partial(Jax, tasks="map"),
    "jax_vmap_patches": partial(Jax, tasks="vmap", patches=True),
    "jax_map_patches": partial(Jax, tasks="map", patches=True),
    "torch_func": TorchFunc,
    "torch_func_ours": TorchFuncFast,
    "torch_func_compiled": partial(TorchFunc, compiled="inductor"),
}
LOOPS: dict[str, Factory] = {
    "our_gbml": meta_task_loops.our_gbml,
    "our_gbml_fast_layers": partial(meta_task_loops.our_gbml, fast=True),
    "learn2learn_fast_layers": partial(meta_task_loops.learn2learn, fast=True),
    "by_hand": meta_task_loops.by_hand,
    "by_hand_fast_layers": partial(meta_task_loops.by_hand, fast=True),
    "by_step": meta_task_loops.by_step,
    "by_step_fast_layers": partial(meta_task_loops.by_step, fast=True),
}
CONTENDERS: dict[str, dict[str, Factory]] = {
    "kfo": {f"ours_{backend}": partial(Ours, backend=backend) for backend in BACKENDS if backend != "auto"}
    | {
        "ours_user": partial(Ours, backend="native", plain=True),
        "ours_user_loop": partial(Ours, backend="native", plain=True, route="loop"),
        "ours_native_graph": partial(OursCaptured, backend="native"),
    }
    | {
        "learn2learn": meta_task_loops.learn2learn,
        "learn2learn_our_kfo": partial(meta_task_loops.learn2learn, our_kfo=True),
        "learn2learn_our_kfo_fast_layers": partial(meta_task_loops.learn2learn, our_kfo=True, fast=True),
    }
    | LOOPS
    | FUNCTIONAL,
    "maml": {
        "ours": Ours,
        "ours_user": partial(Ours, plain=True),
        "learn2learn": meta_task_loops.learn2learn,
        "torchopt": meta_task_loops.torchopt,
        "higher": meta_task_loops.higher,
    }
    | LOOPS
    | FUNCTIONAL,
}


def trusted(case: MetaCase) -> Ours:
    """kfo_ext with the plain-torch transform, on torch.nn's own network, task by task."""
    return Ours(case, backend="reference", plain=True, route="loop")
