"""Losses of reward models, from scores; what several heads agree on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) log s(d) - e log s(-d), d = r_chosen - r_rejected - margin. [P], [P] -> [P]

    Ouyang et al., "Training language models to follow instructions" (2022), equation 1; the margin is that of
    Touvron et al., "Llama 2" (2023), equation 2; e = ``label_smoothing`` that of Wang et al., "Secrets of RLHF in Large
    Language Models, Part II" (2024).
    """
    difference = chosen_scores - rejected_scores
    difference = difference if margin is None else difference - margin
    return -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)


def centring(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """(r_chosen + r_rejected)^2, which draws the scores of a pair towards a sum of zero. [P], [P] -> [P]

    Eisenstein et al., "Helping or Herding?" (2023), section 2.
    """
    return (chosen_scores + rejected_scores).square()


def plackett_luce(scores: Tensor, group: Tensor, level: Tensor, num_groups: int) -> Tensor:
    """-log of the probability of each ranking: at every place the best of those left is drawn with softmax(score).
    scores [S], group [S], level [S] -> [G]

    Plackett (1975), Luce (1959); for reward models: Zhu et al., "Principled RLHF from Pairwise or K-wise Comparisons"
    (2023), equation 5. Of tied places every response is drawn among all of that place and below (Breslow 1974).
    """
    left = (group[:, None] == group[None]) & (level[None] >= level[:, None])
    among = torch.where(left, scores[None], -torch.inf).logsumexp(1)
    last = torch.zeros_like(level).scatter_reduce(0, group, level, "amax", include_self=True)[group]
    losses = torch.where(level < last, among - scores, 0.0)
    return scores.new_zeros(num_groups).index_add(0, group, losses)


def attribute_pairs(ratings: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each attribute every two responses of a group whose ratings are known and differ. ratings [S, A], nan where
    not known, group [S] -> (the better one [P], the worse one [P], attribute [P])"""
    together = (group[:, None] == group[None])[..., None]
    better, worse, attribute = (together & (ratings[:, None] > ratings[None])).nonzero(as_tuple=True)
    return better, worse, attribute


def disagreement(scores: Tensor) -> Tensor:
    """Standard deviation over the members of an ensemble, all that it has, so divided by K. [..., K] -> [...]

    Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization" (2023), take its square.
    """
    return scores.std(-1, correction=0)
