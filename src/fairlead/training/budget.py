"""How many tokens one forward pass takes: the setting, or what fits; halved when memory runs out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

SMALLEST = 16


@dataclass(slots=True)
class TokenBudget:
    """Read anew at every step by whoever makes micro-batches; a part of the run's state."""

    tokens: int
    halved: list[int] = field(default_factory=list[int])
    """The steps at which memory ran out."""

    def halve(self, step: int) -> bool:
        """Whether there was something to halve."""
        if self.tokens < 2 * SMALLEST:
            return False
        self.tokens //= 2
        self.halved.append(step)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "halved": self.halved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tokens, self.halved = int(state["tokens"]), [int(step) for step in state["halved"]]


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, or what torch's CPU allocator says."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in said and "memory" in said
    )
