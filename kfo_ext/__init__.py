"""Kronecker-factored learned updates (META-KFO) for torch: exact, fast, and easy to drop into any code."""

import sys
from typing import TYPE_CHECKING

from kfo_ext.lazy import lazily

# For a source tree: an installation is refused by pip.
if sys.version_info < (3, 10):  # noqa: UP036
    raise ImportError(f"kfo_ext needs Python 3.10 or later, {sys.executable} is {sys.version.split()[0]}")

if TYPE_CHECKING:
    from kfo_ext.adapt import ANIL, MAML, Adapted, MetaResult
    from kfo_ext.functional import transform
    from kfo_ext.layers import fast_layers
    from kfo_ext.problems import Problems
    from kfo_ext.updates import KFO, ByName, Chain, GradientDescent, LowRank, MetaCurvature, MetaSGD, Update
    from kfo_ext.version import __version__

__all__ = [
    "ANIL",
    "KFO",
    "MAML",
    "Adapted",
    "ByName",
    "Chain",
    "GradientDescent",
    "LowRank",
    "MetaCurvature",
    "MetaResult",
    "MetaSGD",
    "Problems",
    "Update",
    "__version__",
    "fast_layers",
    "transform",
]

__getattr__, __dir__ = lazily(
    globals(),
    {
        "adapt": ["ANIL", "MAML", "Adapted", "MetaResult"],
        "functional": ["transform"],
        "layers": ["fast_layers"],
        "problems": ["Problems"],
        "updates": ["KFO", "ByName", "Chain", "GradientDescent", "LowRank", "MetaCurvature", "MetaSGD", "Update"],
        "version": ["__version__"],
    },
)
