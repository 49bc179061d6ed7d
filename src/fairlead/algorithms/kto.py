"""KTO (Ethayarajh et al. 2024): single responses, each good or bad, against a reference point: the policy's KL to the
reference, estimated over all of a step's mismatched pairs of prompt and response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fairlead.algorithms.labels import label_metrics, label_source
from fairlead.algorithms.responses import log_ratios
from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.ops.preference import kto
from fairlead.types import Algorithm, Call, Labelled, LabelledBatch, Mean, Metrics, Outputs, Pass, Ranks, Term


class Settings(Section):
    loss: Literal["kto", "apo_zero"] = "kto"
    """apo_zero: the reference point is 0 (D'Oosterlinck et al. 2024)."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference; smaller forgets it more."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the good responses. Of good and bad, weight times number should stand between 1:1 and 4:3."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the bad responses."""


def labelled(outputs: Outputs, batch: LabelledBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """The loss summed over responses; unit ``sequence``."""
    ratios = log_ratios(outputs, batch)
    kl = batch.statistics["kl"] if settings.loss == "kto" else ratios.new_zeros(())
    losses = kto(ratios, batch.label, kl, beta=settings.beta)
    weights = torch.full_like(losses, settings.undesirable_weight)
    weights[batch.label] = settings.desirable_weight
    metrics = label_metrics(outputs, batch, settings.beta * ratios.detach(), settings.beta * kl)
    return (weights * losses).sum(), {**metrics, "kl": Mean(float(kl), 1.0)}


def prepare(call: Call, batches: Sequence[LabelledBatch], ranks: Ranks) -> list[LabelledBatch]:
    """max(0, mean log-ratio of the mismatched pairs of all micro-batches): the reference point of each."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        assert batch.mismatched is not None
        logprobs = call(batch.mismatched, frozenset({"logprobs"})).logprobs.cpu()
        total = total + log_ratios(Outputs(logprobs=logprobs), batch.mismatched).sum()
        count += batch.mismatched.num_sequences
    sums = ranks.sums({"total": float(total), "count": count})
    kl = total.new_tensor(sums["total"] / sums["count"]).clamp(min=0)
    return [replace(batch, statistics={**batch.statistics, "kl": kl}) for batch in batches]


def passes(settings: Settings) -> tuple[Pass, ...]:
    term = Term("kto", "sequence", partial(labelled, settings=settings))
    return (Pass("policy", (term,), frozenset({"logprobs"}), prepare=prepare if settings.loss == "kto" else None),)


def source(stage: Stage) -> DatasetSource:
    return label_source(stage, stage.records, "train", mismatch=stage.settings.loss == "kto")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    held_out = label_source(stage, stage.eval_records, "eval", mismatch=stage.settings.loss == "kto")
    return stage.loss_evaluation(passes(stage.settings), held_out.in_order)


ALGORITHM = Algorithm(
    name="kto",
    settings=Settings,
    record=lambda _: Labelled,
    roles=lambda _: ("policy", "reference"),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "kl"),
    reference=lambda _: "first",
)
