"""The rule that ends a run whose scores have ceased to rise."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fairlead.algorithms.plateau import Plateau, level


def _ended(means: list[float], rounds: int | None = 3, margin: float = 0.1) -> list[bool]:
    plateau = Plateau(rounds)
    return [bool(plateau.after_round(mean, margin)) for mean in means]


def test_it_ends_when_three_rounds_stay_within_the_interval_and_the_newest_is_not_the_highest() -> None:
    assert _ended([0.0, 0.5, 1.0, 1.05, 0.95, 1.02]) == [False] * 5 + [True]


def test_it_goes_on_while_the_mean_rises_however_slowly() -> None:
    assert not any(_ended([1.0, 1.01, 1.02, 1.03, 1.04, 1.05]))


def test_it_goes_on_while_a_round_lies_outside() -> None:
    assert not any(_ended([1.0, 1.2, 0.95, 1.02]))
    assert not any(_ended([1.0, 0.95, 0.8, 0.95]))


def test_it_needs_as_many_rounds_as_asked_for_and_none_end_it_without() -> None:
    assert _ended([1.0, 0.95], rounds=1) == [False, True]
    assert _ended([1.0, 0.95, 0.97, 0.96]) == [False, False, False, True]
    assert not any(_ended([1.0] * 9, rounds=None))


def test_it_says_why() -> None:
    plateau = Plateau(2)
    said = [plateau.after_round(mean, 0.25) for mean in (1.0, 1.1, 0.9)][-1]
    assert said == "the mean score has not left 1 +- 0.25 for 2 rounds (1.1, 0.9), and falls again"


def test_a_continued_run_ends_where_an_uninterrupted_one_would() -> None:
    means = [0.0, 0.5, 1.0, 1.05, 0.95, 1.02]
    for cut in range(len(means)):
        before, after = Plateau(3), Plateau(3)
        for mean in means[:cut]:
            before.after_round(mean, 0.1)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert [bool(after.after_round(mean, 0.1)) for mean in means[cut:]] == _ended(means)[cut:]


def test_the_level_of_a_round_is_the_mean_over_prompts_with_the_interval_of_their_spread() -> None:
    """Prompts of means 1, 3 and 5: their mean 3, deviation 2, and half an interval of 1.96 x 2 / sqrt(3)."""
    nan = float("nan")
    scores = torch.tensor([0.0, 2.0, 3.0, nan, 4.0, 6.0, nan, nan])
    mean, margin = level(scores.split(2))
    assert mean == pytest.approx(3.0) and margin == pytest.approx(1.96 * 2 / math.sqrt(3))
