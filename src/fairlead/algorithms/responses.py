"""What algorithms that compare whole responses share: log-probabilities a response, in the form the settings ask for,
and what is measured of pairs. Knows no loss."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fairlead.config import Section
from fairlead.ops.masked import sequence_sums
from fairlead.types import Mean, Metrics, Outputs, PreferenceBatch, TokenBatch


class LengthSettings(Section):
    length: Literal["sum", "mean"] = "sum"
    """Log-probability of a response: the sum over its tokens, or their mean (length-normalised)."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens by which the longer response of a pair exceeds the shorter one (LD-DPO, Liu et al. 2024,
    equation 7); 1 or null: all tokens alike."""


PLAIN = LengthSettings()


def response_sums(values: Tensor, batch: TokenBatch, form: LengthSettings = PLAIN) -> Tensor:
    """Per-token ``values`` [B, T] of the counted tokens, one number a response [S]."""
    mask, owner = batch.loss_mask, batch.sequence_ids
    if form.ld_alpha not in (None, 1.0):
        assert isinstance(batch, PreferenceBatch)
        shared = torch.minimum(*(response_lengths(batch)[side] for side in (batch.chosen, batch.rejected)))
        limit = shared.new_zeros(batch.num_sequences)
        limit[batch.chosen], limit[batch.rejected] = shared, shared
        beyond = torch.zeros_like(mask)
        beyond[mask] = _place(batch) >= limit[owner[mask]]
        values = torch.where(beyond, form.ld_alpha * values, values)
    sums = sequence_sums(values, mask, owner, batch.num_sequences)
    return sums / response_lengths(batch) if form.length == "mean" else sums


def response_lengths(batch: TokenBatch) -> Tensor:
    """Counted tokens of each response [S]."""
    return torch.bincount(batch.sequence_ids[batch.loss_mask], minlength=batch.num_sequences)


def _place(batch: TokenBatch) -> Tensor:
    """Of each counted token, in order, its place among those of its response, from 0."""
    owner, positions = batch.sequence_ids[batch.loss_mask], batch.position_ids[batch.loss_mask]
    first = positions.new_full((batch.num_sequences,), torch.iinfo(positions.dtype).max)
    return positions - first.scatter_reduce(0, owner, positions, "amin")[owner]


def log_ratios(outputs: Outputs, batch: TokenBatch, form: LengthSettings = PLAIN) -> Tensor:
    """log(policy / reference) of each response [S]."""
    reference = getattr(batch, "reference_logprobs", None)
    assert reference is not None, "the batch was made without its reference"
    return response_sums(outputs.logprobs - reference, batch, form)


def response_logprobs(outputs: Outputs, batch: TokenBatch, form: LengthSettings = PLAIN) -> Tensor:
    """Log-probability of each response [S]."""
    return response_sums(outputs.logprobs, batch, form)


def chosen_nll(outputs: Outputs, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the chosen responses' tokens, summed; unit ``chosen_token``."""
    return -response_logprobs(outputs, batch)[batch.chosen].sum(), {}


@torch.no_grad()
def pair_metrics(outputs: Outputs, batch: PreferenceBatch, rewards: Tensor) -> Metrics:
    """The field's names: rewards/*, logps/*, and entropy and logits/* where they were asked for. ``rewards`` [S]."""
    pairs = batch.counts["pair"]
    logps = response_logprobs(outputs, batch)
    won, lost = rewards[batch.chosen], rewards[batch.rejected]
    metrics = {
        "rewards/chosen": Mean(won.sum(), pairs),
        "rewards/rejected": Mean(lost.sum(), pairs),
        "rewards/margins": Mean((won - lost).sum(), pairs),
        "rewards/accuracies": Mean((won > lost).sum() + 0.5 * (won == lost).sum(), pairs),
        "logps/chosen": Mean(logps[batch.chosen].sum(), pairs),
        "logps/rejected": Mean(logps[batch.rejected].sum(), pairs),
    }
    if getattr(batch, "reference_logprobs", None) is not None:
        moved = log_ratios(outputs, batch)[batch.chosen]
        metrics["logps/chosen_change"] = Mean(moved.sum(), pairs)
    return metrics | token_metrics(outputs, batch)


@torch.no_grad()
def token_metrics(outputs: Outputs, batch: TokenBatch) -> Metrics:
    """entropy and logits/* a token, where the pass computed them."""
    metrics: Metrics = {}
    if outputs.has("entropy"):
        metrics["entropy"] = Mean(outputs.entropy.sum(), batch.counts["token"])
    if outputs.has("mean_logit") and isinstance(batch, PreferenceBatch):
        sums, lengths = response_sums(outputs.mean_logit, batch), response_lengths(batch)
        for name, side in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            metrics[f"logits/{name}"] = Mean(sums[side].sum(), lengths[side].sum())
    return metrics
