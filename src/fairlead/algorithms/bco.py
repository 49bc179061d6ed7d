"""Binary classifier optimisation (Jung et al. 2024): single responses, each good or bad; the reward of a good one is to
lie above, that of a bad one below the mean of the two classes' means, taken over the whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from fairlead.algorithms.labels import label_metrics, label_source
from fairlead.algorithms.responses import log_ratios
from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.ops.preference import bco
from fairlead.types import Algorithm, Call, Labelled, LabelledBatch, Mean, Metrics, Outputs, Pass, Ranks, Term


class Settings(Section):
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference; smaller forgets it more."""


def labelled(outputs: Outputs, batch: LabelledBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """The loss summed over responses; unit ``sequence``."""
    rewards, shift = settings.beta * log_ratios(outputs, batch), batch.statistics["shift"]
    metrics = label_metrics(outputs, batch, rewards.detach(), shift)
    return bco(rewards, batch.label, shift).sum(), {**metrics, "rewards/shift": Mean(float(shift), 1.0)}


def prepare(call: Call, batches: Sequence[LabelledBatch], ranks: Ranks, *, settings: Settings) -> list[LabelledBatch]:
    """The mean of the mean rewards of good and bad responses over all micro-batches; of one class alone, its mean."""
    rewards = [
        settings.beta * log_ratios(Outputs(logprobs=call(batch, frozenset({"logprobs"})).logprobs.cpu()), batch)
        for batch in batches
    ]
    found, label = ranks.whole(rewards), ranks.whole([batch.label for batch in batches])
    sides = [found[side].mean() for side in (label, ~label) if bool(side.any())]
    shift = torch.stack(sides).mean()
    return [replace(batch, statistics={**batch.statistics, "shift": shift}) for batch in batches]


def passes(settings: Settings) -> tuple[Pass, ...]:
    term = Term("bco", "sequence", partial(labelled, settings=settings))
    return (Pass("policy", (term,), frozenset({"logprobs"}), prepare=partial(prepare, settings=settings)),)


def source(stage: Stage) -> DatasetSource:
    return label_source(stage, stage.records, "train", mismatch=False)


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    held_out = label_source(stage, stage.eval_records, "eval", mismatch=False)
    return stage.loss_evaluation(passes(stage.settings), held_out.in_order)


ALGORITHM = Algorithm(
    name="bco",
    settings=Settings,
    record=lambda _: Labelled,
    roles=lambda _: ("policy", "reference"),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "rewards/shift"),
    reference=lambda _: "first",
)
