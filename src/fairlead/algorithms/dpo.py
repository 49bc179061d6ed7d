"""Direct preference optimisation (Rafailov et al. 2023): the policy's log-ratio to the reference is the reward.

The reference's log-probabilities are computed once, before the first step. A term of plain likelihood on the chosen
responses may be mixed in (RPO, Pang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import preference_batch
from fairlead.models.roles import Models
from fairlead.ops.masked import sequence_sums
from fairlead.ops.preference import dpo_sigmoid
from fairlead.types import Algorithm, Mean, Metrics, Outputs, Pass, Preference, PreferenceBatch, Term, TokenBatch


class Settings(Section):
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference; smaller forgets it more."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen responses' mean token NLL, added to the loss."""


def sigmoid(outputs: Outputs, batch: PreferenceBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """The sigmoid loss summed over pairs; unit ``pair``."""
    assert batch.reference_logprobs is not None
    logps = sequence_logprobs(outputs, batch)
    ratios = logps - batch.reference_logprobs
    chosen, rejected = ratios[batch.chosen], ratios[batch.rejected]
    losses = dpo_sigmoid(chosen, rejected, beta=settings.beta, label_smoothing=settings.label_smoothing)
    pairs, rewards = batch.counts["pair"], settings.beta * ratios.detach()
    won, lost, logps = rewards[batch.chosen], rewards[batch.rejected], logps.detach()
    return losses.sum(), {
        "rewards/chosen": Mean(won.sum(), pairs),
        "rewards/rejected": Mean(lost.sum(), pairs),
        "rewards/margins": Mean((won - lost).sum(), pairs),
        "rewards/accuracies": Mean((won > lost).sum() + 0.5 * (won == lost).sum(), pairs),
        "logps/chosen": Mean(logps[batch.chosen].sum(), pairs),
        "logps/rejected": Mean(logps[batch.rejected].sum(), pairs),
    }


def chosen_nll(outputs: Outputs, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the chosen responses' tokens, summed; unit ``chosen_token``."""
    return -sequence_logprobs(outputs, batch)[batch.chosen].sum(), {}


def sequence_logprobs(outputs: Outputs, batch: TokenBatch) -> Tensor:
    """[S] log-probability of each whole response."""
    return sequence_sums(outputs.logprobs, batch.loss_mask, batch.sequence_ids, batch.num_sequences)


def passes(settings: Settings) -> tuple[Pass, ...]:
    terms = [Term("dpo", "pair", partial(sigmoid, settings=settings))]
    if settings.sft_weight:
        terms.append(Term("sft", "chosen_token", chosen_nll, settings.sft_weight))
    return (Pass("policy", tuple(terms), frozenset({"logprobs"})),)


def source(stage: Stage) -> DatasetSource:
    return _source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), _source(stage, stage.eval_records, "eval").in_order)


@torch.no_grad()
def reference_logprobs(models: Models, source: DatasetSource) -> Tensor:
    """[P, 2] summed log-probabilities of chosen and rejected under the reference, in the source's order."""
    models.eval()
    with models.use("reference"):
        sums = [
            sequence_logprobs(models(batch, frozenset({"logprobs"})), batch)
            for batch in (batch.to(models.device) for batch in source.in_order())
        ]
    models.train()
    return torch.cat(sums).view(-1, 2).cpu()


def _source(stage: Stage, records: Sequence[Preference], split: str) -> DatasetSource:
    trees, _ = stage.trees(records, split)
    reference: list[Tensor] = []

    def collate(chosen: Sequence[int]) -> PreferenceBatch:
        return preference_batch(
            [trees[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            reference_logprobs=reference[0][list(chosen)] if reference else None,
        )

    made = stage.dataset_source([tree.num_tokens for tree in trees], collate)
    reference.append(reference_logprobs(stage.models, made))
    return made


ALGORITHM = Algorithm(
    name="dpo",
    settings=Settings,
    record=Preference,
    roles=lambda _: ("policy", "reference"),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "rewards/margins"),
    reference_first=True,
)
