"""The sections of the report, in the paper's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Against:
    """A picture of test accuracy against an option of the runs.

    Attributes:
        option: such as layers.
        unit: label of its axis.
        series: label of each line to its entries, or variants of entries: NAME/VARIANT.
    """

    option: str
    unit: str
    series: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A section: the entries of one table or figure.

    Attributes:
        name: the group's name in entries.
        title: of the section.
        text: above its tables.
        against: its last pictures.
    """

    name: str
    title: str
    text: str
    against: tuple[Against, ...] = ()


def _depths(method: str) -> tuple[str, ...]:
    return tuple(f"omniglot-cnn{layers}-{method}" for layers in (2, 3, 4, 6))


def _variants(entry: str, unit: str, numbers: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"{entry}/{unit.format(number)}" for number in numbers)


STEPS = (1, 2, 3, 4)
GROUPS = (
    Group(
        name="figure-1-left",
        title="Figure 1, left: SHALLOW and DEEP",
        text="Linear regression in one dimension, by one parameter and by a product of two.",
    ),
    Group(
        name="figure-1-right",
        title="Figures 1, right, B.1 and B.3: binary logistic regression",
        text="Drawn tasks that a linear model can solve, with and without added linear layers.",
    ),
    Group(
        name="figure-2",
        title="Figure 2: the landscape of DEEP",
        text="The MAML loss over both parameters of DEEP, and trajectories on it.",
    ),
    Group(
        name="figure-3",
        title="Figures 3 and B.2: softmax regression of pixels",
        text="LinNet adds linear layers to the regression, which does not change what it can represent. The 84x84 set, "
        "downscaled, stands in place of mini-ImageNet, which we do not have.",
    ),
    Group(
        name="table-1",
        title="Table 1: linear layers added to a network",
        text="LinNet adds two linear layers before the head. They are absorbed into it after the adaptation. The rows "
        "of deeper networks on Omniglot are with Figure 4.",
    ),
    Group(
        name="table-2",
        title="Table 2: linear layers added to a network of which the head alone is adapted",
        text="The features of CNN(2) are meta-learned, and each task adapts the head and the added layers.",
    ),
    Group(
        name="table-3",
        title="Table 3: meta-optimizers, all parameters adapted",
        text="Each row meta-learns how the same network, CNN(2), is updated in the inner loop.",
    ),
    Group(
        name="table-b4",
        title="Table B.4: meta-optimizers, the head alone adapted (ANIL)",
        text="The features of CNN(2) are meta-learned, and each task adapts the head alone.",
    ),
    Group(
        name="figure-4",
        title="Figures 4 and B.4, and Table 1 on Omniglot: depth",
        text="The number of convolutional layers changes, and with it what the network can represent.",
        against=(
            Against(
                option="layers",
                unit="convolutional layers",
                series={"MAML": _depths("maml"), "META-KFO": _depths("kfo"), "LinNet": _depths("linnet")},
            ),
        ),
    ),
    Group(
        name="collapse",
        title="Controls of the collapse",
        text="Each row changes one factor of META-KFO's published setting, or of a tuned setting.",
    ),
    Group(
        name="floors",
        title="Floors: nearest class means and prototypical networks",
        text="Methods that adapt nothing, on the same tasks.",
    ),
    Group(
        name="beyond",
        title="Beyond the paper",
        text="These runs take the setting that the tuned entry found, and change one option.",
        against=(
            Against(
                option="rank",
                unit="rank of the update",
                series={"low rank": _variants("beyond-low-rank", "rank {}", (1, 2, 4, 8, 16))},
            ),
            Against(
                option="steps",
                unit="inner steps, in training and test",
                series={
                    "MAML": (*_variants("beyond-maml-steps", "{} steps", STEPS), "omniglot-cnn2-maml"),
                    "META-KFO": (*_variants("beyond-kfo-steps", "{} steps", STEPS), "omniglot-cnn2-kfo"),
                },
            ),
        ),
    ),
)

# Label to entry: the curves at the head of the report; tuned ones first.
HEADLINE: Mapping[str, str] = {
    "META-KFO, tuned": "omniglot-cnn2-kfo",
    "MAML, tuned": "omniglot-cnn2-maml",
    "META-KFO, the paper's setting": "omniglot-cnn2-kfo-paper",
    "MAML, the paper's setting": "omniglot-cnn2-maml-paper",
}
# Entries whose individual runs the section on the collapse shows.
COLLAPSE = tuple(
    f"omniglot-cnn2-{name}"
    for name in ("kfo-paper", "maml-paper", "kfo-controls", "kfo", "maml", "kfo-clipped", "kfo-decayed", "maml-clipped")
)
