"""RAFT, reward-ranked fine-tuning (Dong et al. 2023): sample K responses to each prompt, clean and discard, score, keep
the best, and learn them as SFT learns demonstrations. Rejection-sampling SFT is one round of it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.online import SamplingSettings, collecting, evaluation
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped, Shaper, ShapingSettings
from fairlead.algorithms.stage import Stage
from fairlead.algorithms.terms import nll
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.errors import TrainingError
from fairlead.rollout.experience import Experience
from fairlead.rollout.screen import CleanRule, DiscardRule, open_screen
from fairlead.types import Algorithm, Pass, Prompt, Term, TokenBatch


class Settings(ShapingSettings, SamplingSettings):
    kl_in: ClassVar[str] = "reward"
    kl_estimator: ClassVar[str] = "k1"
    num_samples: int = Field(default=8, ge=1)
    """Responses to each prompt of a round."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each round's selected responses; train.batch_size prompts are a step."""
    temperature: float = Field(default=0.85, gt=0)
    select: Literal["local", "top"] = "local"
    """local: the best of each prompt; top: the best of the whole round."""
    keep: int | None = Field(default=None, ge=1)
    """With select: local, how many of each prompt's responses; 1 when not given."""
    share: float | None = Field(default=None, gt=0, le=1)
    """With select: top, the share of all responses; 1 / num_samples when not given."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Responses are ranked by score - kl_coef (log policy - log reference); 0 needs no reference."""
    clean: tuple[CleanRule, ...] = ()
    """What is done to each text: first_turn, strip, `module:function`, or a rule with its arguments."""
    discard: tuple[DiscardRule, ...] = ("empty",)
    """Which texts are never selected: empty, contains, too_short, too_long, repeats, code_fences, emojis, hashes,
    `module:function`, or a rule with its arguments."""
    max_empty: float = Field(default=0.5, gt=0, le=1)
    """The run stops where of more than this share of a round's prompts all responses were discarded."""

    @model_validator(mode="after")
    def _selects(self) -> Settings:
        if self.select == "local" and self.share is not None:
            raise ValueError("share is for select=top; with select=local, keep says how many of each prompt")
        if self.select == "top" and self.keep is not None:
            raise ValueError("keep is for select=local; with select=top, share says how much of the round")
        if (self.keep or 1) > self.num_samples:
            raise ValueError(f"keep={self.keep} of num_samples={self.num_samples} responses")
        if self.adaptive_kl is not None and not self.kl_coef:
            raise ValueError("adaptive_kl moves the price of the KL: kl_coef above 0")
        return self


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings) -> Estimate:
    """Which responses are learned: ranked by the sum of their shaped rewards, which is score - kl_coef x KL."""
    keys, scores = shaped.rewards.sum(1), experience.scores
    known = ~scores.isnan()
    by_prompt = known.view(-1, experience.num_samples)
    empty = 1 - float(by_prompt.any(1).float().mean())
    if empty > settings.max_empty:
        reasons = {name: f"{share:.0%}" for name, share in experience.measured.items() if name.startswith("discarded/")}
        raise TrainingError(
            f"all responses to {empty:.0%} of the round's prompts were discarded: {reasons}",
            hint=f"look at the newest file of rollouts/, or raise max_empty={settings.max_empty}",
        )
    ranked = torch.where(known, keys, -torch.inf)
    if settings.select == "local":
        keep = _best(ranked.view(-1, experience.num_samples), settings.keep or 1).flatten()
    else:
        share = settings.share or 1 / settings.num_samples
        keep = _best(ranked[None], max(1, math.floor(share * len(ranked))))[0]
    keep &= known
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


def _best(keys: Tensor, number: int) -> Tensor:
    """The ``number`` largest of each row, the first of equals. [R, N] -> [R, N] bool"""
    order = keys.sort(dim=1, descending=True, stable=True).indices[:, :number]
    return torch.zeros(keys.shape, dtype=torch.bool).scatter(1, order, True)


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
