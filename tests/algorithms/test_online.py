"""Laws of the algorithms that learn from sampled responses: gradients at known points, estimates, one gradient
however a step is split."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import gradients, models, relative_error, scatter

from fairlead.algorithms import grpo, ppo, reinforce, rloo
from fairlead.algorithms.mixed import MixedSettings
from fairlead.algorithms.shaping import Shaper
from fairlead.data.pack import by_response, rollout_batch, token_batch, token_fields
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience, measure_tokens
from fairlead.training.loop import backward
from fairlead.types import MixedBatch

TREES = [
    Tree((5, 6, 7), ((8, 9, 1), (8, 4, 5, 6, 1))),
    Tree(tuple(range(3, 14)), ((20, 21, 22, 1), tuple(range(30, 41)))),
    Tree((9, 9), ((4, 1), (7, 7, 7, 1))),
    Tree((10, 11, 12, 13), ((14, 15, 1), (16, 1))),
]
SINGLE = [Tree(tree.prompt, tree.responses[:1]) for tree in TREES]
SCORES = [0.3, -1.0, 2.0, 0.5, 0.1, 0.1, -0.7, 0.9]
ROLES = ("policy", "reference", "value")


def _experience(made: Any, trees: list[Tree], **changes: Any) -> Experience:
    tokens = measure_tokens(made, trees, temperature=1.0, budget=4096, entropy=True)
    tokens["sampled_logprobs"] = tokens["behaviour_logprobs"]
    number = sum(len(tree.responses) for tree in trees)
    made_of = Experience(list(trees), tokens, torch.tensor(SCORES[:number]), torch.ones(number, dtype=torch.bool))
    return replace(made_of, **changes)


def _estimate(module: Any, experience: Experience, settings: Any) -> Any:
    return module.estimate(experience, Shaper(settings)(experience), settings=settings)


def _batch(trees: list[Tree], tokens: Any, *, packed: bool = True, responses: list[int] | None = None) -> Any:
    rows = tokens if responses is None else {name: [each[i] for i in responses] for name, each in tokens.items()}
    return rollout_batch(trees, rows, packed=packed, pad_id=0)


def _without_heads(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: gradient for name, gradient in found.items() if "heads" not in name}


def _plain_gradient(made: Any, trees: list[Tree], weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of -sum over tokens of weight x log-probability."""
    batch = token_batch(trees, packed=True, pad_id=0)
    with made.use("policy"):
        rows = by_response(made(batch, frozenset({"logprobs"})).logprobs, batch)
    (-torch.stack([(weight * row).sum() for weight, row in zip(weights, rows, strict=True)]).sum()).backward()
    return gradients(made)


def test_ppo_at_ratio_one_has_the_gradient_of_the_policy_gradient() -> None:
    settings = ppo.Settings(value_coef=0.0)
    made = models(ROLES)
    tokens = _estimate(ppo, _experience(made, SINGLE), settings).tokens
    metrics = backward(made, ppo.passes(settings), [_batch(SINGLE, tokens)])
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/clip_fraction"] == 0
    count = sum(len(row) for row in tokens["advantages"])
    wanted = _plain_gradient(models(ROLES), SINGLE, [row / count for row in tokens["advantages"]])
    assert relative_error(_without_heads(gradients(made)), _without_heads(wanted)) < 1e-5


def test_ppo_with_nothing_clipped_is_advantage_actor_critic() -> None:
    """-mean A log p + value_coef * mean (V - R)^2 / 2, by hand."""
    settings = ppo.Settings(
        clip_range=None, value_clip_range=None, epochs=1, value_coef=0.5, whiten_advantages=False, ratio_guard=None
    )
    made, plain = models(ROLES, dtype=torch.float64), models(ROLES, dtype=torch.float64)
    tokens = _estimate(ppo, _experience(made, SINGLE), settings).tokens
    backward(made, ppo.passes(settings), [_batch(SINGLE, tokens)])
    batch = token_batch(SINGLE, packed=True, pad_id=0)
    with plain.use("policy"):
        outputs = plain(batch, frozenset({"logprobs", "values"}))
    logprobs, values = (torch.cat(by_response(each, batch)) for each in (outputs.logprobs, outputs.values))
    advantages, returns = torch.cat(tokens["advantages"]), torch.cat(tokens["returns"])
    (-(advantages * logprobs).mean() + 0.5 * 0.5 * ((values - returns) ** 2).mean()).backward()
    assert relative_error(gradients(made), gradients(plain)) < 1e-6


def test_a_step_of_value_warm_up_moves_the_policy_through_the_value_alone() -> None:
    settings = ppo.Settings(value=ppo.ValueSettings(trunk_gradient=False))
    made = models(ROLES, value_trunk="detached")
    tokens = dict(_estimate(ppo, _experience(made, SINGLE), settings).tokens)
    tokens["advantages"] = [torch.zeros_like(row) for row in tokens["advantages"]]
    backward(made, ppo.passes(settings), [_batch(SINGLE, tokens)])
    found = gradients(made)
    assert all(float(gradient.abs().max()) == 0 for gradient in _without_heads(found).values())
    assert float(found["heads.value.linear.weight"].abs().max()) > 0


def test_rloo_weighs_a_response_by_its_score_above_the_others() -> None:
    settings = rloo.Settings(num_samples=2, kl_coef=0.0, loss_over="sequence")
    made = models(("policy",))
    tokens = _estimate(rloo, _experience(made, TREES), settings).tokens
    backward(made, rloo.ALGORITHM.passes(settings), [_batch(TREES, tokens)])
    advantages = [SCORES[i] - SCORES[i ^ 1] for i in range(8)]
    lengths = [len(response) for tree in TREES for response in tree.responses]
    weights = [torch.full((n,), a / n / 8) for a, n in zip(advantages, lengths, strict=True)]
    assert relative_error(gradients(made), _plain_gradient(models(("policy",)), TREES, weights)) < 1e-5


def test_rloo_charges_the_kl_of_the_whole_response() -> None:
    settings = rloo.Settings(num_samples=2, kl_coef=0.5)
    made = models(("policy", "reference"), lora=True)
    experience = _experience(made, TREES[:1])
    kl = [
        float((a - b).sum())
        for a, b in zip(experience.tokens["behaviour_logprobs"], experience.tokens["reference_logprobs"], strict=True)
    ]
    rewards = [score - 0.5 * k for score, k in zip(SCORES[:2], kl, strict=True)]
    advantages = _estimate(rloo, experience, settings).tokens["advantages"]
    assert abs(kl[0] - kl[1]) > 1e-3
    assert float(advantages[0][0]) == pytest.approx(rewards[0] - rewards[1], abs=1e-5)
    assert float(advantages[1][-1]) == pytest.approx(rewards[1] - rewards[0], abs=1e-5)


@pytest.mark.parametrize(
    ("scale", "wanted"),
    [
        ("group", [2**-0.5, -(2**-0.5), 2**-0.5, -(2**-0.5), 0.0, 0.0]),
        ("none", [0.65, -0.65, 0.75, -0.75, 0.0, 0.0]),
    ],
)
def test_grpo_centres_a_group_and_divides_by_its_spread(scale: Any, wanted: list[float]) -> None:
    settings = grpo.Settings(num_samples=2, scale=scale)
    advantages = _estimate(grpo, _experience(models(("policy",)), TREES[:3]), settings).tokens["advantages"]
    assert [float(row[0]) for row in advantages] == pytest.approx(wanted, abs=1e-5)
    assert all(float(row.amax() - row.amin()) == 0 for row in advantages)


@pytest.mark.parametrize(("over", "constant"), [("token", None), ("sequence", None), ("constant", 20)])
def test_grpos_loss_is_the_mean_that_was_asked_for(over: Any, constant: int | None) -> None:
    settings = grpo.Settings(num_samples=2, loss_over=over, max_new_tokens=20)
    made = models(("policy",))
    tokens = _estimate(grpo, _experience(made, TREES), settings).tokens
    backward(made, grpo.ALGORITHM.passes(settings), [_batch(TREES, tokens)])
    lengths = [len(row) for row in tokens["advantages"]]
    share = {"token": [1 / sum(lengths)] * 8, "sequence": [1 / n / 8 for n in lengths], "constant": [1 / 160] * 8}
    weights = [row * share[over][i] for i, row in enumerate(tokens["advantages"])]
    assert relative_error(gradients(made), _plain_gradient(models(("policy",)), TREES, weights)) < 1e-5


def test_responses_that_teach_nothing_are_dropped_where_asked() -> None:
    settings = grpo.Settings(num_samples=2, drop=("alike", "unfinished"))
    finished = torch.tensor([True, False, True, True, True, True, False, False])
    found = _estimate(grpo, _experience(models(("policy",)), TREES, finished=finished), settings)
    assert found.keep.tolist() == [True, False, True, True, False, False, False, False]
    assert found.metrics == {"rollout/alike": 0.25, "rollout/dropped": 0.625}


def test_reinforce_whitens_what_is_rewarded_from_a_token_on() -> None:
    settings = reinforce.Settings(kl_coef=0.1, gamma=0.5)
    experience = _experience(models(("policy", "reference"), lora=True), SINGLE[:2])
    policy, reference = (experience.tokens[f"{name}_logprobs"] for name in ("behaviour", "reference"))
    wanted: list[float] = []
    for score, ours, theirs in zip(SCORES, policy, reference, strict=False):
        rewards = [-0.1 * float(a - b) for a, b in zip(ours, theirs, strict=True)]
        rewards[-1] += score
        wanted += [sum(0.5 ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
    flat = torch.tensor(wanted)
    flat = (flat - flat.mean()) / flat.std(correction=0)
    got = torch.cat(list(_estimate(reinforce, experience, settings).tokens["advantages"]))
    torch.testing.assert_close(got, flat, atol=1e-5, rtol=1e-5)


def test_the_group_baseline_of_reinforce_takes_the_prompts_mean_off() -> None:
    settings = reinforce.Settings(num_samples=2, kl_coef=0.0, group_baseline=True)
    experience = _experience(models(("policy",)), TREES[:2])
    advantages = _estimate(reinforce, experience, settings).tokens["advantages"]
    firsts = [float(row[0]) for row in advantages]
    assert firsts[0] > 0 > firsts[1] and firsts[2] > 0 > firsts[3]
    assert float(torch.cat(list(advantages)).mean()) == pytest.approx(0, abs=1e-6)


# --- the KL as a loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "moved"), [("k2", 0.0), ("k3", 0.0), ("k3", 0.3)])
def test_the_kl_as_a_loss_has_the_gradient_of_the_kl(estimator: Any, moved: float) -> None:
    """Enumerated over one token: E_behaviour of the loss's gradient against d KL(policy || reference) / d logits.
    ``moved`` is how far the policy has gone from the one that sampled; k2 is exact where it has not."""
    from fairlead.algorithms.policy import kl_term
    from fairlead.types import Outputs

    generator = torch.Generator().manual_seed(0)
    logits, old, reference = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    behaviour = (logits + moved * old).log_softmax(0)
    logits.requires_grad_(True)
    settings = grpo.Settings(kl_in="loss", kl_estimator=estimator, kl_coef=1.0)
    total = torch.zeros(())
    for token in range(6):
        spot = lambda values, at=token: values[at][None, None]  # noqa: E731
        batch: Any = type("Batch", (), {})()
        batch.behaviour_logprobs, batch.reference_logprobs = spot(behaviour), spot(reference.log_softmax(0))
        loss, _ = kl_term(
            Outputs(logprobs=spot(logits.log_softmax(0))), batch, settings=settings, reduce=lambda v, _: v.sum()
        )
        total = total + behaviour[token].exp() * loss
    got = torch.autograd.grad(total, logits)[0]
    kl = (logits.softmax(0) * (logits.log_softmax(0) - reference.log_softmax(0))).sum()
    torch.testing.assert_close(got, torch.autograd.grad(kl, logits)[0])


def test_an_estimator_that_does_not_go_with_its_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_estimator=k3 does not go into the reward; that takes k1, abs, k2, full"):
        ppo.Settings(kl_estimator="k3")
    with pytest.raises(ValueError, match=r"kl_estimator=k1 does not go into the loss; that takes k2, k3"):
        grpo.Settings(kl_estimator="k1", kl_coef=0.1)


# --- one gradient however it is split ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (ppo, ppo.Settings(value_coef=0.5, entropy_coef=0.1)),
        (grpo, grpo.Settings(num_samples=2, kl_coef=0.2)),
        (grpo, grpo.Settings(num_samples=2, importance="sequence", loss_over="token")),
        (rloo, rloo.Settings(num_samples=2, loss_over="constant")),
    ],
)
def test_the_gradient_is_the_same_however_the_minibatch_is_split(
    module: Any, settings: Any, parts: int, packed: bool
) -> None:
    def run(groups: list[list[int]], packed: bool) -> dict[str, torch.Tensor]:
        made = models(ROLES, dtype=torch.float64, architecture="opt")
        tokens = _estimate(module, _experience(made, TREES), settings).tokens
        scatter(made, 0.05)
        batches = [
            _batch([TREES[i] for i in g], tokens, packed=packed, responses=[2 * i + j for i in g for j in (0, 1)])
            for g in groups
        ]
        backward(made, module.ALGORITHM.passes(settings), batches)
        return gradients(made)

    split = [list(range(4))[i::parts] for i in range(parts)]
    assert relative_error(run(split, packed), run([[0, 1, 2, 3]], True)) < 1e-12


@pytest.mark.parametrize("own_adapter", [False, True])
def test_one_trunk_means_one_forward_an_update(own_adapter: bool) -> None:
    settings = ppo.Settings(value=ppo.ValueSettings(trunk="adapter" if own_adapter else "policy"))
    made = models(ROLES, lora=True, value_trunk="adapter" if own_adapter else "shared")
    batch = _batch(SINGLE, _estimate(ppo, _experience(made, SINGLE), settings).tokens)
    forwards: list[int] = []
    hook = made.causal.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    backward(made, ppo.passes(settings), [batch])
    hook.remove()
    assert len(forwards) == (2 if own_adapter else 1)


def test_mixed_text_adds_its_own_mean_gradient() -> None:
    """PPO-ptx: the gradient of the minibatch plus coef times that of the text's mean loss a token."""
    settings = ppo.Settings(mixed=MixedSettings(path="unread", coef=0.7))
    made = models(ROLES)
    tokens = _estimate(ppo, _experience(made, SINGLE), settings).tokens
    fields = token_fields(TREES[:2], packed=True, pad_id=0)
    count = fields["counts"]["token"]
    fields["counts"] = {"mixed_token": count}
    text = MixedBatch(**fields)
    backward(made, ppo.passes(settings), [_batch(SINGLE, tokens), text])
    alone = models(ROLES)
    backward(alone, ppo.passes(ppo.Settings()), [_batch(SINGLE, tokens)])
    weights = [torch.full((len(response),), 0.7 / count) for tree in TREES[:2] for response in tree.responses]
    plain = _plain_gradient(models(ROLES), TREES[:2], weights)
    wanted = {name: gradient + plain.get(name, 0.0) for name, gradient in gradients(alone).items()}
    assert relative_error(gradients(made), wanted) < 1e-5


def test_a_token_whose_ratio_explodes_is_left_out_and_counted() -> None:
    settings = ppo.Settings(ratio_guard=5.0, value_coef=0.0, clip_range=None)
    made = models(ROLES)
    tokens = dict(_estimate(ppo, _experience(made, SINGLE), settings).tokens)
    old = [row.clone() for row in tokens["behaviour_logprobs"]]
    old[0][1] -= 4.0  # exp(4) = 55 times as likely as when it was sampled
    tokens["behaviour_logprobs"] = old
    metrics = backward(made, ppo.passes(settings), [_batch(SINGLE, tokens)])
    count = sum(len(row) for row in old)
    assert metrics["policy/guarded"] == pytest.approx(1 / count)
    assert metrics["policy/ratio"] == pytest.approx((count - 1 + math.exp(4)) / count, rel=1e-4)
    weights = [row / count for row in tokens["advantages"]]
    weights[0] = weights[0].clone()
    weights[0][1] = 0.0
    wanted = _plain_gradient(models(ROLES), SINGLE, weights)
    assert relative_error(_without_heads(gradients(made)), _without_heads(wanted)) < 1e-5
