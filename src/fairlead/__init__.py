"""Fairlead takes a language model and preferences and returns an aligned model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairlead.data.prepare import prepare as prepare
    from fairlead.errors import FairleadError as FairleadError
    from fairlead.evaluation import evaluate as evaluate
    from fairlead.pipeline import run_pipeline as run_pipeline
    from fairlead.report import build_report as build_report
    from fairlead.runner import RunResult as RunResult
    from fairlead.runner import train as train
    from fairlead.types import Algorithm as Algorithm

__version__ = "0.1.0"

_HOMES = {
    "Algorithm": "fairlead.types",
    "FairleadError": "fairlead.errors",
    "RunResult": "fairlead.runner",
    "build_report": "fairlead.report",
    "evaluate": "fairlead.evaluation",
    "prepare": "fairlead.data.prepare",
    "run_pipeline": "fairlead.pipeline",
    "train": "fairlead.runner",
}

__all__ = [
    "Algorithm",
    "FairleadError",
    "RunResult",
    "__version__",
    "build_report",
    "evaluate",
    "prepare",
    "run_pipeline",
    "train",
]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that `import fairlead` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fairlead' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
