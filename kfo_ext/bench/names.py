"""The names that `kfo bench` accepts, without torch: its help prints them before it imports anything."""

# axis -> the size that grows along it.
AXES = {
    "tasks": "tasks in the meta-batch",
    "layers": "convolutions of the network",
    "width": "p = q of one problem, B = 1",
    "hidden": "hidden layers of the non-linear update",
    "psd": "0: R and L as they are, 1: R^T R and L^T L",
}
# Keys of `points.GROUPS`, `providers.PROVIDERS` and `cases.ORDERS`.
GROUPS = ("CNN(2)", "CNN(4)", "CNN(6)", "conv_64", "head_5x1600")
PROVIDERS = (
    "native",
    "lists",
    "gradient-lists",
    "gradients-on",
    "reference",
    "triton",
    "learn2learn",
    "torch-loop-matmul",
    "torch-loop-einsum",
    "torch-matmul",
    "torch-einsum",
    "torch-formulas",
    "torch-compile",
    "torch-formulas-compile",
    "torch-kron",
    "jax",
)
ORDERS = ("forward", "backward", "double_backward")
