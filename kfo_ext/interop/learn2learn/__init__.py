"""learn2learn's classes on our kernels, conversion of states in both directions, and a light import.

          learn2learn                        kfo_ext
plain     left X right                       R^T G L             left = R^T    right = L
psd       left^T left X right^T right        R^T R G L^T L       left = R      right = L

`GBML`, `MAML`, `ParameterUpdate`, `LearnableOptimizer`, `KroneckerTransform`, `KroneckerLinear` and
`MetaCurvatureTransform` take the arguments of learn2learn's classes of these names, and do not require learn2learn.
learn2learn's MetaCurvatureTransform names its matrices by the other convention: mc_in is our M_o, of the first
dimension, and mc_out is our M_i, of the second.
"""

from .convert import from_learn2learn, to_learn2learn
from .factors import (
    kronecker_factors,
    kronecker_factors_from,
    kronecker_factors_to,
    meta_curvature_from,
    meta_curvature_to,
)
from .learners import GBML, MAML
from .light import RECIPE, light_import
from .optimizer import LearnableOptimizer
from .parameter_update import ParameterUpdate
from .transforms import (
    GradientTransform,
    KroneckerLinear,
    KroneckerNetwork,
    KroneckerTransform,
    MetaCurvatureTransform,
    gradient_transform,
)

__all__ = [
    "GBML",
    "MAML",
    "RECIPE",
    "GradientTransform",
    "KroneckerLinear",
    "KroneckerNetwork",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ParameterUpdate",
    "from_learn2learn",
    "gradient_transform",
    "kronecker_factors",
    "kronecker_factors_from",
    "kronecker_factors_to",
    "light_import",
    "meta_curvature_from",
    "meta_curvature_to",
    "to_learn2learn",
]
