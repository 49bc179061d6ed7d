"""RAFT, reward-ranked fine-tuning (Dong et al. 2023): sample K responses to each prompt, clean and discard, score, keep
the best, and learn them as SFT learns demonstrations. Rejection-sampling SFT is one round of it."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from pydantic import Field, model_validator

from fairlead.algorithms.online import SamplingSettings, collecting, evaluation
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped, Shaper, ShapingSettings
from fairlead.algorithms.stage import Stage
from fairlead.algorithms.terms import nll
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience
from fairlead.rollout.screen import open_screen
from fairlead.rollout.select import SelectSettings, select
from fairlead.types import Algorithm, Pass, Prompt, Term, TokenBatch


class Settings(ShapingSettings, SamplingSettings, SelectSettings):
    kl_in: ClassVar[str] = "reward"
    kl_estimator: ClassVar[str] = "k1"
    num_samples: int = Field(default=8, ge=1)
    """Responses to each prompt of a round."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each round's selected responses; train.batch_size prompts are a step."""
    temperature: float = Field(default=0.85, gt=0)
    kl_coef: float = Field(default=0.0, ge=0)
    """Responses are ranked by score - kl_coef (log policy - log reference); 0 needs no reference."""

    @model_validator(mode="after")
    def _selects(self) -> Settings:
        if (self.keep or 1) > self.num_samples:
            raise ValueError(f"keep={self.keep} of num_samples={self.num_samples} responses")
        if self.adaptive_kl is not None and not self.kl_coef:
            raise ValueError("adaptive_kl moves the price of the KL: kl_coef above 0")
        return self


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings) -> Estimate:
    """Which responses are learned: ranked by the sum of their shaped rewards, which is score - kl_coef x KL."""
    keys, scores = shaped.rewards.sum(1), experience.scores
    reasons = {name: share for name, share in experience.measured.items() if name.startswith("discarded/")}
    keep, empty = select(keys, [experience.num_samples] * len(experience.trees), settings, reasons)
    first = scores.view(-1, experience.num_samples)[:, 0]
    return Estimate(
        {},
        {
            "raft/selected_scores": float(scores[keep].mean()),
            "raft/first_scores": float(first[~first.isnan()].mean()),
            "raft/selected": float(keep.float().mean()),
            "raft/prompts_without": empty,
        },
        keep,
    )


def collate(trees: list[Tree], _: Any, *, packed: bool, pad_id: int, support: Any = None) -> TokenBatch:
    """The selected responses as demonstrations: all of the vocabulary could follow."""
    return token_batch(trees, packed=packed, pad_id=pad_id)


def passes(_: Settings) -> tuple[Pass, ...]:
    return (Pass("policy", (Term("nll", "token", nll),), frozenset({"logprobs"}), uniform=True),)


def source(stage: Stage) -> RolloutSource:
    settings: Settings = stage.settings
    screen = open_screen(stage.renderer, settings.clean, settings.discard)
    prompts, collector = collecting(stage, logprobs=settings.kl_coef > 0, screen=screen)
    return RolloutSource(
        stage, collector, prompts, Shaper(settings), partial(estimate, settings=settings), collate=collate
    )


ALGORITHM = Algorithm(
    name="raft",
    settings=Settings,
    record=lambda _: Prompt,
    roles=lambda settings: ("policy", "reference") if settings.kl_coef else ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("raft/first_scores", "raft/selected_scores", "eval/score"),
    best="eval/score",
)
