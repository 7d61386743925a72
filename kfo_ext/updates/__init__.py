"""Learned updates: modules that turn gradients into updates."""

from kfo_ext.updates.base import Update
from kfo_ext.updates.gradient_descent import GradientDescent
from kfo_ext.updates.kfo import KFO

__all__ = ["KFO", "GradientDescent", "Update"]
