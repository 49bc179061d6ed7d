import math

import pytest
import torch
from torch import Tensor

from fairlead.ops.preference import bradley_terry, dpo_sigmoid


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


def test_bradley_terry_by_hand() -> None:
    loss = bradley_terry(doubles(0.0, 1.0, -2.0), doubles(0.0, 0.0, 1.0))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))])


def test_a_margin_must_be_overcome_before_the_pair_counts_as_won() -> None:
    """Difference 2: margin 2 leaves a coin, margin 0.5 leaves 1.5, margin 0 leaves 2."""
    chosen, rejected, margin = doubles(3.0, 3.0, 3.0), doubles(1.0, 1.0, 1.0), torch.tensor([2.0, 0.5, 0.0]).double()
    loss = bradley_terry(chosen, rejected, margin=margin)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in (0.0, 1.5, 2.0)], rel=1e-14)


def test_far_from_the_border_neither_loss_overflows() -> None:
    big = torch.tensor([1e4, -1e4])
    assert bradley_terry(big, torch.zeros(2)).tolist() == [0.0, 1e4]
    assert dpo_sigmoid(big, torch.zeros(2), beta=1.0, label_smoothing=0.25).tolist() == [2500.0, 7500.0]
