"""Sweeps: a recipe trained again and again with other values of some of its keys, for the best metric."""

from fairlead.sweep.plan import make_plan
from fairlead.sweep.run import sweep
from fairlead.sweep.show import plan_text, print_sweep

__all__ = ["make_plan", "plan_text", "print_sweep", "sweep"]
