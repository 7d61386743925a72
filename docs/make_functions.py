"""Writes functions.md: which functions of torch the route by vmap serves.

python docs/make_functions.py
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from kfo_ext.adapt import composed, verified

PAGE = Path(__file__).with_name("functions.md")
KINDS = {
    "Layers and activations": (*verified.LAYERS, *verified.LAYERS_OF_TORCH, "batch_norm"),
    "Elementwise": verified.ELEMENTWISE,
    "Reductions and order": verified.REDUCTIONS,
    "Products": (*verified.PRODUCTS, *(f"linalg.{name}" for name in verified.LINALG)),
    "Shapes and indices": (*verified.SHAPES, *verified.VIEWS),
    "Comparisons": verified.COMPARISONS,
    "New tensors": verified.FACTORIES,
    "Operators and types": verified.METHODS,
    "Changes in place, of a task's own tensors": (*verified.CHANGING, *verified.CHANGING_LAYERS),
}
HEAD = """# Functions of torch in one forward of all tasks

`MAML` and `ANIL` compute all tasks in one forward (`learner.route == "vmap"`) if the network calls only the functions
below. Each is compared with a loop over tasks in float64: value, first and second derivative, in four layouts of its
operands (`python_tests/test_verified.py`). `conv2d` with equal strides and paddings, one group and no dilation, and
batch norm by batch statistics, with a following ReLU, run on kfo_ext's kernels. `python docs/make_functions.py` writes
this page.

`shape`, `size`, `dim` and other questions about a tensor are served too. Everything else goes task by task, and
`learner.route` says why: recurrent layers, branches on values, random factories (`rand`, `randn_like`, `bernoulli`),
hooks, forwards that store something on a module, batch norm in eval mode with running statistics, embeddings with
`max_norm` or `sparse`. Functions made by `torch.jit` are not reported to Python: do not use them in a network.

Small networks and those of our kernels gain most. A network with group norm on large images may be faster task by task:
`route="loop"`.
"""


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for kind, names in KINDS.items():
        listed = ", ".join(f"`{name}`" for name in sorted(set(names)))
        parts.append(f"## {kind}\n\n{fill(listed, 120, break_long_words=False, break_on_hyphens=False)}\n")
    names = {verified.VERIFIED.get(func) or verified.IN_PLACE.get(func) for func in composed.COMPOSED}
    composed_of = ", ".join(f"`{name}`" for name in sorted(name for name in names if name))
    parts.append(
        "## Composed of others\n\nTheir own rule under vmap is missing, slow or wrong in torch 2.13:\n"
        f"{fill(composed_of, 120, break_long_words=False, break_on_hyphens=False)}\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
