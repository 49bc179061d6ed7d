"""A stage of the real trainer, put together as a run does, whose steps are taken by hand: to look at gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.algorithms import find
from fairlead.algorithms.stage import Stage
from fairlead.assemble import Given, assemble
from fairlead.conformance.tasks import Task
from fairlead.runner import resolve
from fairlead.training.loop import backward
from fairlead.types import Pass

MOVED = 0.1
"""Standard deviation of the step that takes what is trained away from where the run began."""


@dataclass(slots=True)
class Staged:
    """A run before its first step."""

    model: Any
    """The policy's or the reward's own, of transformers."""
    stage: Stage
    source: Any
    passes: tuple[Pass, ...]

    def gradients(self, micro_batches: Any) -> dict[str, Tensor]:
        """Of one optimizer step."""
        for parameter in self.stage.models.trainable.values():
            parameter.grad = None
        metrics = backward(self.stage.models, self.passes, micro_batches)
        self.source.after_step(metrics)
        trained = self.stage.models.trainable.items()
        return {name: parameter.grad.clone() for name, parameter in trained if parameter.grad is not None}

    def steps(self) -> Iterator[list[Any]]:
        return iter(self.source)

    def move(self, seed: int = 7) -> None:
        """Away from the reference, by the same step wherever weights bear the same names."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.stage.models.trainable.values():
                parameter.add_(MOVED * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def staged(
    task: Task,
    algorithm: str,
    settings: Mapping[str, Any],
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    family: str = "opt",
    dtype: torch.dtype = torch.float64,
    reward: Any = None,
) -> Staged:
    given = {
        "threads": 1,
        "data.template": "plain",
        "data.cache": "none",
        "data.max_length": task.max_length,
        **settings,
    }
    resolved = resolve({"algorithm": algorithm}, given)
    model = task.model(family).to(dtype)
    kind, objects = find(algorithm), {} if reward is None else {"reward": reward}
    handed = Given(model=model, tokenizer=task.tokenizer(), data=rows, objects=objects)
    stage, _ = assemble(resolved.recipe, kind, handed, folder)
    return Staged(model, stage, kind.source(stage), kind.passes(resolved.recipe.settings))
