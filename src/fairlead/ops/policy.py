"""Losses of policy optimisation, per token. Schulman et al., "Proximal Policy Optimization Algorithms" (2017)."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A), equation 7. [...] -> [...]"""
    ratio = torch.exp(logprobs - behaviour_logprobs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """Where the clipped branch is the smaller one, so that the token has no gradient. [...] -> [...] bool"""
    ratio = torch.exp(logprobs - behaviour_logprobs)
    return ratio.clamp(1 - clip_range, 1 + clip_range) * advantages < ratio * advantages


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_range: float | None
) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2); none: the plain squared error. [...] -> [...]"""
    loss = (values - returns) ** 2
    if value_clip_range is not None:
        near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return 0.5 * loss
