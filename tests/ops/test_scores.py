import itertools
import math

import pytest
import torch
from torch import Tensor

from fairlead.ops.scores import bradley_terry, centring, plackett_luce


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_bradley_terry_by_hand() -> None:
    loss = bradley_terry(doubles(0.0, 1.0, -2.0), doubles(0.0, 0.0, 1.0))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))])


def test_a_margin_must_be_overcome_before_the_pair_counts_as_won() -> None:
    """Difference 2: margin 2 leaves a coin, margin 0.5 leaves 1.5, margin 0 leaves 2."""
    chosen, rejected, margin = doubles(3.0, 3.0, 3.0), doubles(1.0, 1.0, 1.0), torch.tensor([2.0, 0.5, 0.0]).double()
    loss = bradley_terry(chosen, rejected, margin=margin)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in (0.0, 1.5, 2.0)], rel=1e-14)


def test_label_smoothing_mixes_the_loss_of_the_swapped_pair() -> None:
    loss = bradley_terry(doubles(1.0), doubles(0.0), label_smoothing=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.1, rel=1e-14)


def test_far_from_the_border_it_does_not_overflow() -> None:
    assert bradley_terry(torch.tensor([1e4, -1e4]), torch.zeros(2)).tolist() == [0.0, 1e4]


def test_centring_is_least_where_the_scores_of_a_pair_are_opposite() -> None:
    assert centring(doubles(2.0, 1.0), doubles(-2.0, 0.5)).tolist() == [0.0, 2.25]


def ranked(scores: Tensor, *levels: int) -> Tensor:
    return plackett_luce(scores, torch.zeros(len(levels), dtype=torch.long), torch.tensor(levels), 1)


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    loss = plackett_luce(doubles(1.0, -0.5, 2.0, 3.0), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 2)
    assert loss.tolist() == pytest.approx(bradley_terry(doubles(1.0, 2.0), doubles(-0.5, 3.0)).tolist(), rel=1e-14)


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    scores = doubles(0.3, -1.0, 2.0, 0.5)
    orders = itertools.permutations(range(4))
    total = sum(math.exp(-ranked(scores[list(order)], 0, 1, 2, 3).item()) for order in orders)
    assert total == pytest.approx(1, rel=1e-13)


def test_the_last_place_adds_nothing_and_ties_are_drawn_among_themselves_and_below() -> None:
    """Scores 1, 0, 0 with levels 0, 1, 1: only the first draw counts: -ln(e / (e + 2))."""
    assert ranked(doubles(1.0, 0.0, 0.0), 0, 1, 1).item() == pytest.approx(math.log(1 + 2 / math.e), rel=1e-14)
    assert ranked(doubles(1.0, 2.0, 0.0), 0, 0, 1).item() == pytest.approx(
        2 * math.log(math.e + math.e**2 + 1) - 3, rel=1e-14
    )


def test_a_ranking_of_one_level_says_nothing() -> None:
    scores = doubles(1.0, 2.0)
    loss = ranked(scores, 0, 0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), scores)[0].tolist() == [0.0, 0.0]
