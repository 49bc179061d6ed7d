"""Supervised fine-tuning: the responses' tokens count, end-of-sequence included; prompts do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fairlead.algorithms.pretrain import with_perplexity
from fairlead.algorithms.stage import Stage
from fairlead.algorithms.terms import nll
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import token_batch
from fairlead.types import Algorithm, Demonstration, Metrics, Outputs, Pass, Term, TokenBatch


class Settings(Section):
    loss: Literal["nll", "dft"] = "nll"
    """dft: each token's loss times its own probability, without gradient (Wu et al. 2025, equation 9): tokens the model
    finds unlikely pull less."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings while training, uniform within alpha / sqrt(tokens x width) (NEFTune, Jain et al. 2023);
    5 to 15 are usual."""


def dft(outputs: Outputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """-p log p of the counted tokens, p without gradient, summed; unit ``token``."""
    weights = torch.where(batch.loss_mask, outputs.logprobs.detach().exp(), 0.0)
    return -(weights * outputs.logprobs).sum(), {}


def passes(settings: Settings) -> tuple[Pass, ...]:
    term = Term(settings.loss, "token", dft if settings.loss == "dft" else nll)
    return (Pass("policy", (term,), frozenset({"logprobs"}), uniform=settings.loss == "nll"),)


def source(stage: Stage) -> DatasetSource:
    stage.models.embedding_noise = stage.settings.neftune_alpha
    return _source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    held_out = _source(stage, stage.eval_records, "eval")
    measure = stage.loss_evaluation(passes(Settings()), held_out.in_order)  # perplexity is of the likelihood
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
    record=lambda _: Demonstration,
    roles=lambda _: ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "eval/perplexity", "learning_rate"),
    compares=False,
)
