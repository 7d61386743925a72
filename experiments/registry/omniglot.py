"""Omniglot, CNN(2), all parameters adapted: the headline, Table 3's first row, and Table 1's at two layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..entry import UNKNOWN, Entry, Published, Work
from ..jobs import Settings, Test
from .budgets import FINAL, STARTS, fixed, following, tuned
from .published import cnn2

BASE = {"dataset": "omniglot", "network": "omniglot_cnn", "layers": 2, "hidden": 32}
MAML = {**BASE, "method": "maml", "update": "none"}
KFO = {**BASE, "method": "maml", "update": "kfo", "psd": True, "hidden_layers": 0, "adapt_update": True}
KFO_HIDDEN = {**KFO, "hidden_layers": 2, "bias": True}
RUNGS = (200, [(400, 4), (800, 2), (2000, 1)])
# The paper's rates (table D.6) and larger ones; other methods have as many, around the paper's.
RATES = (0.08, 0.25, 0.5, 1.0, 1.5, 2.0)
KFO_RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
LINNET_RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
# Numbers of inner steps other than in training.
STEPS = tuple(Test(tasks=1000, changes={"steps": steps}) for steps in (1, 2, 3, 4, 10))
HEADLINE: dict[str, Any] = {"starts": (*STARTS, "zero_head"), "tests": (*FINAL, *STEPS)}
# One factor at a time, from the paper's own setting.
CONTROLS: dict[str, Settings] = {
    "clipped": {"clip_norm": 1.0},
    "outer rate 0.001": {"meta_lr": 0.001},
    "torch's start": {"init": "torch"},
}
# Variants of the tuned rows.
CLIPPED: dict[str, Settings] = {"": {"clip_norm": 1.0}}
DECAYED: dict[str, Settings] = {"": {"schedule": "half_life", "meta_lr_half_life": 500}}
# At torch's initialization the gradients' root mean squares are 0.002 to 0.04, where tanh is linear to 0.1 %.
SCALED: dict[str, Settings] = {"": {"scale": 100.0}}
START = "the start of the network: the best of three (torch's, the reference's, a zero head); the paper names none"
TWO_STARTS = (
    "the start of the network: the better of two (torch's, the reference's); the rows of MAML and of META-KFO, linear, "
    "have a third, a zero head"
)
LINEAR = "one Kronecker layer, psd, adapted; the paper does not say which of its numbers are linear"
FIXED = (
    "equations 22 and 23 learn the factors in the outer loop alone, as here; Algorithm 1 adapts them in the inner loop "
    "too, as the other rows of META-KFO do; the paper does not say which of the two its numbers are of"
)
TANH = "depth 2 and tanh, residual form: the repository's README says two hidden layers, the paper nothing"
SCALE = "the hidden layers see 100 times the gradient, whose size leaves tanh nearly linear; at the row's tuned setting"
GRID = "no rate of T-Nets is published: MAML's grid"
LAYERS = "two layers of the head's 32 inputs before it, with bias: the paper gives neither width nor bias"
PAPER_ROW = "the paper's own rates, with the reference's start: the row of the paper's setting"
OTHERS = "the tuned row has other rates and starts"
ONE_AT_A_TIME = "the controls change clipping, outer rate and start, one at a time"
CLIPS = "the setting that won without clipping, its meta-gradients clipped to norm 1"
DECAYS = "the setting that won with a constant outer rate, which is halved every 500 meta-iterations"


def _entry(name: str, title: str, works: Mapping[str, Work], column: str = "", **facts: Any) -> Entry:
    """Make a row of Table 3, or of a group in `facts`.

    Args:
        name: of the entry.
        title: of the row.
        works: the work of each budget.
        column: of tables D.6 and D.7.
        facts: further fields of the entry.

    Returns:
        The entry.
    """
    return Entry(
        **{
            "name": f"omniglot-cnn2-{name}",
            "title": title,
            "group": "table-3",
            "rates": cnn2("Omniglot", column) if column else None,
            "baseline": "omniglot-cnn2-maml",
            "data": ("omniglot",),
            "works": works,
            **facts,
        }
    )


def _cell(column: str, *number: Any) -> tuple[Published, ...]:
    """A cell of Table 3's first row."""
    return (Published(f"Table 3, Omniglot, {column}", *number),)


def _outer(column: str) -> Settings:
    return {"meta_lr": cnn2("Omniglot", column).outer.value}


def _paper(base: Settings, column: str) -> Settings:
    """A method at the paper's rates, from the reference implementation's initialization."""
    return {**base, "fast_lr": cnn2("Omniglot", column).inner.value, **_outer(column), "init": "reference"}


PAPER_MAML = _paper(MAML, "MAML")
PAPER_KFO = _paper(KFO, "MAML + KFO")


def _tuned(
    name: str,
    title: str,
    column: str,
    base: Settings,
    rates: tuple[float, ...],
    how: Any = None,
    choices: tuple[str, ...] = (),
    **facts: Any,
) -> Entry:
    """A row whose rates are tuned, the outer one starting at the paper's; without `how`, over two starts."""
    choices = choices if how else (TWO_STARTS, *choices)
    works = tuned({**base, **_outer(column)}, rates, cpu=RUNGS, **how or {})
    return _entry(name, title, works, **{"column": column, "choices": choices, **facts})


KFO_CELL = _cell("META-KFO", 96.62)
ENTRIES = [
    _tuned(
        "maml",
        "MAML",
        "MAML",
        MAML,
        RATES,
        HEADLINE,
        published=_cell("MAML", 66.6),
        baseline="",
        choices=(START,),
        tried=(PAPER_ROW,),
    ),
    _tuned(
        "kfo",
        "META-KFO, linear",
        "MAML + KFO",
        KFO,
        KFO_RATES,
        HEADLINE,
        published=KFO_CELL,
        choices=(START, LINEAR),
        tried=(
            "clipped meta-gradients and a decayed outer rate: the controls of the collapse",
            PAPER_ROW,
            "factors that are not adapted: their own row",
        ),
    ),
    _entry(
        "maml-paper",
        "MAML at the paper's setting",
        fixed(PAPER_MAML, {"": {}}, cpu=2000),
        "MAML",
        published=_cell("MAML", 66.6),
        baseline="",
        tried=(OTHERS,),
    ),
    _entry(
        "kfo-paper",
        "META-KFO, linear, at the paper's setting",
        fixed(PAPER_KFO, {"": {}}, cpu=2000),
        "MAML + KFO",
        published=KFO_CELL,
        baseline="omniglot-cnn2-maml-paper",
        tried=(OTHERS, ONE_AT_A_TIME),
    ),
    _entry(
        "kfo-controls",
        "META-KFO at the paper's setting, one factor changed",
        fixed(PAPER_KFO, CONTROLS, cpu=1000),
        "MAML + KFO",
        group="collapse",
        baseline="",
    ),
    _entry(
        "kfo-decayed",
        "META-KFO, linear, tuned, outer rate decayed",
        following("omniglot-cnn2-kfo", DECAYED, PAPER_KFO, cpu=2000, seeds=3),
        group="collapse",
        choices=(DECAYS,),
    ),
    *(
        _entry(
            f"{name}-clipped",
            f"{title}, tuned, clipped",
            following(f"omniglot-cnn2-{name}", CLIPPED, smoke, cpu=2000, seeds=3),
            group="collapse",
            baseline=baseline,
            choices=(CLIPS,),
        )
        for name, title, smoke, baseline in (
            ("kfo", "META-KFO, linear", PAPER_KFO, "omniglot-cnn2-maml-clipped"),
            ("maml", "MAML", PAPER_MAML, ""),
        )
    ),
    _tuned(
        "msgd",
        "Meta-SGD",
        "MAML + MSGD",
        {**MAML, "update": "meta_sgd"},
        RATES,
        published=_cell("MSGD", 74.07),
    ),
    _tuned(
        "mc",
        "Meta-Curvature",
        "MAML + MC",
        {**MAML, "update": "meta_curvature"},
        RATES,
        published=_cell("MC", None, UNKNOWN),
    ),
    # Tables D.6 and D.7 have no T-Nets.
    _entry(
        "tnet",
        "T-Nets",
        tuned({**MAML, **_outer("MAML"), "method": "tnet"}, RATES, cpu=RUNGS),
        published=_cell("T-Nets", 92.27),
        choices=(TWO_STARTS, GRID),
    ),
    _tuned(
        "kfo-fixed",
        "META-KFO, linear, factors not adapted",
        "MAML + KFO",
        {**KFO, "adapt_update": False},
        KFO_RATES,
        published=KFO_CELL,
        baseline="omniglot-cnn2-kfo",
        choices=(FIXED,),
    ),
    _tuned(
        "kfo-hidden",
        "META-KFO, two hidden layers, with bias",
        "MAML + KFO",
        KFO_HIDDEN,
        KFO_RATES,
        published=KFO_CELL,
        choices=(TANH,),
    ),
    _entry(
        "kfo-scaled",
        "META-KFO, two hidden layers, with bias and scale",
        following("omniglot-cnn2-kfo-hidden", SCALED, _paper(KFO_HIDDEN, "MAML + KFO"), cpu=2000, seeds=3),
        "MAML + KFO",
        published=KFO_CELL,
        baseline="omniglot-cnn2-kfo-hidden",
        choices=(TANH, SCALE),
    ),
    _tuned(
        "linnet",
        "LinNet",
        "MAML + LinNet",
        {**MAML, "method": "linnet"},
        LINNET_RATES,
        group="table-1",
        published=(Published("Table 1, Omniglot, CNN(2), LinNet", None, UNKNOWN),),
        choices=(LAYERS,),
    ),
]
