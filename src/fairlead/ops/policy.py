"""Losses of policy optimisation, per token. Schulman et al., "Proximal Policy Optimization Algorithms" (2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from fairlead.ops.masked import sequence_sums


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, *, dual_clip: float | None = None
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), equation 7; an infinite ``high`` (with ``low`` 1) clips
    nothing. With ``dual_clip`` c > 1 a negative advantage weighs no more than c * A (Ye et al. 2020, equation 5);
    ``high`` above ``low`` is the clip-higher of DAPO (Yu et al. 2025, equation 8). [...] -> [...]"""
    gained = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual_clip is not None:
        gained = torch.where(advantages < 0, torch.maximum(gained, dual_clip * advantages), gained)
    return -gained


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, *, dual_clip: float | None = None) -> Tensor:
    """Where a constant branch of `clipped_surrogate` is taken: no gradient. [...] -> [...] bool"""
    clipped = ratio.clamp(1 - low, 1 + high) * advantages < ratio * advantages
    if dual_clip is not None:
        clipped = clipped | ((advantages < 0) & (ratio > dual_clip))
    return clipped


def token_ratio(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """policy / behaviour policy at each token. [...] -> [...]"""
    return torch.exp(logprobs - behaviour_logprobs)


def sequence_ratio(logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, owner: Tensor, number: int) -> Tensor:
    """(policy / behaviour policy of the whole response)^(1 / its tokens), at each of its tokens, with the gradient of
    GSPO-token (Zheng et al., "Group Sequence Policy Optimization", 2025, equations 7 and 14). [B, T] tensors, ``owner``
    the sequence of a token, ``number`` of them -> [B, T], one off the mask."""
    lengths = torch.bincount(owner[mask], minlength=number)
    mean = sequence_sums(logprobs - behaviour_logprobs, mask, owner, number) / lengths
    spread = torch.zeros_like(logprobs)
    spread[mask] = mean.detach()[owner[mask]]
    return torch.exp(spread + torch.where(mask, logprobs - logprobs.detach(), 0.0))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_range: float | None
) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2); none: the plain squared error. [...] -> [...]"""
    loss = (values - returns) ** 2
    if value_clip_range is not None:
        near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return 0.5 * loss
