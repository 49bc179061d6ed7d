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


SAID = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
"""By torch's CPU allocator, by the driver and by cuBLAS, which ask for memory of their own, and by Macs."""


def is_out_of_memory(error: BaseException) -> bool:
    """torch's error, or what others say of it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)
    )
