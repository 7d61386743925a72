"""Writes methods/README.md: the index of the methods, and what each costs as last measured.

python docs/make_methods.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from bench.method_cases import BASE, CASES, config_of, elements
from bench.method_cost import markdown

PAGE = Path(__file__).parent / "methods" / "README.md"
RESULT = Path(__file__).parent.parent / "bench" / "results" / "method_cost.json"
MEASURE = "python bench/method_cost.py --out bench/results/method_cost.json"


class Entry(NamedTuple):
    """A line of the index, beside its case.

    page: the file that describes the method
    learns: what the outer loop learns beside the network
    adapts: what the inner loop adapts
    """

    page: str
    learns: str
    adapts: str


ENTRIES = {
    "MAML": Entry("maml.md", "nothing", "all parameters"),
    "FOMAML": Entry("maml.md", "nothing", "all parameters"),
    "ANIL": Entry("anil.md", "nothing", "the head"),
    "BOIL": Entry("boil.md", "nothing", "all but the head"),
    "rates per step": Entry("rates-per-step.md", "a rate per tensor and inner step", "all parameters"),
    "Meta-SGD": Entry("meta-sgd.md", "a rate per element", "all parameters"),
    "Meta-Curvature": Entry("meta-curvature.md", "a matrix per axis", "all parameters"),
    "low-rank Cholesky": Entry("low-rank.md", "A of few columns per side", "all parameters and A"),
    "KFO, fixed factors": Entry("kfo.md", "R and L per parameter", "all parameters"),
    "KFO, adapted factors": Entry("kfo.md", "R and L per parameter", "all parameters, R and L"),
    "KFO, two hidden layers": Entry(
        "kfo.md", "R, L and a bias per parameter and layer", "all parameters, R, L and biases"
    ),
    "T-Net": Entry("t-nets.md", "T per layer", "W and b of every layer, not T"),
    "LinNet": Entry("linnet.md", "the head's linear layers", "all parameters, those layers too"),
}
HEAD = """# Methods

A method is a way to adapt a network in the inner loop. `kfo train --method` chooses what is adapted, `--update` how:
every update works with every method. Each page has the equation, the references, code that a test runs, when to use
the method, and its options.

"Learned elements" counts what the outer loop learns beside the {base} elements of the network, CNN(2) for Omniglot.
`python docs/make_methods.py` writes this page.

| method | what it learns | the inner loop adapts | learned elements | command line |
|---|---|---|---|---|
"""
REST = """| [Chain](chain-and-by-name.md) | as its parts, one after another | as its parts | | Python alone |
| [ByName](chain-and-by-name.md) | as its parts, by names of parameters | as its parts | | Python alone |

WarpGrad is out of scope: its layers are not linear, so they add to what a network can compute. The paper leaves it out
for that reason.

## Cost
"""


def page() -> str:
    """The page's text."""
    base = elements(config_of(BASE))
    lines = []
    for name, case in CASES.items():
        entry = ENTRIES[name]
        learned = f"{elements(config_of(name)) - base:,}"
        lines.append(
            f"| [{name}]({entry.page}) | {entry.learns} | {entry.adapts} | {learned} | `{case.command}` |\n",
        )
    cost = markdown(json.loads(RESULT.read_text())) if RESULT.exists() else f"`{MEASURE}` measures it.\n"
    return f"{HEAD.format(base=f'{base:,}')}{''.join(lines)}{REST}\n{cost}"


if __name__ == "__main__":
    PAGE.write_text(page())
