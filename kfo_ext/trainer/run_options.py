"""The options of every run, independent of its parts. No torch."""

from __future__ import annotations

from kfo_ext.choices import MOST_THREADS, PRECISIONS

from .options import MACHINE, TRAINING, Option

RUN = {
    "first_order": Option(kind=bool, default=False, help="take the inner gradients as constants", role=TRAINING),
    "checkpoint_inner": Option(
        kind=bool,
        default=False,
        help="recompute the inner steps in the backward pass to save memory",
        role=TRAINING,
    ),
    "steps": Option(kind=int, default=5, help="inner steps", least=0),
    "inner_lr": Option(kind=float, default=0.1, help="inner learning rate", least=0),
    "meta_lr": Option(kind=float, default=0.003, help="outer learning rate", positive=True, role=TRAINING),
    "meta_lr_update": Option(
        kind=float,
        default=None,
        shown="meta_lr",
        help="outer learning rate of the update's meta-parameters, which follows the same schedule",
        positive=True,
        role=TRAINING,
    ),
    "meta_lr_warmup": Option(
        kind=int,
        default=0,
        help="meta-iterations in which the outer learning rate rises; its schedule begins then",
        least=0,
        role=TRAINING,
    ),
    "clip_norm": Option(
        kind=float,
        default=0.0,
        help="largest norm of the meta-gradient, longer ones are scaled; 0 is no limit",
        least=0,
        role=TRAINING,
    ),
    "meta_batch": Option(kind=int, default=16, help="tasks of a meta-batch", least=1, role=MACHINE),
    "accumulate": Option(
        kind=int,
        default=1,
        help="meta-batches of a meta-iteration, whose meta-gradients are averaged",
        least=1,
        role=TRAINING,
    ),
    "iterations": Option(kind=int, default=1000, help="meta-iterations", least=1, role=TRAINING, resumable=True),
    "seed": Option(
        kind=int, default=0, help="seed of the parameters and of the training tasks", least=0, role=TRAINING
    ),
    "validation_every": Option(
        kind=int,
        default=100,
        help="meta-iterations between two validations, each followed by a save",
        least=1,
        role=TRAINING,
    ),
    "validation_tasks": Option(kind=int, default=200, help="tasks of one validation", least=2, role=TRAINING),
    "patience": Option(
        kind=int,
        default=0,
        help="stop after this many validations without a better one; 0 is never",
        least=0,
        role=TRAINING,
        resumable=True,
    ),
    "workers": Option(
        kind=int,
        default=0,
        help="threads that prepare tasks",
        least=0,
        most=MOST_THREADS,
        role=MACHINE,
        resumable=True,
    ),
    # The number of threads affects the rounding of torch's own sums.
    "threads": Option(
        kind=int,
        default=0,
        help="threads of torch; 0 leaves torch's own choice",
        least=0,
        most=MOST_THREADS,
        role=MACHINE,
        resumable=True,
    ),
    "dtype": Option(kind=str, default="float32", help="floating-point type", choices=("float32", "float64")),
    "device": Option(kind=str, default="cpu", help="device of torch, such as cpu or cuda:0", role=MACHINE),
    "precision": Option(
        kind=str,
        default="ieee",
        help="of the network's convolutions: float32 as it is, tf32 (CUDA), or bf16 for the whole forward",
        choices=PRECISIONS,
    ),
    "cuda_graph": Option(
        kind=bool,
        default=False,
        help="capture a whole meta-iteration as one CUDA graph, and replay it",
        role=TRAINING,
        resumable=True,
    ),
}
