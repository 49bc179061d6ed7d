"""What a case is: a task, a recipe of the real trainer, what it must reach, and how near is near enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairlead.conformance.tasks import Task

Rows = list[dict[str, Any]]
KL = "KL(policy, optimum)"


@dataclass(frozen=True, slots=True)
class Found:
    """What a run began and ended with: log-probabilities of every response [P, N], or a reward model's scores."""

    task: Task
    before: Tensor
    after: Tensor


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    algorithm: str
    task: Task
    settings: Mapping[str, Any]
    rows: Rows
    distance: Callable[[Found], float]
    measure: str
    bound: float
    reaches: str
    """The fixed point in words."""
    reward: Callable[..., list[float]] | None = None
    """What the trainer is given to optimise."""


def prompts(task: Task, copies: int = 1) -> Rows:
    return [{"prompt": prompt} for prompt in task.prompts for _ in range(copies)]
