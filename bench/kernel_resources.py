"""A table of what every compiled kernel needs, per architecture: registers, shared memory, spills. No GPU is needed.

    python bench/kernel_resources.py --out bench/results/kernel_resources.json

writes the JSON and, beside it, the same as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cuda_resources
import triton_resources

from kfo_ext import _plan
from kfo_ext.testing import model_case
from kfo_ext.trainer.run_folder import environment
from kfo_ext.transform import Problems

TASKS = 16
GROUPS = {"omniglot_cnn2": model_case(2), "omniglot_cnn4": model_case(4), "head_5x1600": [(1, 5, 1600)]}
ORDERS = ("forward", "backward", "double_backward")


def launches() -> list[dict[str, object]]:
    """The CUDA library's launches for the paper's groups, with their blocks and bytes of shared memory."""
    return [
        {"group": name, "order": order, "kernel": kernel, "blocks": blocks, "shared_bytes": shared_bytes}
        for name, shapes in GROUPS.items()
        for number, order in enumerate(ORDERS, 1)
        for kernel, blocks, shared_bytes in _plan.cuda_launches(Problems(shapes).flat, TASKS, number, element_size=4)
    ]


def markdown(result: dict) -> str:
    """The result as three tables."""

    def table(rows: list[dict]) -> str:
        names = list(rows[0])
        lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    machine = result["environment"]
    return "\n\n".join(
        [
            "# What the kernels need",
            f"Made by `python bench/kernel_resources.py` from commit {machine['commit'][:12]}; "
            f"nvcc {_plan.build_info()['nvcc']}.",
            "## CUDA library\n\nRead from its machine code. Shared memory is dynamic: see the launches.",
            table(result["cuda"]),
            f"## Launches of the CUDA library\n\nfloat32, {TASKS} tasks, every output wanted.",
            table(result["launches"]),
            "## Triton\n\nCompiled ahead of time.",
            table(result["triton"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table goes beside it as .md")
    options = parser.parse_args()
    result = {
        "environment": environment(),
        "nvcc": _plan.build_info()["nvcc"],
        "cuda": [row._asdict() for row in cuda_resources.rows()],
        "launches": launches(),
        "triton": [row._asdict() for row in triton_resources.rows()],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(result) + "\n")
    spilling = [row for kind in ("cuda", "triton") for row in result[kind] if cuda_resources.spills(row)]
    print(f"{len(result['cuda'])} CUDA and {len(result['triton'])} Triton kernels, {len(spilling)} with spills")


if __name__ == "__main__":
    main()
