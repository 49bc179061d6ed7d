"""The table of the DPO family: each loss of a pair by its name in a recipe. docs/reference/preference-losses.md is made
from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairlead.ops import preference as ops

Prepared = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class PairLoss:
    """``function(chosen, rejected, **settings, **statistics)`` -> [P], of log-ratios [P]."""

    function: Callable[..., Tensor]
    formula: str
    paper: str
    use: str
    takes_difference: bool = True
    """It is a function of chosen - rejected, to which an offset may be added."""
    prepare: Prepared | None = None
    """For a loss that couples the pairs of a step: from the log-ratios of all pairs without gradient, and the
    reference's log-probabilities, (chosen, rejected, reference_chosen, reference_rejected) -> statistics [P]."""
    statistics: tuple[str, ...] = ()
    """The names of those statistics, which are arguments of ``function``."""


def settings_of(loss: PairLoss) -> tuple[str, ...]:
    """The settings a loss reads: its arguments that are no statistics."""
    names = inspect.signature(loss.function).parameters
    return tuple(name for name in names if name not in ("chosen", "rejected", *loss.statistics))


# --- losses that couple the pairs of a step ------------------------------------------------------------------------


def _aot(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float, shift: Tensor) -> Tensor:
    return ops.dpo_sigmoid(chosen + shift, rejected, beta=beta, label_smoothing=label_smoothing)


def _aot_shift(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> dict[str, Tensor]:
    """The policy's margin of rank k is compared with the reference's margin of rank k, not with that of its own pair:
    what the difference of the log-ratios must be shifted by."""
    own = reference_chosen - reference_rejected
    partner = torch.empty_like(own)
    partner[(chosen - rejected + own).argsort()] = own.sort().values
    return {"shift": own - partner}


def _aot_unpaired(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    opposite_rejected: Tensor,
    opposite_chosen: Tensor,
) -> Tensor:
    """The value is that of the sorted chosen against the sorted rejected; the gradient reaches both sides."""
    first = ops.dpo_sigmoid(chosen, opposite_rejected, beta=beta, label_smoothing=label_smoothing)
    second = ops.dpo_sigmoid(opposite_chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    return first + second - second.detach()


def _aot_opposites(chosen: Tensor, rejected: Tensor, _: Tensor, __: Tensor) -> dict[str, Tensor]:
    (best, of_chosen), (worst, of_rejected) = chosen.sort(), rejected.sort()
    opposite_rejected, opposite_chosen = torch.empty_like(chosen), torch.empty_like(chosen)
    opposite_rejected[of_chosen], opposite_chosen[of_rejected] = worst, best
    return {"opposite_rejected": opposite_rejected, "opposite_chosen": opposite_chosen}


def _discopop(chosen: Tensor, rejected: Tensor, *, beta: float, discopop_tau: float) -> Tensor:
    return ops.discopop(chosen, rejected, beta=beta, tau=discopop_tau)


LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(
        ops.dpo_sigmoid,
        "-(1-e) log s(b d) - e log s(-b d)",
        "Rafailov et al. 2023, eq. 7; e > 0: Mitchell 2023",
        "the default; label_smoothing for noisy labels",
    ),
    "robust": PairLoss(
        ops.robust,
        "(-(1-e) log s(b d) + e log s(-b d)) / (1-2e)",
        "Ray Chowdhury et al. 2024, eq. 12",
        "labels flipped at a known rate",
    ),
    "ipo": PairLoss(
        ops.ipo,
        "(d - 1/(2b))^2",
        "Azar et al. 2023, eq. 17",
        "preferences that are (nearly) deterministic; does not push margins without end",
    ),
    "hinge": PairLoss(
        ops.hinge, "max(0, 1 - b d)", "SLiC: Zhao et al. 2023, eq. 1; Liu et al. 2023, eq. 9", "a margin that is enough"
    ),
    "exo": PairLoss(
        ops.exo,
        "KL((s(b d), s(-b d)) || (1-e, e))",
        "Ji et al. 2024, eq. 16",
        "mode seeking; needs label_smoothing",
    ),
    "nca": PairLoss(
        ops.nca,
        "-log s(b c) - (log s(-b c) + log s(-b r)) / 2",
        "Chen et al. 2024, eq. 13",
        "keeps the chosen response's likelihood from falling",
        takes_difference=False,
    ),
    "bco": PairLoss(
        ops.bco_pair,
        "-log s(b c) - log s(-b r)",
        "Jung et al. 2024, eq. 8 without its shift",
        "with sigmoid and sft in MPO (Wang et al. 2024); the algorithm bco has the shift",
        takes_difference=False,
    ),
    "sppo": PairLoss(
        ops.sppo_hard,
        "(c - 1/(2b))^2 + (r + 1/(2b))^2",
        "Wu et al. 2024, eq. 4.7",
        "rounds of self-play",
        takes_difference=False,
    ),
    "cal": PairLoss(
        ops.cal_dpo,
        "-log s(d) + (c - 1/(2b))^2 + (r + 1/(2b))^2",
        "Xiao et al. 2024, algorithm 1",
        "rewards on the scale of the true ones",
        takes_difference=False,
    ),
    "apo_zero": PairLoss(
        ops.apo_zero,
        "1 - s(b c) + s(b r)",
        "D'Oosterlinck et al. 2024, eq. 7",
        "chosen answers better than the model's own",
        takes_difference=False,
    ),
    "apo_down": PairLoss(
        ops.apo_down,
        "s(b c) + 1 - s(b d)",
        "D'Oosterlinck et al. 2024, eq. 8",
        "chosen answers worse than the model's own",
        takes_difference=False,
    ),
    "discopop": PairLoss(
        _discopop,
        "-(1-m) log s(b d) + m exp(-b d), m = s(b d / tau)",
        "Lu et al. 2024, section 4",
        "found by search; discopop_tau",
    ),
    "aot": PairLoss(
        _aot,
        "sigmoid of the sorted margins of policy and reference",
        "Melnyk et al. 2024, eq. 7",
        "preference as a whole: first-order dominance of margins",
        prepare=_aot_shift,
        statistics=("shift",),
    ),
    "aot_unpaired": PairLoss(
        _aot_unpaired,
        "sigmoid of sorted chosen against sorted rejected log-ratios",
        "Melnyk et al. 2024, eq. 8",
        "the same, for pairs that belong together only loosely",
        takes_difference=False,
        prepare=_aot_opposites,
        statistics=("opposite_rejected", "opposite_chosen"),
    ),
}
MIXED = ("sft",)
"""What a mix may hold besides: the chosen responses' mean NLL a token (RPO, Pang et al. 2024)."""
