"""Supervised fine-tuning: the responses' tokens count, end-of-sequence included; prompts do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fairlead.algorithms.pretrain import with_perplexity
from fairlead.algorithms.stage import Stage
from fairlead.algorithms.terms import nll
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import token_batch
from fairlead.types import Algorithm, Demonstration, Pass, Term


class Settings(Section):
    """SFT has no settings of its own."""


def passes(_: Settings) -> tuple[Pass, ...]:
    return (Pass("policy", (Term("nll", "token", nll),), frozenset({"logprobs"})),)


def source(stage: Stage) -> DatasetSource:
    return _source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    held_out = _source(stage, stage.eval_records, "eval")
    measure = stage.loss_evaluation(passes(stage.settings), held_out.in_order)
    return lambda: with_perplexity(measure())


def _source(stage: Stage, records: Sequence[Demonstration], split: str) -> DatasetSource:
    trees, _ = stage.trees(records, split)
    return stage.dataset_source(
        [tree.num_tokens for tree in trees],
        lambda chosen: token_batch([trees[i] for i in chosen], packed=stage.packed, pad_id=stage.pad_id),
    )


ALGORITHM = Algorithm(
    name="sft",
    settings=Settings,
    record=Demonstration,
    roles=lambda _: ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "eval/perplexity", "learning_rate"),
    compares=False,
)
