"""Losses of preference learning from log-ratios of whole responses; one value for each pair.

Everywhere c and r are the log-ratios log(policy / reference) of the chosen and the rejected response, d = c - r their
difference, s the sigmoid. Reference-free losses take log-probabilities in the place of log-ratios. Their name in a
recipe, paper and use stand in the table of ``fairlead.algorithms.dpo``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def dpo_sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(beta d) - e log s(-beta d). [P], [P] -> [P]

    Rafailov et al., "Direct Preference Optimization" (2023), equation 7; e = ``label_smoothing``, the assumed share of
    flipped labels: Mitchell, "A note on DPO with noisy preferences" (2023).
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e): unbiased under flips of probability e. [P], [P] -> [P]

    Ray Chowdhury et al., "Provably Robust DPO" (2024), equation 12.
    """
    logits = beta * (chosen - rejected)
    clean = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return clean / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2. [P], [P] -> [P]

    Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences" (2023), equation 17.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta d). [P], [P] -> [P]

    Zhao et al., "SLiC-HF" (2023), equation 1; with log-ratios: Liu et al., "RSO" (2023), equation 9.
    """
    return (1 - beta * (chosen - rejected)).clamp(min=0)


def exo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(p || q) with p = (s(beta d), s(-beta d)) and q = (1 - e, e). [P], [P] -> [P]

    Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment" (2024), equation 16; e > 0.
    """
    logits = beta * (chosen - rejected)
    won, lost = F.logsigmoid(logits), F.logsigmoid(-logits)
    return won.exp() * (won - math.log1p(-label_smoothing)) + lost.exp() * (lost - math.log(label_smoothing))


def nca(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2. [P], [P] -> [P]

    Chen et al., "Noise Contrastive Alignment" (2024), equation 13 for K = 2.
    """
    won, lost = beta * chosen, beta * rejected
    return -F.logsigmoid(won) - 0.5 * F.logsigmoid(-won) - 0.5 * F.logsigmoid(-lost)


def sppo_hard(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. [P], [P] -> [P]

    Wu et al., "Self-Play Preference Optimization" (2024), equation 4.7, with win rates of 1 and 0.
    """
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def cal_dpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-log s(d) + (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. [P], [P] -> [P]

    Xiao et al., "Cal-DPO: Calibrated Direct Preference Optimization" (2024), algorithm 1.
    """
    return sppo_hard(chosen, rejected, beta=beta) - F.logsigmoid(chosen - rejected)


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta c) + s(beta r): the chosen up, the rejected down. [P], [P] -> [P]

    D'Oosterlinck et al., "Anchored Preference Optimization" (2024), equation 7.
    """
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """s(beta c) + 1 - s(beta d): both down, the rejected further. [P], [P] -> [P]

    D'Oosterlinck et al. (2024), equation 8.
    """
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def discopop(chosen: Tensor, rejected: Tensor, *, beta: float, tau: float) -> Tensor:
    """-(1 - m) log s(beta d) + m exp(-beta d), m = s(beta d / tau). [P], [P] -> [P]

    Lu et al., "Discovering Preference Optimization Algorithms with and for LLMs" (2024), section 4: the log-ratio
    modulated loss.
    """
    logits = beta * (chosen - rejected)
    mix = torch.sigmoid(logits / tau)
    return -(1 - mix) * F.logsigmoid(logits) + mix * torch.exp(-logits)


def bco_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-log s(beta c) - log s(-beta r). [P], [P] -> [P]

    The binary loss of Jung et al., "Binary Classifier Optimization" (2024), without its shift, as in MPO: Wang et al.,
    "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization" (2024).
    """
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def bco(rewards: Tensor, good: Tensor, shift: Tensor) -> Tensor:
    """-log s(reward - shift) for good responses, -log s(shift - reward) for bad ones. [S], [S] bool, [] -> [S]

    Jung et al., "Binary Classifier Optimization" (2024), equation 8; ``shift`` is the mean of the two classes' mean
    rewards, beta log-ratio each.
    """
    margin = rewards - shift
    return -F.logsigmoid(torch.where(good, margin, -margin))


def kto(log_ratios: Tensor, good: Tensor, kl: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta (h - z)) for good responses, 1 - s(beta (z - h)) for bad ones, h their log-ratio and z = ``kl``, of
    which the caller takes no gradient. [S], [S] bool, [] -> [S]

    Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024), equation 8.
    """
    margin = beta * (log_ratios - kl)
    return torch.sigmoid(torch.where(good, -margin, margin))


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, alpha: float = 0.0) -> Tensor:
    """-log s(beta (c - r) - gamma), c and r mean log-probabilities a token, or with alpha (1 - exp(-alpha x)) / alpha
    of them. [P], [P] -> [P]

    Meng et al., "SimPO" (2024), equation 6; alpha: Gupta et al., "AlphaPO" (2025), equation 5.
    """
    if alpha:
        chosen, rejected = (-torch.expm1(-alpha * each) / alpha for each in (chosen, rejected))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log s(log odds(c) - log odds(r)), odds(x) = p / (1 - p), p = exp(x); c and r mean log-probabilities a token.
    [P], [P] -> [P]

    Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model" (2024), equation 7.
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logprobs), logprobs < 0. [...] -> [...]"""
    return logprobs - torch.log(-torch.expm1(logprobs))


def divergence_score(log_ratios: Tensor, divergence: Divergence, *, alpha: float = 1.0) -> Tensor:
    """f'(u) of u = exp(log-ratio), constants left out, in the place of the log-ratio. [...] -> [...]

    Wang et al., "Beyond Reverse KL" (2023), table 1: log u (reverse KL), -1 / u (forward KL), log(u / (1 + u))
    (Jensen-Shannon), -u^-alpha / alpha (alpha).
    """
    if divergence == "forward_kl":
        return -torch.exp(-log_ratios)
    if divergence == "js":
        return F.logsigmoid(log_ratios)
    if divergence == "alpha":
        return -torch.exp(-alpha * log_ratios) / alpha
    return log_ratios
