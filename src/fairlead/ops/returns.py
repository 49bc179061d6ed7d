"""Rewards to advantages: KL shaping and generalised advantage estimation over the tokens of each response."""

from __future__ import annotations

import torch
from torch import Tensor


def shaped_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coef: float) -> Tensor:
    """-kl_coef * kl at every token, plus the response's score at its last. ``scores`` [S], ``kl`` [S, T],
    ``lengths`` [S] >= 1 tokens of each response (left-aligned) -> [S, T], zero past the end.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), equation 2.
    """
    inside = torch.arange(kl.shape[1], device=kl.device)[None] < lengths[:, None]
    rewards = torch.where(inside, -kl_coef * kl, 0.0)
    rows = torch.arange(scores.shape[0], device=kl.device)
    rewards[rows, lengths - 1] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns. ``rewards``, ``values`` [S, T] left-aligned, ``lengths`` [S] ->
    (advantages, returns) [S, T], zero past the end. The value after the last token is zero.

    Schulman et al., "High-Dimensional Continuous Control Using GAE" (2016), equation 16:
    A_t = sum_l (gamma * lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t;  returns = A + V.
    """
    steps = rewards.shape[1]
    inside = torch.arange(steps, device=rewards.device)[None] < lengths[:, None]
    values = torch.where(inside, values, 0.0)
    advantages = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.shape[0])
    following = torch.zeros_like(running)
    for t in range(steps - 1, -1, -1):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(inside[:, t], delta + gamma * gae_lambda * running, 0.0)
        advantages[:, t] = running
        following = values[:, t]
    return advantages, torch.where(inside, advantages + values, 0.0)
