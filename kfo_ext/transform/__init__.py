"""The Kronecker-factored transform Y = R^T G L and its derivatives."""

from kfo_ext.transform.op import BACKENDS, adjoint, transform
from kfo_ext.transform.packing import Packing
from kfo_ext.transform.problems import Problems

__all__ = ["BACKENDS", "Packing", "Problems", "adjoint", "transform"]
