"""Where losses and rewards end when they are followed to the end, in closed form from their papers or as the least
value of the published loss. Imports nothing of the trainers: this is the other opinion.

p is the share in which one response is preferred to the other, d the difference of their log-ratios
log(policy / reference), e a loss's label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# --- losses of two responses: d ------------------------------------------------------------------------------------


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(p: float, beta: float, e: float = 0.0) -> float:
    """Rafailov et al. 2023, section 4: the policy whose implicit reward is the Bradley-Terry model's, so beta d is the
    log odds; with e those of labels flipped once more."""
    return logit(p * (1 - e) + (1 - p) * e) / beta


def robust(p: float, beta: float, e: float) -> float:
    """Ray Chowdhury et al. 2024, section 3: the log odds before a share e of the labels was flipped."""
    return logit((p - e) / (1 - 2 * e)) / beta


def ipo(p: float, beta: float) -> float:
    """Azar et al. 2023, proposition 4: a regression of +-1 / (2 beta), whose mean is (2 p - 1) / (2 beta)."""
    return (2 * p - 1) / (2 * beta)


def hinge(p: float, beta: float) -> float:
    """Zhao et al. 2023, equation 1: the margin that is enough, towards the one preferred more often; of two as often,
    any up to it is as good, and the first step leads nowhere."""
    return 0.0 if p == 0.5 else math.copysign(1 / beta, p - 0.5)


def exo(p: float, beta: float, e: float) -> float:
    """Ji et al. 2024, equation 16: the reverse KL to (1 - e, e) and to (e, 1 - e), in shares p and 1 - p, is least at
    their geometric mean."""
    return (2 * p - 1) * logit(1 - e) / beta


def nca(p: float, beta: float) -> float:
    """Chen et al. 2024, theorem 3.2: beta times a log-ratio is log of twice the share in which the response won."""
    return logit(p) / beta


def apart_bco(p: float, beta: float) -> float:
    """Jung et al. 2024, theorem 2: each response's reward is the log odds that it is labelled good."""
    return 2 * logit(p) / beta


def sppo(p: float, beta: float) -> float:
    """Wu et al. 2024, equation 4.4: a log-ratio is (win rate - 1/2) / beta."""
    return (2 * p - 1) / beta


def cal(p: float, beta: float) -> float:
    """Xiao et al. 2024, algorithm 1: where d + s(d) = p + (2 p - 1) / beta."""
    wanted = p + (2 * p - 1) / beta
    return root(lambda d: d + 1 / (1 + math.exp(-d)) - wanted)


def discopop(p: float, beta: float, tau: float) -> float:
    """Lu et al. 2024, section 4: the least of the expected loss."""

    def loss(z: Tensor) -> Tensor:
        mix = torch.sigmoid(z / tau)
        return -(1 - mix) * torch.nn.functional.logsigmoid(z) + mix * torch.exp(-z)

    return least(lambda z: p * loss(z) + (1 - p) * loss(-z)) / beta


def simpo(p: float, beta: float, gamma: float) -> float:
    """Meng et al. 2024, equation 6: the least of the expected loss, in the difference of mean log-probabilities."""
    log_s = torch.nn.functional.logsigmoid
    return least(lambda z: -p * log_s(z - gamma) - (1 - p) * log_s(-z - gamma)) / beta


def orpo(p: float, weight: float, lengths: tuple[int, int], mean_length: float) -> float:
    """Hong et al. 2024, equation 6: the share of the first response where the likelihood a token of the chosen and the
    odds ratio are least together, in a policy that says one of the two. ``mean_length``: tokens of a chosen one."""

    def odds(share: Tensor, length: int) -> Tensor:
        mean = share.log() / length
        return mean - torch.log(-torch.expm1(mean))

    def loss(z: Tensor) -> Tensor:
        first, second = torch.sigmoid(z), torch.sigmoid(-z)
        ratio = odds(first, lengths[0]) - odds(second, lengths[1])
        log_s = torch.nn.functional.logsigmoid
        likely = -(p * first.log() + (1 - p) * second.log()) / mean_length
        return likely - weight * (p * log_s(ratio) + (1 - p) * log_s(-ratio))

    return 1 / (1 + math.exp(-least(loss)))


# --- a policy under a reward ---------------------------------------------------------------------------------------


def tilted(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log of pi* ~ reference exp(r / beta), which is the best under the price beta of a nat of KL. [P, N] -> [P, N]"""
    return (reference + rewards / beta).log_softmax(-1)


def objective(policy: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> float:
    """E r - beta KL(policy || reference), mean over prompts, of log-probabilities [P, N]."""
    return float((policy.exp() * (rewards - beta * (policy - reference))).sum(-1).mean())


def best_of(policy: Tensor, rewards: Tensor, number: int) -> Tensor:
    """log-probability that a response is the best of ``number`` drawn, rewards being all different. [P, N] -> [P, N]

    It is when none above it was drawn and not all are below it: F(r)^n - F(r-)^n of the distribution function F.
    """
    order = rewards.argsort(-1)
    until = policy.exp().gather(-1, order).cumsum(-1).clamp(max=1)
    before = torch.cat([torch.zeros_like(until[:, :1]), until[:, :-1]], -1)
    found = torch.empty_like(policy).scatter_(-1, order, until**number - before**number)
    return found.clamp(min=0).log()


# --- distances and searches ----------------------------------------------------------------------------------------


def kl(one: Tensor, other: Tensor) -> float:
    """KL(one || other) of the worst prompt, of log-probabilities [P, N]."""
    terms = torch.where(one.exp() > 0, one.exp() * (one - other), 0.0)
    return float(terms.sum(-1).max())


def root(function: Callable[[float], float], reach: float = 50.0) -> float:
    """Of an increasing function, by bisection."""
    low, high = -reach, reach
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def least(function: Callable[[Tensor], Tensor], reach: float = 20.0, points: int = 40_001) -> float:
    """Where a function of one number is smallest: grids, each around the last one's best."""
    at = 0.0
    for _ in range(3):
        grid = torch.linspace(at - reach, at + reach, points, dtype=torch.float64)
        at, reach = float(grid[function(grid).argmin()]), 4 * reach / points
    return at
