"""Contrastive preference optimisation (Xu et al. 2024): DPO with a uniform reference, which is none, and the likelihood
of the chosen responses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.pairs import pair_source
from fairlead.algorithms.responses import LengthSettings, chosen_nll, pair_metrics, response_logprobs
from fairlead.algorithms.stage import Stage
from fairlead.data.loader import DatasetSource
from fairlead.ops.preference import dpo_sigmoid, hinge, ipo
from fairlead.types import Algorithm, Metrics, Outputs, Pass, Preference, PreferenceBatch, Term


class Settings(LengthSettings):
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Of the difference of the two log-probabilities, as in DPO."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the reward, beta times a log-probability."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels; for sigmoid."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the chosen responses' mean NLL a token."""

    @model_validator(mode="after")
    def _go_together(self) -> Settings:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing has no effect on {self.loss}")
        return self


def pairwise(outputs: Outputs, batch: PreferenceBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """The loss summed over pairs; unit ``pair``."""
    logps, beta = response_logprobs(outputs, batch, settings), settings.beta
    chosen, rejected = logps[batch.chosen], logps[batch.rejected]
    if settings.loss == "sigmoid":
        losses = dpo_sigmoid(chosen, rejected, beta=beta, label_smoothing=settings.label_smoothing)
    else:
        losses = (hinge if settings.loss == "hinge" else ipo)(chosen, rejected, beta=beta)
    return losses.sum(), pair_metrics(outputs, batch, beta * logps.detach())


def passes(settings: Settings) -> tuple[Pass, ...]:
    terms = [Term("cpo", "pair", partial(pairwise, settings=settings))]
    if settings.sft_weight:
        terms.append(Term("sft", "chosen_token", chosen_nll, settings.sft_weight))
    return (Pass("policy", tuple(terms), frozenset({"logprobs"})),)


def source(stage: Stage) -> DatasetSource:
    return pair_source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), pair_source(stage, stage.eval_records, "eval").in_order)


ALGORITHM = Algorithm(
    name="cpo",
    settings=Settings,
    record=lambda _: Preference,
    roles=lambda _: ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "rewards/margins"),
)
