"""The sections of the report, in the paper's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Group:
    """A section: the entries of one table or figure.

    name: what entries call their group.
    title: of the section.
    text: what stands above its tables.
    against: an option of the runs, such as layers, that the last picture has on its axis; "" makes no such picture.
    unit: how that axis is labelled.
    series: of that picture, the label of each line to its entries.
    """

    name: str
    title: str
    text: str = ""
    against: str = ""
    unit: str = ""
    series: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


GROUPS = (
    Group(
        name="table-1",
        title="Table 1: linear layers added to a network",
        text="LinNet adds two linear layers before the head. They are absorbed into it after the adaptation.",
    ),
    Group(
        name="table-3",
        title="Table 3: meta-optimizers, all parameters adapted",
        text="Each row meta-learns how the same network, CNN(2), is updated in the inner loop.",
    ),
    Group(
        name="table-b4",
        title="Tables 2 and B.4: the head alone adapted (ANIL)",
        text="The features of CNN(2) are meta-learned, and each task adapts the head alone.",
    ),
    Group(
        name="collapse",
        title="Controls of the collapse",
        text="Each row changes one factor of META-KFO's published setting.",
    ),
)

# Label to entry: the curves at the head of the report; tuned ones first.
HEADLINE: Mapping[str, str] = {
    "META-KFO, tuned": "omniglot-cnn2-kfo",
    "MAML, tuned": "omniglot-cnn2-maml",
    "META-KFO, the paper's setting": "omniglot-cnn2-kfo-paper",
    "MAML, the paper's setting": "omniglot-cnn2-maml-paper",
}
# Entries whose single runs the section on the collapse shows.
COLLAPSE = ("omniglot-cnn2-kfo-paper", "omniglot-cnn2-maml-paper", "omniglot-cnn2-kfo-controls")
