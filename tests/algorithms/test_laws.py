"""Laws that hold whatever the data: what each algorithm's loss and gradient must be at known points."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from tests.tiny import TREES, base, gradients, models, relative_error, scatter, separate

from fairlead.algorithms import bco, dpo, pretrain, reward, sft
from fairlead.algorithms.reference import measure
from fairlead.algorithms.responses import pair_metrics
from fairlead.algorithms.terms import nll
from fairlead.data.pack import labelled_batch, preference_batch, spread, token_batch
from fairlead.data.render import Tree
from fairlead.ops.returns import gae
from fairlead.rollout.experience import measure_tokens
from fairlead.training.loop import backward, total_counts
from fairlead.types import Mean, Outputs, Pass, Ranks, Term

PAIRS = [
    Tree((5, 6, 7), ((8, 9, 1), (8, 4, 5, 6, 1))),
    Tree(tuple(range(3, 14)), ((20, 21, 22, 1), tuple(range(30, 41)))),
    Tree((9, 9), ((4, 1), (7, 7, 7, 1))),
    Tree((10, 11, 12, 13), ((14, 15, 1), (16, 1))),
]


def _pairs(trees, reference, *, packed: bool):
    return preference_batch(trees, packed=packed, pad_id=0, reference_logprobs=reference)


def _reference(made, trees) -> list[list[torch.Tensor]]:
    return list(measure(made, iter([_pairs(trees, None, packed=True)]), trees))


def test_dpo_starts_at_log_two_with_no_reward() -> None:
    made = models(("policy", "reference"))
    reference = [row for rows in _reference(made, PAIRS) for row in rows]
    metrics = backward(made, dpo.passes(dpo.Settings()), [_pairs(PAIRS, reference, packed=True)])
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_reward_models_loss_is_log_two_when_both_answers_are_alike() -> None:
    made = models(("reward",))
    batch = _pairs([Tree((5, 6), ((7, 1), (7, 1)))], None, packed=True)
    metrics = backward(made, reward.passes(reward.Settings()), [batch])
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_tie_of_scores_counts_as_half_right() -> None:
    made = models(("reward",))
    torch.nn.init.zeros_(made.heads["reward"].get_parameter("linear.weight"))
    metrics = backward(made, reward.passes(reward.Settings()), [_pairs(PAIRS, None, packed=True)])
    assert metrics["rewards/accuracies"] == 0.5


def test_a_tie_of_rewards_counts_as_half_right() -> None:
    batch = _pairs(PAIRS, None, packed=True)
    zeros = Outputs(logprobs=torch.zeros(batch.loss_mask.shape))
    rewards = torch.zeros(8)
    rewards[batch.chosen[0]], rewards[batch.rejected[1]] = 1.0, 1.0  # right, wrong, and two ties
    found = pair_metrics(zeros, batch, rewards)["rewards/accuracies"]
    assert isinstance(found, Mean) and found.value == 0.5
    rewards[batch.rejected[1]] = 0.0
    found = pair_metrics(zeros, batch, rewards)["rewards/accuracies"]
    assert isinstance(found, Mean) and found.value == 0.625


def test_odpo_pushes_a_pair_apart_by_its_margin() -> None:
    """At the reference the loss of a pair is -log sigmoid(-coef * margin), more than log 2 (Amini et al. 2024)."""
    made, margins = models(("policy", "reference")), [0.5, 2.0, 0.0, 1.0]
    reference = [row for rows in _reference(made, PAIRS) for row in rows]
    batch = preference_batch(PAIRS, packed=True, pad_id=0, reference_logprobs=reference, margins=margins)
    metrics = backward(made, dpo.passes(dpo.Settings(margin_coef=0.7)), [batch])
    wanted = sum(math.log1p(math.exp(0.7 * margin)) for margin in margins) / 4
    assert metrics["loss"] == pytest.approx(wanted, abs=1e-5)


def test_rdpo_takes_the_longer_chosen_response_off_by_its_tokens() -> None:
    """At the reference the loss of a pair is -log sigmoid(coef * (tokens of chosen - tokens of rejected)), Park et al.
    2024, equation 9; both sides of equal length are not touched."""
    made, trees = models(("policy", "reference")), PAIRS
    reference = [row for rows in _reference(made, trees) for row in rows]
    metrics = backward(made, dpo.passes(dpo.Settings(length_penalty=0.3)), [_pairs(trees, reference, packed=True)])
    longer = [len(tree.responses[0]) - len(tree.responses[1]) for tree in trees]
    assert metrics["loss"] == pytest.approx(sum(math.log1p(math.exp(-0.3 * n)) for n in longer) / 4, abs=1e-5)


def test_the_rewards_of_a_pair_are_beta_times_its_log_ratios() -> None:
    made = models(("policy", "reference"), dtype=torch.float64)
    fixed = _reference(made, PAIRS)
    scatter(made, 0.3)
    now = measure_tokens(made, PAIRS, temperature=1.0, budget=4096)["behaviour_logprobs"]
    moved = [float(row.sum()) for row in now]
    chosen, rejected = moved[::2], moved[1::2]
    was_chosen, was_rejected = ([float(rows[side].sum()) for rows in fixed] for side in (0, 1))
    batch = _pairs(PAIRS, [row for rows in fixed for row in rows], packed=True)
    metrics = backward(made, dpo.passes(dpo.Settings(beta=0.2)), [batch])
    for name, after, before in (("chosen", chosen, was_chosen), ("rejected", rejected, was_rejected)):
        wanted = sum(0.2 * (a - b) for a, b in zip(after, before, strict=True)) / 4
        assert metrics[f"rewards/{name}"] == pytest.approx(wanted, rel=1e-5)
        assert metrics[f"logps/{name}"] == pytest.approx(sum(after) / 4, rel=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


def test_bcos_point_is_the_mean_of_the_two_classes_means() -> None:
    """Of three good responses and a bad one the mean of all would lie nearer to the good ones (Jung et al. 2024)."""
    trees = [Tree(tree.prompt, tree.responses[:1]) for tree in PAIRS]
    labels, given = [True, True, True, False], [3.0, 1.0, 2.0, -2.0]
    reference = [torch.zeros(len(tree.responses[0])) for tree in trees]
    batch = labelled_batch(trees, labels, packed=True, pad_id=0, reference_logprobs=reference)

    def call(batch: Any, _: frozenset[str]) -> Any:
        rows = [torch.full((len(row),), value / len(row)) for row, value in zip(reference, given, strict=True)]
        return Outputs(logprobs=spread(rows, batch.loss_mask))

    settings = bco.Settings(beta=1.0)
    asked: Any = call
    (found,) = bco.prepare(asked, [batch], Ranks(), settings=settings)
    assert float(found.statistics["shift"]) == pytest.approx((2.0 + -2.0) / 2)


def test_where_all_tokens_weigh_alike_their_logits_are_computed_once() -> None:
    assert [each.uniform for each in pretrain.passes(pretrain.Settings())] == [True]
    assert [each.uniform for each in sft.passes(sft.Settings())] == [True]
    assert [each.uniform for each in sft.passes(sft.Settings(loss="dft"))] == [False]


def test_perplexity_is_e_to_the_loss_and_never_too_large_for_a_float() -> None:
    assert pretrain.with_perplexity({"eval/loss": 2.0}) == {"eval/loss": 2.0, "eval/perplexity": math.exp(2.0)}
    assert math.isfinite(pretrain.with_perplexity({"eval/loss": 1e4})["eval/perplexity"])


def test_the_sft_loss_is_that_of_transformers_on_the_same_rows() -> None:
    made = models(("policy",))
    batch = token_batch(separate(TREES), packed=True, pad_id=0)
    got = backward(made, sft.passes(sft.Settings()), [batch])["loss"]
    plain, total, count = base().model, 0.0, 0
    plain.set_attn_implementation("eager")
    for tree in separate(TREES):
        ids = torch.tensor([[*tree.prompt, *tree.responses[0]]])
        labels = ids.clone()
        labels[0, : len(tree.prompt)] = -100
        counted = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            total += float(plain(ids, labels=labels).loss) * counted
        count += counted
    assert got == pytest.approx(total / count, abs=1e-5)


def test_kl_to_a_reference_that_is_the_policy_is_zero() -> None:
    made = models(("policy", "reference", "value"))
    tokens = measure_tokens(made, separate(TREES), temperature=0.7, budget=64)
    for policy, reference in zip(tokens["behaviour_logprobs"], tokens["reference_logprobs"], strict=True):
        torch.testing.assert_close(policy, reference, atol=1e-6, rtol=0)


def test_gae_with_lambda_one_is_returns_minus_values() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([6, 1, 4])
    inside = torch.arange(6)[None] < lengths[:, None]
    advantages, _ = gae(rewards, values, lengths, gamma=0.9, gae_lambda=1.0)
    for s, length in enumerate(lengths.tolist()):
        for t in range(length):
            discounted = sum(0.9 ** (k - t) * float(rewards[s, k]) for k in range(t, length))
            assert float(advantages[s, t]) == pytest.approx(discounted - float(values[s, t]), abs=1e-12)
    assert float(advantages[~inside].abs().sum()) == 0


def _split(items, parts: int):
    return [items[i::parts] for i in range(parts)]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_a_mix_of_units_has_the_same_gradient_however_it_is_split(parts: int, packed: bool) -> None:
    def run(groups, packed: bool):
        made = models(("policy", "reference"), dtype=torch.float64, architecture="opt")
        reference = _reference(made, PAIRS)
        scatter(made, 0.05)
        batches = [
            _pairs([PAIRS[i] for i in g], [row for i in g for row in reference[i]], packed=packed) for g in groups
        ]
        metrics = backward(made, dpo.passes(dpo.Settings(loss={"sigmoid": 1, "sft": 0.7})), batches)
        return gradients(made), metrics

    wanted, whole = run([[0, 1, 2, 3]], True)
    got, split = run(_split([0, 1, 2, 3], parts), packed)
    assert relative_error(got, wanted) < 1e-12
    assert split == pytest.approx(whole, abs=1e-12)


def test_each_term_is_divided_by_the_global_count_of_its_own_unit() -> None:
    made = models(("policy",))
    batches = [_pairs(PAIRS[:1], None, packed=True), _pairs(PAIRS[1:], None, packed=True)]
    assert total_counts(batches) == {"token": 34.0, "sequence": 8.0, "pair": 4.0, "chosen_token": 12.0}
    terms = (Term("a", "token", nll), Term("b", "sequence", partial(nll), 2.0))
    metrics = backward(made, (Pass("policy", terms, frozenset({"logprobs"})),), batches)
    total = metrics["loss/a"] * 34
    assert metrics["loss"] == pytest.approx(total / 34 + 2 * total / 8, rel=1e-6)


def test_the_binary_reward_loss_is_the_logistic_loss_of_the_labels() -> None:
    """Against torch's own, from the scores of the same responses."""
    made = models(("reward",))
    trees = [Tree(pair.prompt, pair.responses[:1]) for pair in PAIRS]
    labels = [True, False, False, True]
    batch = labelled_batch(trees, labels, packed=True, pad_id=0)
    with made.use("reward"), torch.no_grad():
        scores = made(batch, frozenset({"scores"})).scores
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor(labels).float())
    metrics = backward(made, reward.passes(reward.Settings(loss="binary")), [batch])
    assert metrics["loss"] == pytest.approx(float(wanted), abs=1e-6)
    assert metrics["rewards/accuracies"] == float(((scores > 0) == torch.tensor(labels)).float().mean())
    assert metrics["rewards/rejected"] == pytest.approx(float(scores[[1, 2]].mean()), abs=1e-6)


@pytest.mark.parametrize(
    "other", [{"rankings": True}, {"members": 2}, {"margin_coef": 1.0}, {"centring_coef": 0.1}, {"attributes": ("a",)}]
)
def test_the_binary_loss_refuses_what_it_has_no_use_for(other: dict) -> None:
    with pytest.raises(ValueError, match=r"binary|labels"):
        reward.Settings(loss="binary", **other)
