"""What a model call takes: rows of runs, and what the losses of each kind of record need beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """What tokens could be drawn where it was not the whole vocabulary: log-probabilities, KL and entropy are of
    the distribution over them. N counted tokens, in the order of ``loss_mask``."""

    kept: Tensor
    """[M] token ids, those of one counted token after the other."""
    counts: Tensor
    """[N] how many of ``kept`` are of each counted token; 0: the whole vocabulary."""
    banned: Tensor
    """[N] a token that could not be drawn, or -1."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Support:
        return Support(*(each.to(device, non_blocking=non_blocking) for each in (self.kept, self.counts, self.banned)))


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows of runs. ``visible(i, j) = j <= i < subtree_end[j]`` says which token attends to which."""

    input_ids: Tensor
    """[B, T] token ids."""
    position_ids: Tensor
    """[B, T] a child run continues its parent's positions."""
    subtree_end: Tensor
    """[B, T] exclusive end of the token's subtree, in the row; 0 for padding, which nothing sees."""
    previous: Tensor
    """[B, T] index in the row of the token this one is predicted from; -1 for none."""
    loss_mask: Tensor
    """[B, T] bool: the tokens that count. Never true where ``previous`` is -1."""
    sequence_ids: Tensor
    """[B, T] 0..S-1; -1 for padding and for runs shared by several sequences."""
    sequence_ends: Tensor
    """[S] index of each sequence's last token in the flattened [B * T]."""
    counts: dict[str, float]
    """How much of each unit the batch holds: token, sequence, pair ..."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], kw_only=True)
    """What `Pass.prepare` found over all micro-batches of the step, for losses that couple them."""
    support: Support | None = field(default=None, kw_only=True)
    """What the counted tokens were drawn from, where that was less than the vocabulary."""

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | Support)
        }
        statistics = {name: value.to(device, non_blocking=True) for name, value in self.statistics.items()}
        return replace(self, **moved, statistics=statistics)

    @property
    def num_sequences(self) -> int:
        return self.sequence_ends.shape[0]

    @property
    def num_tokens(self) -> int:
        """Real tokens: neither padding nor counted twice where a prompt is shared."""
        return int((self.subtree_end > 0).sum())


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceBatch(TokenBatch):
    """Pairs of sequences of one prompt; of a ranking every pair that is no tie. ``counts`` also holds ``pair`` and
    ``chosen_token``."""

    chosen: Tensor
    """[P] sequence index of the chosen response."""
    rejected: Tensor
    """[P] sequence index of the rejected response."""
    margin: Tensor | None = None
    """[P] or none."""
    reference_logprobs: Tensor | None = None
    """[B, T] log-probabilities of the reference, zero off the mask; none where no reference is used."""
    times: Tensor | None = field(default=None, kw_only=True)
    """[P, K], of rankings [G, K]: how often each member of an ensemble counts it; none where each does once."""


@dataclass(frozen=True, slots=True, eq=False)
class RankingBatch(PreferenceBatch):
    """Rankings: the responses to one prompt stand side by side, the best first."""

    group: Tensor = field(kw_only=True)
    """[S] which ranking a sequence belongs to, 0..G-1; ``counts`` also holds ``ranking``."""
    level: Tensor = field(kw_only=True)
    """[S] place in the ranking, from 0 for the best; equal places are ties."""
    rating: Tensor | None = None
    """[S] the score the data set gives, or none."""
    attributes: Tensor | None = None
    """[S, K] its score of each attribute, nan where it gives none. ``counts`` then also holds ``attribute_rating``, how
    many it gives, and ``attribute_ranking``, how many times a ranking is none of ties by one."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledBatch(TokenBatch):
    """Single responses, each good or bad."""

    label: Tensor
    """[S] bool"""
    reference_logprobs: Tensor | None = None
    """[B, T] as of pairs."""
    mismatched: LabelledBatch | None = None
    """The same prompts, each with a response to another one."""


@dataclass(frozen=True, slots=True, eq=False)
class RolloutBatch(TokenBatch):
    """Sampled responses and what was computed about them when the round began; [B, T] are zero off the mask."""

    behaviour_logprobs: Tensor
    """[B, T] log-probabilities of the policy that sampled, at the sampling temperature."""
    advantages: Tensor
    """[B, T]"""
    reference_logprobs: Tensor | None = None
    """[B, T], where the loss holds the KL."""
    values: Tensor | None = None
    """[B, T] value before emitting the token, when the round began; none without a value."""
    returns: Tensor | None = None
    """[B, T] target of the value."""
    weights: Tensor | None = None
    """[B, T] truncated importance weights of the trainer's log-probabilities against the sampler's, where they are
    corrected for."""


@dataclass(frozen=True, slots=True, eq=False)
class MixedBatch(TokenBatch):
    """Text that is learned beside the responses of a round: `PPO-ptx`. ``counts`` holds ``mixed_token`` alone."""
