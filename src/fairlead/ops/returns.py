"""Rewards to advantages: KL shaping, generalised advantage estimation, baselines from a prompt's other responses."""

from __future__ import annotations

import torch
from torch import Tensor


def shaped_rewards(
    scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coef: float, dense: Tensor | None = None
) -> Tensor:
    """-kl_coef * kl at every token, plus the response's score at its last and a ``dense`` reward [S, T] at each.
    ``scores`` [S], ``kl`` [S, T], ``lengths`` [S] >= 1 tokens of each response (left-aligned) -> [S, T], zero past the
    end.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), equation 2.
    """
    inside = torch.arange(kl.shape[1], device=kl.device)[None] < lengths[:, None]
    rewards = torch.where(inside, -kl_coef * kl, 0.0)
    rows = torch.arange(scores.shape[0], device=kl.device)
    rewards[rows, lengths - 1] += scores
    return rewards if dense is None else rewards + torch.where(inside, dense, 0.0)


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


def rewards_to_go(rewards: Tensor, *, gamma: float) -> Tensor:
    """sum_{k >= t} gamma^(k - t) r_k. [S, T] left-aligned, zero past the end -> [S, T]"""
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
    return returns


def leave_one_out(scores: Tensor) -> Tensor:
    """Each response's score less the mean of the others to the same prompt. [P, K], K >= 2 -> [P, K]

    Ahmadian et al., "Back to Basics: Revisiting REINFORCE-Style Optimization" (2024), equation 8.
    """
    number = scores.shape[1]
    return (scores - scores.mean(1, keepdim=True)) * number / (number - 1)


def group_centred(scores: Tensor, *, scale: bool) -> Tensor:
    """Each response's score less the mean of its prompt's, divided by their standard deviation if asked for. [P, K] ->
    [P, K]; a prompt whose responses score alike gives zero.

    Shao et al., "DeepSeekMath" (2024), section 4.1.2; without the scale: Liu et al., "Understanding R1-Zero-Like
    Training" (2025), Dr. GRPO.
    """
    centred = scores - scores.mean(1, keepdim=True)
    if not scale:
        return centred
    spread = scores.std(1, keepdim=True)
    rounding = 16 * torch.finfo(scores.dtype).eps * scores.abs().amax(1, keepdim=True)
    return torch.where(spread > rounding, centred / spread.clamp(min=1e-8), 0.0)
