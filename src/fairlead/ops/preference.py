"""Losses of preference learning, from scores or log-probabilities; one value for each pair."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin). [P], [P] -> [P]

    Ouyang et al., "Training language models to follow instructions" (2022), equation 1; the margin is that of
    Touvron et al., "Llama 2" (2023), equation 2.
    """
    difference = chosen_scores - rejected_scores
    return -F.logsigmoid(difference if margin is None else difference - margin)


def dpo_sigmoid(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """-log sigmoid(beta * (log-ratio_chosen - log-ratio_rejected)), where log-ratio = log policy - log reference of
    the whole response. [P], [P] -> [P]

    Rafailov et al., "Direct Preference Optimization" (2023), equation 7. ``label_smoothing`` is the assumed share of
    flipped labels: the conservative loss of Mitchell, "A note on DPO with noisy preferences" (2023).
    """
    logits = beta * (chosen_log_ratios - rejected_log_ratios)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
