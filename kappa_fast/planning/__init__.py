"""What ranking a model would take, told without a look at its weights."""

from __future__ import annotations

from .division import Division
from .engine import Plan, PlannedGroup, plan
from .prediction import Prediction

__all__ = ["plan", "Plan", "PlannedGroup", "Prediction", "Division"]
