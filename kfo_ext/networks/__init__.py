"""The networks of the paper; any torch module serves as well. `protocol` defines what ANIL requires of one.

`TNet` and `LinNet` transform a network, the paper's or a user's. WarpGrad's layers are not linear and extend the
functions that a network can compute: the paper omits them, and so does this package.
"""

from kfo_ext.networks.cnn import CNN, INITS, cifar_fs_cnn, mini_imagenet_cnn, omniglot_cnn
from kfo_ext.networks.linear import (
    SOFTMAX_WIDTHS,
    LinearModel,
    deep_regression,
    logistic_regression,
    shallow_regression,
    softmax_regression,
)
from kfo_ext.networks.linnet import LinNet
from kfo_ext.networks.mlp import MLP, sinusoid_mlp
from kfo_ext.networks.protocol import HasHead
from kfo_ext.networks.tnet import TNet

__all__ = [
    "CNN",
    "INITS",
    "MLP",
    "SOFTMAX_WIDTHS",
    "HasHead",
    "LinNet",
    "LinearModel",
    "TNet",
    "cifar_fs_cnn",
    "deep_regression",
    "logistic_regression",
    "mini_imagenet_cnn",
    "omniglot_cnn",
    "shallow_regression",
    "sinusoid_mlp",
    "softmax_regression",
]
