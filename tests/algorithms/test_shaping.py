"""From the scores of a round to a reward a token: penalties, scaling, clipping, the KL, and what moves once a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fairlead.algorithms import grpo, ppo
from fairlead.algorithms.shaping import Moments, Shaper
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience


def _made_up(**changes: Any) -> Experience:
    tokens = {
        "behaviour_logprobs": [torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0])],
        "reference_logprobs": [torch.tensor([-1.5, -1.0, -0.5]), torch.tensor([-3.0, -1.0])],
        "values": [torch.zeros(3), torch.zeros(2)],
        "entropy": [torch.ones(3), torch.ones(2)],
        "sampled_logprobs": [torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.25])],
    }
    trees = [Tree((5,), ((6, 7, 1),)), Tree((5,), ((8, 9),))]
    made = Experience(trees, tokens, torch.tensor([2.0, 1.0]), torch.tensor([True, False]))
    return replace(made, **changes)


def test_shaped_rewards_of_a_round_hold_the_kl_and_the_score_at_the_last_token() -> None:
    settings = ppo.Settings(kl_coef=0.1, gae_lambda=1.0, whiten_advantages=False, missing_eos_penalty=0.5)
    shaped = Shaper(settings)(_made_up())
    # rewards: [-0.05, +0.10, 2.0] and [-0.2, 0.5]; with zero values the advantage is the sum of what follows
    tokens = ppo.estimate(_made_up(), shaped, settings=settings).tokens
    torch.testing.assert_close(tokens["advantages"][0], torch.tensor([2.05, 2.10, 2.00]))
    torch.testing.assert_close(tokens["advantages"][1], torch.tensor([0.30, 0.50]))
    assert shaped.metrics["objective/kl"] == pytest.approx((-0.5 + 2.0) / 2)
    assert shaped.metrics["objective/scores"] == 1.5


@pytest.mark.parametrize(
    ("estimator", "rewards"),
    [("abs", [[-0.05, -0.10, 2.0], [-0.2, 1.0]]), ("k2", [[-0.0125, -0.05, 2.0], [-0.2, 1.0]])],
)
def test_the_kl_is_charged_by_the_estimator_asked_for(estimator: Any, rewards: list[list[float]]) -> None:
    shaped = Shaper(ppo.Settings(kl_coef=0.1, kl_estimator=estimator))(_made_up())
    for row, wanted in zip(shaped.ragged(shaped.rewards), rewards, strict=True):
        assert row.tolist() == pytest.approx(wanted)
    assert shaped.metrics["objective/kl"] == pytest.approx(0.75)  # what a person reads stays k1


def test_a_dense_reward_stands_at_its_tokens() -> None:
    dense = [torch.tensor([0.5, 0.5, 1.0]), torch.tensor([1.0, 0.0])]
    experience = _made_up()
    experience.tokens["dense"] = dense
    shaped = Shaper(ppo.Settings(kl_coef=0.0, missing_eos_penalty=0.25))(experience)
    assert shaped.ragged(shaped.rewards)[0].tolist() == [0.5, 0.5, 1.0]
    assert shaped.ragged(shaped.rewards)[1].tolist() == [1.0, -0.25]


def test_moments_of_groups_are_those_of_all_numbers_together() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    found = Moments() | values[:3] | values[3:40] | values[40:]
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-10)
    assert found.deviation == pytest.approx(float(values.std()), abs=1e-10)


def test_scores_are_scaled_by_the_rounds_so_far_and_then_clipped() -> None:
    shaper = Shaper(ppo.Settings(kl_coef=0.0, reward_scaling="running", reward_clip=2.0))
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([11.0, 5.0])
    torch.testing.assert_close(shaper(_made_up(scores=first)).scores, (first / first.std()).clamp(-2, 2))
    shaper.finish_round()
    wanted = (second / torch.cat([first, second]).std()).clamp(-2, 2)
    torch.testing.assert_close(shaper(_made_up(scores=second)).scores, wanted)


def test_a_baseline_is_taken_off_the_score_after_it_was_clipped_and_a_person_reads_the_score_itself() -> None:
    settings = ppo.Settings(kl_coef=0.0, reward_clip=1.5, reward_baseline=0.5, missing_eos_penalty=0.25)
    shaped = Shaper(settings)(_made_up())
    assert shaped.rewards.sum(1).tolist() == [1.0, 0.25]  # scores 2 and 1, the second cut off
    assert shaped.metrics["objective/scores"] == 1.5


def test_scores_scaled_by_the_first_round_stay_in_its_unit() -> None:
    shaper = Shaper(ppo.Settings(kl_coef=0.0, reward_scaling="first", reward_center=True))
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([11.0, 5.0])
    shaper(_made_up(scores=first))
    shaper.finish_round()
    for _ in range(2):
        torch.testing.assert_close(shaper(_made_up(scores=second)).scores, (second - 2) / first.std())
        shaper.finish_round()


def test_the_kl_coefficient_moves_once_a_round_by_zieglers_rule() -> None:
    """target 0.5, KL 0.75 of 2 responses: the error is cut to 0.2, so the factor is 1 + 0.2 * 2 / 10."""
    shaper = Shaper(ppo.Settings(kl_coef=0.1, adaptive_kl={"target": 0.5, "horizon": 10}))  # pyright: ignore
    for wanted in (0.1, 0.104, 0.10816):
        for _ in range(3):  # a round that is read again is not counted again
            assert shaper(_made_up()).metrics["objective/kl_coef"] == pytest.approx(wanted)
        shaper.finish_round()
    again = Shaper(ppo.Settings(kl_coef=0.1, adaptive_kl={"target": 0.5, "horizon": 10}))  # pyright: ignore
    again.load_state_dict(shaper.state_dict())
    assert again(_made_up()).metrics == shaper(_made_up()).metrics


def test_a_below_target_kl_makes_the_kl_cheaper() -> None:
    shaper = Shaper(ppo.Settings(kl_coef=0.1, adaptive_kl={"target": 0.8, "horizon": 10}))  # pyright: ignore
    shaper(_made_up())
    shaper.finish_round()
    assert shaper(_made_up()).metrics["objective/kl_coef"] == pytest.approx(0.1 * (1 + (0.75 / 0.8 - 1) * 2 / 10))


def test_a_kl_that_is_a_loss_is_not_charged_in_the_reward_as_well() -> None:
    shaped = Shaper(grpo.Settings(num_samples=2, kl_in="loss", kl_estimator="k3", kl_coef=0.5))(_made_up())
    assert shaped.rewards.sum(1).tolist() == [2.0, 1.0]
    assert shaped.metrics["objective/kl"] == pytest.approx(0.75)


def test_the_spread_of_the_rounds_so_far_survives_a_stop() -> None:
    settings = ppo.Settings(kl_coef=0.0, reward_scaling="running")
    after = _made_up(scores=torch.tensor([9.0, 4.0]))
    shaper, resumed = Shaper(settings), Shaper(settings)
    shaper(_made_up())
    shaper.finish_round()
    resumed.load_state_dict(shaper.state_dict())
    assert torch.equal(resumed(after).scores, shaper(after).scores)
    assert not torch.equal(Shaper(settings)(after).scores, shaper(after).scores)
