"""The networks of the paper: any torch module serves as well."""

from kfo_ext.networks.cnn import CNN, INITS, cifar_fs_cnn, omniglot_cnn
from kfo_ext.networks.mlp import sinusoid_mlp

__all__ = ["CNN", "INITS", "cifar_fs_cnn", "omniglot_cnn", "sinusoid_mlp"]
