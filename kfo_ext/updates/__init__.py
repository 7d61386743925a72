"""Learned updates: modules that turn gradients into updates."""

from kfo_ext.updates.base import Update
from kfo_ext.updates.by_name import ByName
from kfo_ext.updates.chain import Chain
from kfo_ext.updates.gradient_descent import GradientDescent
from kfo_ext.updates.kfo import KFO
from kfo_ext.updates.low_rank import LowRank
from kfo_ext.updates.meta_curvature import MetaCurvature
from kfo_ext.updates.meta_sgd import MetaSGD
from kfo_ext.updates.step import StepState

__all__ = ["KFO", "ByName", "Chain", "GradientDescent", "LowRank", "MetaCurvature", "MetaSGD", "StepState", "Update"]
