"""What is made of a round: which numbers stand at the tokens of responses of unequal length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fairlead.algorithms import ppo, reinforce, rloo
from fairlead.algorithms.shaping import Shaper
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience

LENGTHS = (3, 1, 2, 5)


def _round(scores: list[float]) -> Experience:
    """Two prompts, each with two responses."""
    trees = [Tree((5,), tuple((7,) * n for n in LENGTHS[:2])), Tree((6,), tuple((7,) * n for n in LENGTHS[2:]))]
    tokens = {
        "behaviour_logprobs": [torch.linspace(-2, -1, n) for n in LENGTHS],
        "reference_logprobs": [torch.full((n,), -1.25) for n in LENGTHS],
        "values": [torch.linspace(-0.5, 0.5, n) for n in LENGTHS],
    }
    return Experience(trees, tokens, torch.tensor(scores), torch.ones(4, dtype=torch.bool))


def _whitened(rows: list[Tensor]) -> Tensor:
    flat = torch.cat(rows)
    return (flat - flat.mean()) / flat.std(correction=0)


def test_ppo_whitens_over_the_tokens_of_responses_and_no_padding() -> None:
    experience, settings = _round([1.0, -2.0, 0.5, 3.0]), ppo.Settings(kl_coef=0.1)
    plain = settings.model_copy(update={"whiten_advantages": False})
    shaped = Shaper(settings)(experience)
    got, raw = (ppo.estimate(experience, shaped, settings=each).tokens["advantages"] for each in (settings, plain))
    torch.testing.assert_close(torch.cat(list(got)), _whitened(list(raw)))


def test_rewards_are_whitened_over_the_tokens_of_responses_and_keep_their_mean() -> None:
    experience = _round([1.0, -2.0, 0.5, 3.0])
    settings = ppo.Settings(kl_coef=0.1, gae_lambda=1.0, whiten_rewards=True)
    shaped = Shaper(settings)(experience)
    spread = float(torch.cat(shaped.ragged(shaped.rewards)).std(correction=0))
    returns = ppo.estimate(experience, shaped, settings=settings).tokens["returns"]
    for row, rewards in zip(returns, shaped.ragged(shaped.rewards), strict=True):
        torch.testing.assert_close(row, (rewards / spread).flip(0).cumsum(0).flip(0))


def test_what_the_values_explain_is_one_less_the_share_of_the_variance_that_is_left() -> None:
    experience, settings = _round([1.0, -2.0, 0.5, 3.0]), ppo.Settings(kl_coef=0.1)
    found = ppo.estimate(experience, Shaper(settings)(experience), settings=settings)
    returns, values = torch.cat(list(found.tokens["returns"])), torch.cat(experience.tokens["values"])
    wanted = 1 - float((returns - values).var() / returns.var())
    assert found.metrics["values/explained_variance"] == pytest.approx(wanted, rel=1e-5)


def test_the_baseline_of_reinforce_is_the_mean_of_the_prompts_responses() -> None:
    experience = _round([1.0, -2.0, 0.5, 3.0])
    settings = reinforce.Settings(num_samples=2, kl_coef=0.0, group_baseline=True)
    found = reinforce.estimate(experience, Shaper(settings)(experience), settings=settings)
    above = [1.5, -1.5, -1.25, 1.25]
    wanted = _whitened([torch.full((n,), score) for n, score in zip(LENGTHS, above, strict=True)])
    torch.testing.assert_close(torch.cat(list(found.tokens["advantages"])), wanted)


@pytest.mark.parametrize(("scores", "wanted"), [([3.0, 1.0], [1.0, -1.0]), ([3.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0, 0])])
def test_rloo_normalizes_over_the_responses_of_the_round(scores: list[float], wanted: list[float]) -> None:
    trees = [Tree((5,), ((7,), (8, 7))) for _ in scores[::2]]
    held = torch.ones(len(scores), dtype=torch.bool)
    experience = Experience(trees, {"behaviour_logprobs": []}, torch.tensor(scores), held)
    settings = rloo.Settings(num_samples=2, kl_coef=0.0, normalize_advantages=True)
    found = rloo.estimate(experience, Shaper(settings)(experience), settings=settings).tokens["advantages"]
    unit = torch.tensor(wanted) / torch.tensor(wanted).std()
    torch.testing.assert_close(torch.stack([row[0] for row in found]), unit)
