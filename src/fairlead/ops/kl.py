"""Estimators of KL(policy || reference) from the log-probabilities of the policy's own samples.

Schulman, "Approximating KL divergence" (2020): with log r = log policy - log reference at a token drawn from the
policy, k1 = log r is unbiased and may be negative; k3 = exp(-log r) - 1 + log r is unbiased and never negative. As
*losses* neither has the right gradient (k1's is zero in expectation, k3's descends the forward KL), so the KL goes
into the reward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log policy - log reference, per token. [...] -> [...]"""
    return policy_logprobs - reference_logprobs


def k3(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1, per token. [...] -> [...]"""
    log_ratio = k1(policy_logprobs, reference_logprobs)
    return torch.expm1(-log_ratio) + log_ratio
