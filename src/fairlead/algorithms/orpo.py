"""ORPO (Hong et al. 2024): likelihood of the chosen responses and the odds ratio of the pair; no reference, and no SFT
stage before it. The likelihood is that of the response; the paper's code counts the prompt's tokens too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from fairlead.algorithms.pairs import pair_source
from fairlead.algorithms.responses import LengthSettings, chosen_nll, pair_metrics, response_logprobs
from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.ops.preference import log_odds, odds_ratio
from fairlead.types import Algorithm, Mean, Metrics, Outputs, Pass, Preference, PreferenceBatch, Term

MEAN = LengthSettings(length="mean")


class Settings(Section):
    weight: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio beside the likelihood: the paper's lambda."""


def ratio(outputs: Outputs, batch: PreferenceBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """The odds-ratio loss summed over pairs; unit ``pair``."""
    means = response_logprobs(outputs, batch, MEAN)
    chosen, rejected = means[batch.chosen], means[batch.rejected]
    with torch.no_grad():
        odds = Mean((log_odds(chosen) - log_odds(rejected)).sum(), batch.counts["pair"])
    metrics = pair_metrics(outputs, batch, settings.weight * means.detach())
    return odds_ratio(chosen, rejected).sum(), {**metrics, "log_odds_ratio": odds}


def passes(settings: Settings) -> tuple[Pass, ...]:
    terms = (
        Term("sft", "chosen_token", chosen_nll),
        Term("odds_ratio", "pair", partial(ratio, settings=settings), settings.weight),
    )
    return (Pass("policy", terms, frozenset({"logprobs"})),)


def source(stage: Stage) -> DatasetSource:
    return pair_source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), pair_source(stage, stage.eval_records, "eval").in_order)


ALGORITHM = Algorithm(
    name="orpo",
    settings=Settings,
    record=lambda _: Preference,
    roles=lambda _: ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "log_odds_ratio"),
)
