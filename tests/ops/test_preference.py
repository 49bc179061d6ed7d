import math

import pytest
import torch
from torch import Tensor

from fairlead.ops.preference import bco, cal_dpo, dpo_sigmoid, hinge, kto, log_odds, robust


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_a_policy_equal_to_its_reference_has_the_loss_of_a_coin(beta: float, label_smoothing: float) -> None:
    zeros = doubles(0.0, 0.0)
    loss = dpo_sigmoid(zeros, zeros, beta=beta, label_smoothing=label_smoothing)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_gradient_of_dpo_is_that_of_the_paper(beta: float) -> None:
    """Rafailov et al. 2023, section 4: -beta * sigmoid(r_rejected - r_chosen) on the chosen log-probability, the
    opposite on the rejected one, where r = beta * log-ratio."""
    chosen, rejected = doubles(0.7, -1.5, 3.0), doubles(0.2, 2.5, -40.0)
    gradients = torch.autograd.grad(
        dpo_sigmoid(chosen, rejected, beta=beta, label_smoothing=0.0).sum(), (chosen, rejected)
    )
    wanted = [-beta * logistic(beta * (b - a)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert gradients[0].tolist() == pytest.approx(wanted, rel=1e-12)
    assert gradients[1].tolist() == pytest.approx([-w for w in wanted], rel=1e-12)


def test_label_smoothing_mixes_the_loss_of_the_swapped_pair() -> None:
    """beta * (1 - (-1)) = 1: 0.9 * -ln sigmoid(1) + 0.1 * -ln sigmoid(-1) = 0.313262 + 0.1 * 1."""
    loss = dpo_sigmoid(doubles(1.0), doubles(-1.0), beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.1, rel=1e-14)
    assert math.log(1 + math.exp(-1)) == pytest.approx(0.313262, abs=1e-6)


def test_the_smoothed_loss_is_least_where_the_model_doubts_as_much_as_the_labels() -> None:
    """sigmoid(beta * h) = 1 - label_smoothing: h = ln(9) / beta for 0.1."""
    best = doubles(math.log(9) / 0.5)
    gradient = torch.autograd.grad(dpo_sigmoid(best, doubles(0.0), beta=0.5, label_smoothing=0.1).sum(), best)[0]
    assert gradient.item() == pytest.approx(0.0, abs=1e-15)


def test_robust_dpo_is_unbiased_under_flips() -> None:
    """The mean over the flip of its own loss is the loss of the clean label (Ray Chowdhury et al. 2024, lemma 3.1)."""
    chosen, rejected, flips = doubles(0.7, -1.5), doubles(0.2, 2.5), 0.2
    kept = robust(chosen, rejected, beta=0.5, label_smoothing=flips)
    flipped = robust(rejected, chosen, beta=0.5, label_smoothing=flips)
    clean = dpo_sigmoid(chosen, rejected, beta=0.5)
    assert ((1 - flips) * kept + flips * flipped).tolist() == pytest.approx(clean.tolist(), rel=1e-14)


def test_cal_dpo_by_hand() -> None:
    """beta = 0.5, so 1 / (2 beta) = 1: c = 3, r = 1 gives (3 - 1)^2 + (1 + 1)^2 + ln(1 + e^-2)."""
    loss = cal_dpo(doubles(3.0), doubles(1.0), beta=0.5)
    assert loss.item() == pytest.approx(8 + math.log(1 + math.exp(-2)), rel=1e-14)


def test_bco_shifts_both_classes_by_the_same_amount() -> None:
    """Good: -ln s(2 - 0.5); bad: -ln s(0.5 + 1)."""
    loss = bco(doubles(2.0, -1.0), torch.tensor([True, False]), torch.tensor(0.5))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1.5))] * 2, rel=1e-14)


def test_kto_values_a_response_against_its_reference_point() -> None:
    """beta (h - z) = 0.5 (3 - 1) = 1: good 1 - s(1), bad 1 - s(-1)."""
    loss = kto(doubles(3.0, 3.0), torch.tensor([True, False]), torch.tensor(1.0), beta=0.5)
    assert loss.tolist() == pytest.approx([1 - logistic(1), 1 - logistic(-1)], rel=1e-14)


def test_a_probability_of_a_half_has_even_odds() -> None:
    assert log_odds(torch.tensor([0.5, 0.75]).double().log()).tolist() == pytest.approx([0.0, math.log(3)], abs=1e-15)


def test_far_from_the_border_nothing_overflows() -> None:
    big = torch.tensor([1e4, -1e4])
    assert dpo_sigmoid(big, torch.zeros(2), beta=1.0, label_smoothing=0.25).tolist() == [2500.0, 7500.0]
    assert hinge(big, torch.zeros(2), beta=1.0).tolist() == [0.0, 10001.0]
