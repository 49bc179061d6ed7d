"""Who is told of every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Progress:
    """What an observer is told after each optimizer step."""

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    tokens: int
    """Real tokens trained on since the run began."""
    seconds: float
    """Seconds of training since the run began, earlier processes of the same run counted in."""


class Observer(Protocol):
    """Told of every step; may raise to stop the run. Never changes what is trained."""

    def after_step(self, progress: Progress) -> None: ...

    def close(self) -> None:
        """Called once, also when the run fails."""
        ...


class Sink(Protocol):
    """Takes metrics to a tracker. A sink that cannot start raises; a failing log line never stops the run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...
