"""Kronecker-factored learned updates (META-KFO) for torch: exact, fast, and easy to drop into any code."""

from importlib.metadata import PackageNotFoundError, version

from kfo_ext.adapt import ANIL, MAML, MetaResult
from kfo_ext.transform import Problems, transform
from kfo_ext.updates import KFO

try:
    __version__ = version("kfo_ext")
except PackageNotFoundError:
    __version__ = "0+source"

__all__ = ["ANIL", "KFO", "MAML", "MetaResult", "Problems", "__version__", "transform"]
