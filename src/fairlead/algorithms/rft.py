"""Rejection fine-tuning as trlX has it (its `AccelerateRFTTrainer`, after ReST, Gulcehre et al. 2023): each round adds
samples to those that a prompt has already (grow), then passes over the ones that score above a percentile of their
prompt, which rises from pass to pass (improve). What is learned is learned as SFT learns demonstrations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.online import SamplingSettings, collecting, evaluation
from fairlead.algorithms.raft import collate, passes
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped, Shaper, Unshaped
from fairlead.algorithms.stage import Stage
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience
from fairlead.rollout.screen import ScreenSettings, share_empty
from fairlead.rollout.store import RolloutStore
from fairlead.types import Algorithm, Prompt

STEP = 1e-3
"""What a threshold stands above the lowest of them, and below the highest (trlX): of rewards with few values neither
the lowest are learned nor the highest left out."""


class Settings(SamplingSettings, ScreenSettings):
    rollout_size: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Prompts of one round; all: each round asks every prompt."""
    num_samples: int = Field(default=32, ge=1)
    """Responses to each prompt that a round adds (trlX's n_generations_per_prompt)."""
    epochs: int = Field(default=4, ge=1)
    """Passes over what is kept, each with a higher percentile (trlX's n_improve_steps)."""
    start_percentile: float = Field(default=0.7, ge=0, lt=1)
    """In the first pass over a round, the share of a prompt's responses that score too low."""
    end_percentile: float = Field(default=0.95, ge=0, le=1)
    """What the percentile rises towards, by equal steps; the last pass is one step below it, as in trlX."""
    measure_kl: bool = False
    """Keep a reference and measure the KL to it, though nothing is charged for it."""

    @model_validator(mode="after")
    def _rises(self) -> Settings:
        if self.end_percentile < self.start_percentile:
            raise ValueError(f"end_percentile={self.end_percentile} is below start_percentile={self.start_percentile}")
        return self

    def percentile(self, epoch: int) -> float:
        return self.start_percentile + (self.end_percentile - self.start_percentile) * epoch / self.epochs


class Pool:
    """All that was sampled so far and not discarded, by prompt, each response once. Rounds are read from their files,
    so that a run that continues finds the same."""

    def __init__(self, store: RolloutStore) -> None:
        self._store, self._rounds = store, 0
        self._scores: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}

    def of(self, experience: Experience) -> Experience:
        """The prompts of a round, each once, with all their responses up to it."""
        while self._rounds <= experience.number:
            self._add(Experience.from_tensors(self._store.load(self._rounds)[0]))
            self._rounds += 1
        prompts = [ids for ids in dict.fromkeys(tree.prompt for tree in experience.trees) if self._scores.get(ids)]
        scores = torch.tensor([score for ids in prompts for score in self._scores[ids].values()])
        trees = [Tree(ids, tuple(self._scores[ids])) for ids in prompts]
        return Experience(trees, {}, scores, torch.ones(len(scores), dtype=torch.bool), number=experience.number)

    def _add(self, experience: Experience) -> None:
        for tree, scores in zip(experience.trees, experience.by_prompt(experience.scores), strict=True):
            held = self._scores.setdefault(tree.prompt, {})
            for response, score in zip(tree.responses, map(float, scores), strict=True):
                if not math.isnan(score):
                    held.setdefault(response, score)


def thresholds(scores: Sequence[Tensor], percentile: float) -> Tensor:
    """What a response to each prompt must score [P], from the scores of all responses to it."""
    found = torch.stack([each.quantile(percentile) for each in scores])
    return found.clamp(found.min() + STEP, found.max() - STEP)


def estimate(experience: Experience, _: Shaped, *, settings: Settings, pool: Pool) -> Estimate:
    """Which of all responses so far to the round's prompts are learned, pass by pass."""
    numbers = [len(tree.responses) for tree in experience.trees]
    empty = share_empty(~experience.scores.isnan(), numbers, settings, experience.discarded)
    held = pool.of(experience)
    sizes, scores = torch.tensor([len(tree.responses) for tree in held.trees]), held.scores.double()
    percentiles = [settings.percentile(epoch) for epoch in range(settings.epochs)]
    wanted = [thresholds(held.by_prompt(scores), percentile) for percentile in percentiles]
    keep = torch.stack([scores >= each.repeat_interleave(sizes) for each in wanted])
    first, last = (held.scores[kept].mean() for kept in (keep[0], keep[-1]))
    metrics = {
        "rft/selected_scores": float(first),
        "rft/selected_scores_last": float(last),
        "rft/selected": float(keep[0].float().mean()),
        "rft/selected_last": float(keep[-1].float().mean()),
        "rft/responses": len(held.scores) / len(held.trees),
        "rft/prompts_without": empty,
    }
    return Estimate({}, metrics, keep, held)


def source(stage: Stage) -> RolloutSource:
    settings: Settings = stage.settings
    prompts, collector = collecting(stage, logprobs=settings.measure_kl)
    chosen = partial(estimate, settings=settings, pool=Pool(collector.store))
    return RolloutSource(stage, collector, prompts, Shaper(Unshaped()), chosen, collate=collate)


ALGORITHM = Algorithm(
    name="rft",
    settings=Settings,
    record=lambda _: Prompt,
    roles=lambda settings: ("policy", "reference") if settings.measure_kl else ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("objective/scores", "rft/selected_scores", "eval/score"),
    best="eval/score",
)
