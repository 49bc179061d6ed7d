"""The terms of the policy's loss and of the value's, and what they measure, by hand at single tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fairlead.algorithms import grpo, ppo
from fairlead.algorithms.online import learned_from
from fairlead.algorithms.policy import PolicySettings, policy_terms
from fairlead.data.pack import rollout_batch
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience
from fairlead.types import Mean, Metrics, Outputs, RolloutBatch

TREES = [Tree((5, 6), ((7, 8, 1),)), Tree((5,), ((9, 1),))]
ROWS = {
    "behaviour_logprobs": [[-1.0, -2.0, -0.5], [-1.0, -1.0]],
    "advantages": [[1.0, -2.0, 0.5], [-1.0, 3.0]],
    "weights": [[1.0, 0.5, 2.0], [0.25, 1.0]],
    "values": [[0.5, 1.0, 0.0], [0.0, 2.0]],
    "returns": [[1.0, 1.0, 2.0], [1.0, 0.0]],
}
NEW = torch.tensor([-1.0, -1.8, -0.6, -1.1, -0.7])
OLD = torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.0])


def batch_of(*names: str) -> RolloutBatch:
    """Padded, so that prompts and padding stand between the responses."""
    tokens = {name: [torch.tensor(row) for row in ROWS[name]] for name in names}
    made: Any = rollout_batch(TREES, tokens, packed=False, pad_id=0)
    return made


def spread(values: Tensor, batch: RolloutBatch, elsewhere: float = 7.0) -> Tensor:
    """One number a response token, and something else at the prompts and the padding. -> [B, T]"""
    out = torch.full(batch.loss_mask.shape, elsewhere)
    out[batch.loss_mask] = values
    return out


def term(name: str, batch: RolloutBatch, settings: PolicySettings, **outputs: Tensor) -> tuple[Tensor, Metrics]:
    """Its sum over tokens, and what it measured."""
    (found,) = (each for each in policy_terms(settings, 8)[0] if each.name == name)
    return found.fn(Outputs(**outputs), batch)


def test_tokens_of_another_engine_weigh_as_their_importance_says() -> None:
    batch = batch_of("behaviour_logprobs", "advantages", "weights")
    loss, _ = term("policy", batch, PolicySettings(clip_range=None), logprobs=spread(NEW, batch))
    advantages, weights = (torch.cat([torch.tensor(row) for row in ROWS[name]]) for name in ("advantages", "weights"))
    assert float(loss) == pytest.approx(-float((weights * (NEW - OLD).exp() * advantages).sum()), rel=1e-6)


def test_an_importance_weight_is_the_trainers_probability_over_the_samplers_and_capped() -> None:
    tokens = {
        "behaviour_logprobs": [torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0])],
        "sampled_logprobs": [torch.tensor([-1.5, -1.0, -0.5]), torch.tensor([-3.0, -1.25])],
    }
    experience = Experience(TREES, tokens, torch.zeros(2), torch.ones(2, dtype=torch.bool))
    first, second = learned_from(experience, ppo.Settings(engine="vllm", importance_cap=2.0))["weights"]
    torch.testing.assert_close(first, torch.tensor([0.5, -1.0, 0.0]).exp())
    torch.testing.assert_close(second, torch.tensor([2.0, math.exp(0.25)]))
    assert "weights" not in learned_from(experience, ppo.Settings())


def test_the_distance_to_the_rounds_start_is_that_of_its_own_samples() -> None:
    """k3 of the policy that sampled against the policy now: r - 1 - log r, with r = now / then."""
    batch = batch_of("behaviour_logprobs", "advantages")
    _, metrics = term("policy", batch, PolicySettings(), logprobs=spread(NEW, batch))
    log_ratio = NEW - OLD
    found = metrics["policy/approx_kl"]
    assert isinstance(found, Mean) and float(found.count) == 5
    assert float(found.sum) == pytest.approx(float((log_ratio.exp() - 1 - log_ratio).sum()), rel=1e-5)


def test_entropy_is_a_bonus() -> None:
    batch, entropy = batch_of("behaviour_logprobs", "advantages"), torch.tensor([1.0, 2.0, 0.5, 0.25, 3.0])
    loss, _ = term("entropy", batch, PolicySettings(entropy_coef=0.1), entropy=spread(entropy, batch))
    assert float(loss) == pytest.approx(-6.75)
    (weight,) = (each.weight for each in policy_terms(PolicySettings(entropy_coef=0.1), 8)[0] if each.name == "entropy")
    assert weight == 0.1


@pytest.mark.parametrize("over", ["token", "sequence", "constant"])
def test_a_sum_is_over_responses_alone(over: Any) -> None:
    batch = batch_of("behaviour_logprobs", "advantages")
    settings = grpo.Settings(num_samples=2, loss_over=over, entropy_coef=1.0)
    near, far = (
        term("entropy", batch, settings, entropy=spread(torch.ones(5), batch, elsewhere))[0] for elsewhere in (0.0, 9.0)
    )
    assert float(near) == float(far) == pytest.approx({"token": -5.0, "sequence": -2.0, "constant": -5 / 8}[over])


def test_the_values_loss_is_over_responses_alone() -> None:
    """Half the larger of two squared errors, of the value and of the value kept within 0.2 of the one before."""
    batch = batch_of("behaviour_logprobs", "advantages", "values", "returns")
    values = torch.tensor([0.6, 2.0, 0.1, 1.0, 1.5])
    loss, metrics = ppo.value_term(Outputs(values=spread(values, batch)), batch, settings=ppo.Settings())
    plain = [0.4**2, 1.0**2, 1.9**2, 0.0, 1.5**2]
    near = [0.4**2, 0.2**2, 1.9**2, 0.8**2, 1.8**2]
    assert float(loss) == pytest.approx(0.5 * sum(map(max, plain, near)), rel=1e-6)
    error = metrics["values/error"]
    assert isinstance(error, Mean) and float(error.sum) == pytest.approx(sum(plain), rel=1e-6)
