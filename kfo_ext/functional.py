"""The public functions: what the operators compute, for all tasks at once, right to any order of derivative."""

from kfo_ext.ops.batch_norm.op import batch_norm_relu
from kfo_ext.ops.conv2d.op import conv2d
from kfo_ext.ops.transform.op import adjoint, transform

__all__ = ["adjoint", "batch_norm_relu", "conv2d", "transform"]
