"""Estimators of KL(policy || reference) from the log-probabilities of the policy's own samples.

Schulman, "Approximating KL divergence" (2020): with log r = log policy - log reference at a token drawn from the
policy, k1 = log r is unbiased and may be negative; k2 = (log r)^2 / 2 is biased and never negative; k3 = exp(-log r)
- 1 + log r is unbiased and never negative. As *losses* over the policy's own samples, k2 has the gradient of the KL,
k1's is zero in expectation and k3's descends the forward KL; k3 times policy / behaviour policy has the right one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log policy - log reference, per token. [...] -> [...]"""
    return policy_logprobs - reference_logprobs


def k2(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """k1^2 / 2, per token. [...] -> [...]"""
    return 0.5 * k1(policy_logprobs, reference_logprobs) ** 2


def k3(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1, per token. [...] -> [...]"""
    log_ratio = k1(policy_logprobs, reference_logprobs)
    return torch.expm1(-log_ratio) + log_ratio


def absolute(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """|k1|, per token: a penalty that no token can earn from. [...] -> [...]"""
    return k1(policy_logprobs, reference_logprobs).abs()
