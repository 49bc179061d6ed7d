"""Where losses of preferences end when they are followed to the end, in closed form from their papers. Imports nothing
of the trainers: this is the other opinion.

p is the share in which one response is preferred to the other, d the difference of their log-ratios
log(policy / reference).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(p: float, beta: float) -> float:
    """Rafailov et al. 2023, section 4: the policy whose implicit reward is the Bradley-Terry model's, so beta d is the
    log odds."""
    return logit(p) / beta


def kl(one: Tensor, other: Tensor) -> float:
    """KL(one || other) of the worst prompt, of log-probabilities [P, N]."""
    terms = torch.where(one.exp() > 0, one.exp() * (one - other), 0.0)
    return float(terms.sum(-1).max())
