"""What a user may ask of the preparation of Stack Exchange dumps. Knows no dump."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fairlead.data.splits import split_of
from fairlead.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StackExchangeOptions:
    """Each question serves one purpose, so that no stage sees what another was trained on."""

    finetune: float = 0.35
    """Share of the questions for supervised fine-tuning and pretraining."""
    reward: float = 0.35
    """Share of the questions whose answers are paired for the reward model."""
    rl: float = 0.15
    """Share of the questions that are prompts to sample from."""
    evaluation: float = 0.15
    """Share of the questions held out."""
    sft: Literal["all", "accepted_or_best"] = "all"
    """Which answers are demonstrations; the best has the highest score, then the lowest id."""
    max_pairs: int = 10
    """Pairs of one question, so that a few famous ones do not outweigh the rest."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at XML that is broken: stop and name the line, or count it, skip it and go on after it."""

    def __post_init__(self) -> None:
        for name, known in (("sft", ("all", "accepted_or_best")), ("on_error", ("stop", "skip"))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
        if self.max_pairs < 1:
            raise ConfigError(f"max_pairs must be at least 1, got {self.max_pairs}")
        split_of("", self.shares, 0)

    @property
    def shares(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("finetune", "reward", "rl", "evaluation")}
