"""SimPO (Meng et al. 2024): the mean log-probability a token is the reward, with a margin; no reference. With alpha,
AlphaPO (Gupta et al. 2025); with a term of likelihood, CPO-SimPO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pydantic import Field
from torch import Tensor

from fairlead.algorithms.pairs import pair_source
from fairlead.algorithms.responses import LengthSettings, chosen_nll, pair_metrics, response_logprobs
from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.ops.preference import simpo
from fairlead.types import Algorithm, Metrics, Outputs, Pass, Preference, PreferenceBatch, Term

MEAN = LengthSettings(length="mean")


class Settings(Section):
    beta: float = Field(default=2.0, gt=0)
    """Scale of the reward, beta times the mean log-probability a token."""
    gamma: float = Field(default=1.0, ge=0)
    """By how much the chosen reward is to exceed the rejected one."""
    alpha: float = 0.0
    """Shape of the reward (AlphaPO): below 0 it rises faster where the response is likely already; 0: SimPO."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen responses' mean NLL a token, added to the loss (CPO-SimPO)."""


def pairwise(outputs: Outputs, batch: PreferenceBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """The loss summed over pairs; unit ``pair``."""
    means = response_logprobs(outputs, batch, MEAN)
    losses = simpo(
        means[batch.chosen], means[batch.rejected], beta=settings.beta, gamma=settings.gamma, alpha=settings.alpha
    )
    return losses.sum(), pair_metrics(outputs, batch, settings.beta * means.detach())


def passes(settings: Settings) -> tuple[Pass, ...]:
    terms = [Term("simpo", "pair", partial(pairwise, settings=settings))]
    if settings.sft_weight:
        terms.append(Term("sft", "chosen_token", chosen_nll, settings.sft_weight))
    return (Pass("policy", tuple(terms), frozenset({"logprobs"})),)


def source(stage: Stage) -> DatasetSource:
    return pair_source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), pair_source(stage, stage.eval_records, "eval").in_order)


ALGORITHM = Algorithm(
    name="simpo",
    settings=Settings,
    record=lambda _: Preference,
    roles=lambda _: ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "rewards/margins"),
)
