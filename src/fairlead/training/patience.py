"""Stops a run whose watched metric has ceased to become better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairlead.types import Progress


def better(metric: str, value: float, than: float) -> bool:
    """Smaller is better for a name that ends in ``loss`` or ``perplexity`` and for one with a minus in front; else
    larger is."""
    lower = metric.startswith("-") or metric.endswith(("loss", "perplexity"))
    return value < than if lower else value > than


class Patience:
    """An observer that counts the measurements since the best one; never done without ``limit``."""

    def __init__(self, metric: str | None, limit: int | None) -> None:
        self._metric, self._limit = metric or "", limit
        self._best: float | None = None
        self._since = 0

    @property
    def is_over(self) -> bool:
        return self._limit is not None and self._since >= self._limit

    def after_step(self, progress: Progress) -> None:
        value = progress.metrics.get(self._metric.removeprefix("-"))
        if value is None:
            return
        if self._best is None or better(self._metric, value, self._best):
            self._best, self._since = value, 0
        else:
            self._since += 1

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._since = state["best"], int(state["since"])
