"""Reward model: a scalar head at the last token of each response, trained on pairs with the Bradley-Terry loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import Field
from torch import Tensor

from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import preference_batch
from fairlead.ops.preference import bradley_terry
from fairlead.types import Algorithm, Mean, Metrics, Outputs, Pass, Preference, PreferenceBatch, Term


class Settings(Section):
    margin_coef: float = Field(default=0.0, ge=0)
    """The scores of a pair are pushed apart by this times its margin (Llama 2, eq. 2), whose unit is that of the data
    set, points of a judge say. 0: margins are not used."""


def pairwise(outputs: Outputs, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss summed over pairs. A tie counts as half right."""
    chosen, rejected = outputs.scores[batch.chosen], outputs.scores[batch.rejected]
    loss = bradley_terry(chosen, rejected, margin=batch.margin).sum()
    pairs = batch.counts["pair"]
    right = (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()
    return loss, {
        "rewards/accuracies": Mean(right.detach(), pairs),
        "rewards/chosen": Mean(chosen.detach().sum(), pairs),
        "rewards/rejected": Mean(rejected.detach().sum(), pairs),
        "rewards/margins": Mean((chosen - rejected).detach().sum(), pairs),
    }


def passes(_: Settings) -> tuple[Pass, ...]:
    return (Pass("reward", (Term("bradley_terry", "pair", pairwise),), frozenset({"scores"})),)


def source(stage: Stage) -> DatasetSource:
    return _source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), _source(stage, stage.eval_records, "eval").in_order)


def _source(stage: Stage, records: Sequence[Preference], split: str) -> DatasetSource:
    trees, kept = stage.trees(records, split)
    coefficient = stage.settings.margin_coef
    margins = [coefficient * (records[i].margin or 0.0) if coefficient else None for i in kept]
    return stage.dataset_source(
        [tree.num_tokens for tree in trees],
        lambda chosen: preference_batch(
            [trees[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            margins=[margins[i] for i in chosen],
        ),
    )


ALGORITHM = Algorithm(
    name="reward",
    settings=Settings,
    record=Preference,
    roles=lambda _: ("reward",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "eval/rewards/accuracies"),
)
