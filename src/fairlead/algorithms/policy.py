"""The policy's loss on sampled responses, which several algorithms share: the clipped surrogate in its forms, entropy,
and the KL to the reference as a loss. Knows no reward and no advantage estimator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.config import Section
from fairlead.ops.kl import k2, k3
from fairlead.ops.masked import masked_sum
from fairlead.ops.policy import clipped_surrogate, is_clipped, sequence_ratio, token_ratio
from fairlead.types import LossFn, Mean, Metrics, Outputs, RolloutBatch, Term


class PolicySettings(Section):
    clip_range: float | None = Field(default=0.2, gt=0)
    """The ratio of a token's probability to that at the round's start is kept within 1 - clip_range and 1 + clip_range;
    null: nothing is clipped."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """Another upper range: DAPO's clip-higher."""
    dual_clip: float | None = Field(default=None, gt=1)
    """A negative advantage weighs at most so many times (Ye et al. 2020; 3 is usual)."""
    importance: Literal["token", "sequence"] = "token"
    """What the ratio is of: each token, or the whole response, length-normalised (GSPO)."""
    loss_over: Literal["token", "sequence", "constant"] = "token"
    """The loss is the mean over all tokens; over responses, of their tokens' mean; or over responses, of their tokens'
    sum / max_new_tokens (Dr. GRPO)."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Bonus for the entropy of the policy, a nat."""
    ratio_guard: float | None = Field(default=10.0, gt=1)
    """A token whose ratio is above is left out of the loss, and a step whose mean ratio is above ends the round."""
    target_kl: float | None = Field(default=None, gt=0)
    """A step after which the policy is further from the round's start (`policy/approx_kl`, nats a token) ends the
    round."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference is charged: taken off the reward of each token, or a loss of its own."""
    kl_estimator: Literal["k1", "abs", "k2", "k3", "full"] = "k1"
    """Of the KL at a token. In the reward: k1 = log policy - log reference, its absolute value, k2 = half its square,
    or full, the exact sum over the vocabulary. In the loss: k2 or k3, weighted by policy / round's start, which gives
    the gradient of each token's KL; what a token does to the KL of those after it is charged in the reward alone."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Price of one nat of KL to the reference, in units of the reward."""

    @model_validator(mode="after")
    def _kl_goes_together(self) -> PolicySettings:
        allowed = ("k1", "abs", "k2", "full") if self.kl_in == "reward" else ("k2", "k3")
        if self.kl_estimator not in allowed:
            raise ValueError(
                f"kl_estimator={self.kl_estimator} does not go into the {self.kl_in}; that takes {', '.join(allowed)}"
            )
        if self.clip_range is None and self.clip_range_high is not None:
            raise ValueError("clip_range_high is given, but clip_range=null clips nothing")
        return self

    @property
    def clip(self) -> tuple[float, float]:
        """How far the ratio may be below and above 1."""
        if self.clip_range is None:
            return 1.0, float("inf")
        return self.clip_range, self.clip_range_high or self.clip_range


def policy_terms(settings: PolicySettings, max_new_tokens: int) -> tuple[tuple[Term, ...], frozenset[str]]:
    """The terms of the policy's loss, and the outputs they need."""
    unit, reduce = _reduction(settings.loss_over, max_new_tokens)
    kinds: list[tuple[str, LossFn[RolloutBatch], float]] = [
        ("policy", partial(surrogate_term, settings=settings, reduce=reduce), 1.0)
    ]
    if settings.entropy_coef:
        kinds.append(("entropy", partial(entropy_term, reduce=reduce), settings.entropy_coef))
    if settings.kl_in == "loss" and settings.kl_coef:
        kinds.append(("kl", partial(kl_term, settings=settings, reduce=reduce), settings.kl_coef))
    needs = frozenset({"logprobs", "entropy"} if settings.entropy_coef else {"logprobs"})
    return tuple(Term(name, unit, fn, weight) for name, fn, weight in kinds), needs


Reduce = Callable[[Tensor, RolloutBatch], Tensor]
"""Per-token values [B, T] -> their sum in the unit of the term."""


def _reduction(over: str, max_new_tokens: int) -> tuple[str, Reduce]:
    if over == "token":
        return "token", lambda values, batch: masked_sum(values, batch.loss_mask)
    if over == "constant":
        return "sequence", lambda values, batch: masked_sum(values, batch.loss_mask) / max_new_tokens
    return "sequence", _sum_of_means


def _sum_of_means(values: Tensor, batch: RolloutBatch) -> Tensor:
    owner = batch.sequence_ids[batch.loss_mask]
    lengths = torch.bincount(owner, minlength=batch.num_sequences)
    return (values[batch.loss_mask] / lengths[owner]).sum()


def surrogate_term(
    outputs: Outputs, batch: RolloutBatch, *, settings: PolicySettings, reduce: Reduce
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate, times the importance weights of another engine's samples where there are."""
    mask, (low, high) = batch.loss_mask, settings.clip
    new, old = outputs.logprobs, batch.behaviour_logprobs
    tokens = token_ratio(new, old)
    ratio = (
        tokens
        if settings.importance == "token"
        else sequence_ratio(new, old, mask, batch.sequence_ids, batch.num_sequences)
    )
    loss = clipped_surrogate(ratio, batch.advantages, low, high, dual_clip=settings.dual_clip)
    if batch.weights is not None:
        loss = loss * batch.weights
    guarded = torch.zeros_like(mask) if settings.ratio_guard is None else ~(ratio.detach() <= settings.ratio_guard)
    loss = torch.where(guarded, 0.0, loss)
    clipped = is_clipped(ratio, batch.advantages, low, high, dual_clip=settings.dual_clip)
    count = batch.counts["token"]
    return reduce(loss, batch), {
        "policy/clip_fraction": Mean(masked_sum(clipped.float(), mask), count),
        "policy/approx_kl": Mean(masked_sum(k3(old, new.detach()), mask), count),
        "policy/ratio": Mean(masked_sum(tokens.detach(), mask), count),
        "policy/guarded": Mean(masked_sum(guarded.float(), mask), count),
    }


def entropy_term(outputs: Outputs, batch: RolloutBatch, *, reduce: Reduce) -> tuple[Tensor, Metrics]:
    """The negative entropy."""
    return -reduce(outputs.entropy, batch), {}


def kl_term(
    outputs: Outputs, batch: RolloutBatch, *, settings: PolicySettings, reduce: Reduce
) -> tuple[Tensor, Metrics]:
    """KL to the reference with the gradient of the KL itself: of k2 with policy / behaviour policy as a weight, of k3
    with it in the product."""
    assert batch.reference_logprobs is not None
    ratio = token_ratio(outputs.logprobs, batch.behaviour_logprobs)
    pair = outputs.logprobs, batch.reference_logprobs
    kl = ratio.detach() * k2(*pair) if settings.kl_estimator == "k2" else ratio * k3(*pair)
    return reduce(kl, batch), {}
