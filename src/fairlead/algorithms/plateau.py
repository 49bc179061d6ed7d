"""When the mean score of a run's rounds has ceased to rise: RAFT's rule to stop, that the reward oscillates at the same
level for three rounds (Dong et al. 2023), made exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Z = 1.96
"""Standard errors from a mean to either end of its 95 % interval."""


def level(by_prompt: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over prompts of the mean score of a prompt's responses, what was discarded (nan) aside, and half the width
    of its 95 % interval, by the spread of the prompts."""
    means = torch.stack([scores.double().nanmean() for scores in by_prompt])
    means = means[~means.isnan()]
    error = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return float(means.mean()), Z * error


class Plateau:
    """Looks at each round once. Its state is the levels of the last rounds."""

    def __init__(self, rounds: int | None) -> None:
        self._rounds = rounds
        self._levels: list[tuple[float, float]] = []

    def after_round(self, mean: float, margin: float) -> str:
        """Why the run should end, or nothing: the means of the last ``rounds`` rounds lie within the interval of the
        round before them, and the newest is not the highest of all of these."""
        if self._rounds is None:
            return ""
        self._levels = [*self._levels, (mean, margin)][-self._rounds - 1 :]
        (first, half), *later = self._levels
        inside = all(abs(mean - first) <= half for mean, _ in later)
        if len(later) < self._rounds or not inside or mean >= max(mean for mean, _ in self._levels[:-1]):
            return ""
        told, many = ", ".join(f"{mean:.4g}" for mean, _ in later), "s" if len(later) > 1 else ""
        return (
            f"the mean score has not left {first:.4g} +- {half:.4g} for {len(later)} round{many} ({told}), and falls "
            "again"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"levels": self._levels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._levels = [(float(mean), float(margin)) for mean, margin in state["levels"]]
