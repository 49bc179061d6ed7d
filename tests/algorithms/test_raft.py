"""RAFT: which responses are kept, and that they are learned as demonstrations are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import gradients, models, relative_error

from fairlead.algorithms import raft, sft
from fairlead.algorithms.shaping import AdaptiveKL, Shaper
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.errors import TrainingError
from fairlead.rollout.experience import Experience
from fairlead.training.loop import backward

NAN = float("nan")


def _experience(scores: list[list[float]], **changes: Any) -> Experience:
    """Prompts with as many responses as they have scores, of two tokens each."""
    flat = torch.tensor([score for row in scores for score in row])
    trees = [Tree((5, 6), tuple((7 + k, 1) for k in range(len(row)))) for row in scores]
    return replace(Experience(trees, {}, flat, torch.ones(len(flat), dtype=torch.bool)), **changes)


def _kept(experience: Experience, **settings: Any) -> list[bool]:
    made = raft.Settings(num_samples=experience.num_samples, **settings)
    keep = raft.estimate(experience, Shaper(made)(experience), settings=made).keep
    assert keep is not None
    return keep.tolist()


def test_local_keeps_the_best_of_each_prompt_the_first_of_equals() -> None:
    experience = _experience([[0.1, 0.9, 0.3], [2.0, 2.0, -1.0]])
    assert _kept(experience) == [False, True, False, True, False, False]
    assert _kept(experience, keep=2) == [False, True, True, True, True, False]


def test_top_keeps_a_share_of_the_round() -> None:
    experience = _experience([[0.1, 0.9, 0.3], [2.0, 1.5, -1.0]])
    assert _kept(experience, collect="top") == [False, False, False, True, True, False]
    assert _kept(experience, collect="top", share=0.5) == [False, True, False, True, True, False]


def test_a_constant_added_to_the_reward_changes_nothing() -> None:
    scores = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).tolist()
    moved = [[score - 14.4 for score in row] for row in scores]
    for settings in ({}, {"collect": "top"}, {"keep": 3}):
        assert _kept(_experience(scores), **settings) == _kept(_experience(moved), **settings)


def test_responses_are_ranked_by_the_score_less_the_price_of_the_kl() -> None:
    policy = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0])]
    tokens = {
        "behaviour_logprobs": policy,
        "sampled_logprobs": policy,
        "reference_logprobs": [torch.tensor([-4.0, -2.0]), torch.tensor([-1.0, -1.5])],
        "entropy": policy,
    }
    experience = _experience([[1.0, 0.7]], tokens=tokens)  # KL 4 and 0.5
    assert _kept(experience, kl_coef=0.05) == [True, False]  # 0.8 against 0.675
    assert _kept(experience, kl_coef=0.1) == [False, True]  # 0.6 against 0.65


def test_what_was_discarded_is_never_kept_and_a_prompt_without_any_left_is_counted() -> None:
    experience = _experience([[NAN, 0.2, 0.1], [NAN, NAN, NAN], [0.4, NAN, 0.5]])
    assert _kept(experience, max_empty=0.4) == [False, True, False, False, False, False, False, False, True]
    made = raft.Settings(num_samples=3)
    metrics = raft.estimate(experience, Shaper(made)(experience), settings=made).metrics
    assert metrics["raft/prompts_without"] == pytest.approx(1 / 3)
    assert metrics["raft/selected_scores"] == pytest.approx(0.35)
    assert metrics["raft/first_scores"] == pytest.approx(0.4)


def test_a_round_in_which_too_many_prompts_are_left_without_stops_with_the_reasons() -> None:
    experience = _experience([[NAN, NAN], [NAN, NAN], [0.4, NAN]], measured={"discarded/empty": 0.5})
    with pytest.raises(TrainingError, match=r"to 67% of the round's prompts were discarded: .*empty.*50%"):
        _kept(experience)


def test_the_kept_follow_the_distribution_of_the_best_of_k() -> None:
    """Over five outcomes drawn with p, the best of K is outcome i with F(i)^K - F(i - 1)^K, F summed by rank."""
    probs, number, prompts = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64), 4, 6000
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.9, 1.1], dtype=torch.float64)
    drawn = torch.multinomial(
        probs.expand(prompts, 5), number, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    keep = torch.tensor(_kept(_experience(rewards[drawn].tolist()))).view(prompts, number)
    found = torch.bincount(drawn[keep], minlength=5).double()
    order = rewards.argsort()
    below = probs[order].cumsum(0) ** number
    wanted = torch.empty(5, dtype=torch.float64)
    wanted[order] = torch.diff(below, prepend=torch.zeros(1, dtype=torch.float64)) * prompts
    assert float(found.sum()) == prompts
    assert float(((found - wanted) ** 2 / wanted).sum()) < 18.5  # 0.1 % of chi-square with four degrees of freedom


def test_the_best_of_k_gains_no_more_than_the_bound() -> None:
    """E max_K r <= E r + sqrt(B^2 / 2 log K) for rewards within B (the paper, section 3)."""
    scores = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0)) ** 3
    for number in (2, 4, 16):
        part = scores[:, :number]
        keep = torch.tensor(_kept(_experience(part.tolist()))).view(part.shape)
        gain = float(part[keep].mean() - part.mean())
        assert 0.1 < gain <= (0.5 * torch.tensor(float(number)).log()).sqrt()


def test_one_sample_a_prompt_is_sft_on_samples() -> None:
    experience = _experience([[0.1], [0.9], [-3.0]])
    trees = [Tree(tree.prompt, (tree.responses[0] + (9, 8),)) for tree in experience.trees]
    assert _kept(experience) == [True, True, True]
    made, plain = models(("policy",)), models(("policy",))
    batch = raft.collate(trees, {}, packed=True, pad_id=0)
    backward(made, raft.passes(raft.Settings()), [batch])
    backward(plain, sft.passes(sft.Settings()), [token_batch(trees, packed=True, pad_id=0)])
    assert relative_error(gradients(made), gradients(plain)) < 1e-6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"collect": "top", "keep": 2}, "keep"),
        ({"share": 0.5}, "share"),
        ({"keep": 9}, "keep=9 of num_samples=8"),
        ({"num_samples": 0}, "num_samples"),
        ({"discard": ["emptyy"]}, "emptyy"),
        ({"adaptive_kl": {}}, "kl_coef above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        raft.Settings(**wrong)
    assert raft.Settings(adaptive_kl=AdaptiveKL(), kl_coef=0.1).adaptive_kl is not None
