"""Reward model: a scalar head at the last token of each response, trained on pairs (Bradley-Terry), on rankings of K
responses in one row (every pair of them, or Plackett-Luce), or on ratings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import preference_batch, ranking_batch
from fairlead.errors import DataError
from fairlead.ops.scores import bradley_terry, centring, plackett_luce
from fairlead.types import (
    Algorithm,
    Mean,
    Metrics,
    Outputs,
    Pass,
    Preference,
    PreferenceBatch,
    Ranking,
    RankingBatch,
    Record,
    Term,
)


class Settings(Section):
    loss: Literal["bradley_terry", "plackett_luce", "regression"] = "bradley_terry"
    """bradley_terry: of pairs; plackett_luce: of the whole order of a ranking; regression: squared distance to the
    ratings of the data set."""
    rankings: bool = False
    """All responses to a prompt in one row, and of each ranking every pair that is no tie, weighing as much as one pair
    together (InstructGPT); else of a ranking the best against the worst. plackett_luce and regression always do."""
    margin_coef: float = Field(default=0.0, ge=0)
    """The scores of a pair are pushed apart by this times its margin (Llama 2, eq. 2), whose unit is that of the data
    set, points of a judge say. 0: margins are not used."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels."""
    centring_coef: float = Field(default=0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps the scores' mean at zero; 0.01 is usual."""

    @property
    def takes_rankings(self) -> bool:
        return self.rankings or self.loss != "bradley_terry"

    @model_validator(mode="after")
    def _go_together(self) -> Settings:
        given = [name for name in ("margin_coef", "label_smoothing") if getattr(self, name)]
        if self.loss != "bradley_terry" and given:
            raise ValueError(f"{' and '.join(given)}: for loss bradley_terry, not for {self.loss}")
        return self


def pairwise(outputs: Outputs, batch: PreferenceBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss, summed over pairs, or over rankings each of whose pairs weighs 1 / their number."""
    chosen, rejected = outputs.scores[batch.chosen], outputs.scores[batch.rejected]
    margin = None if batch.margin is None or not settings.margin_coef else settings.margin_coef * batch.margin
    losses = bradley_terry(chosen, rejected, margin=margin, label_smoothing=settings.label_smoothing)
    return _summed(losses, batch), _metrics(outputs, batch)


def zero_mean(outputs: Outputs, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
    """(chosen + rejected)^2, summed as the loss is."""
    return _summed(centring(outputs.scores[batch.chosen], outputs.scores[batch.rejected]), batch), {}


def listwise(outputs: Outputs, batch: RankingBatch) -> tuple[Tensor, Metrics]:
    """Plackett-Luce loss summed over rankings; unit ``ranking``."""
    rankings = int(batch.counts["ranking"])
    return plackett_luce(outputs.scores, batch.group, batch.level, rankings).sum(), _metrics(outputs, batch)


def pointwise(outputs: Outputs, batch: RankingBatch) -> tuple[Tensor, Metrics]:
    """Squared distance to the ratings summed over responses; unit ``sequence``."""
    assert batch.rating is not None
    error = outputs.scores - batch.rating.to(outputs.scores.dtype)
    return error.square().sum(), _metrics(outputs, batch)


def _summed(losses: Tensor, batch: PreferenceBatch) -> Tensor:
    if not isinstance(batch, RankingBatch):
        return losses.sum()
    group = batch.group[batch.chosen]
    return (losses / torch.bincount(group)[group]).sum()


@torch.no_grad()
def _metrics(outputs: Outputs, batch: PreferenceBatch) -> Metrics:
    """A tie of scores counts as half right."""
    chosen, rejected = outputs.scores[batch.chosen], outputs.scores[batch.rejected]
    pairs = batch.counts["pair"]
    right = (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()
    return {
        "rewards/accuracies": Mean(right, pairs),
        "rewards/chosen": Mean(chosen.sum(), pairs),
        "rewards/rejected": Mean(rejected.sum(), pairs),
        "rewards/margins": Mean((chosen - rejected).sum(), pairs),
    }


def passes(settings: Settings) -> tuple[Pass, ...]:
    unit = "ranking" if settings.takes_rankings else "pair"
    if settings.loss == "bradley_terry":
        terms = [Term("bradley_terry", unit, partial(pairwise, settings=settings))]
    elif settings.loss == "plackett_luce":
        terms = [Term("plackett_luce", unit, listwise)]
    else:
        terms = [Term("regression", "sequence", pointwise)]
    if settings.centring_coef:
        terms.append(Term("centring", unit, zero_mean, settings.centring_coef))
    return (Pass("reward", tuple(terms), frozenset({"scores"})),)


def source(stage: Stage) -> DatasetSource:
    return _source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), _source(stage, stage.eval_records, "eval").in_order)


def _source(stage: Stage, records: Sequence[Preference] | Sequence[Ranking], split: str) -> DatasetSource:
    settings: Settings = stage.settings
    rankings = [record for record in records if isinstance(record, Ranking)]
    if not settings.takes_rankings:
        pairs = [record for record in records if isinstance(record, Preference)]
        return _pairs(stage, pairs, split)
    ordered = [ranking for ranking in rankings if settings.loss == "regression" or _levels(ranking)[-1] > 0]
    if not ordered:
        raise DataError(f"all {len(rankings)} {split} rankings are ties from the first to the last")
    if settings.loss == "regression" and any(ranking.scores is None for ranking in ordered):
        raise DataError(
            f"{sum(ranking.scores is None for ranking in ordered)} of {len(ordered)} {split} rankings have no scores, "
            "which reward.loss=regression learns",
            hint="reward.loss=plackett_luce learns from the order alone",
        )
    trees, kept = stage.trees(ordered, split)
    levels = [_levels(ordered[i]) for i in kept]
    ratings = [ordered[i].scores or () for i in kept] if all(ordered[i].scores for i in kept) else None
    stage.drop(split, "tie", len(rankings) - len(ordered))
    return stage.dataset_source(
        [tree.num_tokens for tree in trees],
        lambda chosen: ranking_batch(
            [trees[i] for i in chosen],
            [levels[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            ratings=None if ratings is None else [ratings[i] for i in chosen],
        ),
    )


def _pairs(stage: Stage, records: Sequence[Preference], split: str) -> DatasetSource:
    trees, kept = stage.trees(records, split)
    margins = [records[i].margin or 0.0 if stage.settings.margin_coef else None for i in kept]
    return stage.dataset_source(
        [tree.num_tokens for tree in trees],
        lambda chosen: preference_batch(
            [trees[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            margins=[margins[i] for i in chosen],
        ),
    )


def _levels(ranking: Ranking) -> list[int]:
    """Place of each response, equal scores sharing one."""
    if ranking.scores is None:
        return list(range(len(ranking.responses)))
    levels = [0]
    for before, score in zip(ranking.scores, ranking.scores[1:], strict=False):
        levels.append(levels[-1] + (score < before))
    return levels


def _record(settings: Settings) -> type[Record]:
    return Ranking if settings.takes_rankings else Preference


ALGORITHM = Algorithm(
    name="reward",
    settings=Settings,
    record=_record,
    roles=lambda _: ("reward",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "eval/rewards/accuracies"),
)
