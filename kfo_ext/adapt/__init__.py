"""Adaptation: the inner loop of a whole meta-batch, for MAML and ANIL with any learned update."""

from .adapted import Adapted
from .anil import ANIL
from .learner import MAML
from .result import MetaResult

__all__ = ["ANIL", "MAML", "Adapted", "MetaResult"]
