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

    Attributes:
        page: the file that describes the method.
        learns: the meta-parameters besides the network, in words.
        adapts: the parameters that the inner loop adapts, in words.
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
    "LinNet, ANIL": Entry("linnet.md", "the head's linear layers", "those layers"),
}
HEAD = """# Methods

A method is a way to adapt a network in the inner loop. `kfo train --method` chooses what is adapted, `--update` how:
every update works with every method. Each page has the equation, the references, code that a test runs, when to use
the method, and its options.

"Learned elements" counts what the outer loop learns beside the {base} elements of the network, CNN(2) for Omniglot.
`python docs/make_methods.py` writes this page.

| method | what it learns beside the network | the inner loop adapts | learned elements | command line |
|---|---|---|---|---|
"""
REST = """| [Chain](chain-and-by-name.md) | as its parts, one after another | as its parts | | Python alone |
| [ByName](chain-and-by-name.md) | as its parts, by names of parameters | as its parts | | Python alone |

WarpGrad is out of scope: its layers are not linear, so they add to what a network can compute. The paper leaves it out
for that reason.

## Compare methods on a network of your own

`kfo train` trains the networks of its list (`kfo train --help`). A network of your own is trained in Python, and a
fixed list of tasks gives every method the same test. `CifarFs(root, "train")` and `CifarFs(root, "test")` take the
place of `Glyphs` for CIFAR-FS.

```python
import torch
from kfo_ext import ANIL, KFO, MAML, MetaCurvature, MetaSGD
from kfo_ext.networks import LinNet, TNet
from kfo_ext.tasks import Glyphs
from kfo_ext.trainer import evaluate, mean_interval, paired_difference


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, stride=2),
            torch.nn.BatchNorm2d(16),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(4),
            torch.nn.Flatten(),
        )
        self.fc = torch.nn.Linear(16 * 3 * 3, 5)

    def features(self, x):  # for ANIL alone
        return self.body(x)

    def forward(self, x):
        return self.fc(self.features(x))


def learners(lr=0.1, steps=2):
    network, inner = Network(), {"lr": lr, "steps": steps}
    yield "MAML", MAML(network, **inner)
    network = Network()
    yield "Meta-SGD", MAML(network, update=MetaSGD(network.named_parameters()), **inner)
    network = Network()
    yield "Meta-Curvature", MAML(network, update=MetaCurvature(network.named_parameters()), **inner)
    network = Network()
    kfo = KFO(network.named_parameters())
    yield "KFO", MAML(network, update=kfo, adapt_update=True, **inner)
    yield "T-Net", MAML(TNet(Network()), **inner)
    yield "LinNet", MAML(LinNet(Network(), [32, 32], head="fc"), **inner)
    yield "ANIL", ANIL(Network(), head="fc", **inner)
    yield "BOIL", MAML(Network(), adapted=["body.*"], **inner)


scores = {}
for name, learner in learners():
    outer = torch.optim.Adam(learner.parameters(), lr=0.003)
    tasks = Glyphs("train")
    for iteration in range(2):  # a real run takes thousands
        outer.zero_grad()
        learner(tasks.sample(iteration, tasks=2)).loss.backward()
        outer.step()
    scores[name] = evaluate(learner, Glyphs("test"), tasks=10).scores
    print(name, mean_interval(scores[name]))
print("KFO minus MAML", paired_difference(scores["KFO"], scores["MAML"]))
```

Tune the inner rate of each method on validation classes: the best one differs from method to method.

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
