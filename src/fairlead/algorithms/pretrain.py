"""Language modelling on plain text: every token counts; texts stand in rows whole, or end to end and cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fairlead.algorithms.stage import Stage
from fairlead.algorithms.terms import nll
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import pack_text, pack_whole, text_pieces, token_batch
from fairlead.errors import DataError
from fairlead.types import Algorithm, Pass, Term, Text, TokenBatch


class Settings(Section):
    """Pretraining has no settings of its own."""


def passes(_: Settings) -> tuple[Pass, ...]:
    return (Pass("policy", (Term("nll", "token", nll),), frozenset({"logprobs"}), uniform=True),)


def source(stage: Stage) -> DatasetSource:
    return _source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    held_out = _source(stage, stage.eval_records, "eval")
    measure = stage.loss_evaluation(passes(stage.settings), held_out.in_order)
    return lambda: with_perplexity(measure())


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    return {**metrics, "eval/perplexity": math.exp(min(metrics["eval/loss"], 700.0))}


def _source(stage: Stage, records: Sequence[Text], split: str) -> DatasetSource:
    trees, _ = stage.trees(records, split)
    length = stage.recipe.data.max_length
    if not stage.packed:
        rows = [[piece] for piece in text_pieces(trees, length)]
    elif stage.recipe.data.packing == "wrapped":
        total = sum(tree.num_tokens for tree in trees)
        rows = pack_text(trees, min(length, total))
    else:
        rows = pack_whole(trees, length)
    if not rows:
        raise DataError(f"the {split} texts hold no row of two tokens")

    def collate(indices: Sequence[int]) -> TokenBatch:
        return token_batch([tree for i in indices for tree in rows[i]], packed=stage.packed, pad_id=stage.pad_id)

    return stage.dataset_source([sum(tree.num_tokens for tree in row) for row in rows], collate)


ALGORITHM = Algorithm(
    name="pretrain",
    settings=Settings,
    record=lambda _: Text,
    roles=lambda _: ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "eval/perplexity", "learning_rate"),
    compares=False,
)
