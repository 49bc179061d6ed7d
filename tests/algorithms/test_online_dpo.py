"""Online DPO: which two responses are a pair, and that it is learned as DPO learns pairs."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import base, gradients, models, relative_error, tokenizer

import fairlead
from fairlead.algorithms import dpo, online_dpo
from fairlead.algorithms.shaping import Shaper, Unshaped
from fairlead.data.pack import by_response, preference_batch, token_batch
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience, measure_tokens
from fairlead.training.loop import backward

NAN = float("nan")
KEYS = torch.tensor([0.2, 0.9, -1.0, 0.5])
TREES = [
    Tree((5, 6, 7), ((8, 9, 1), (8, 4, 5, 6, 1), (4, 1))),
    Tree(tuple(range(3, 14)), ((20, 21, 22, 1), tuple(range(30, 41)), (9, 8, 1))),
]
SCORES = [0.3, -1.0, 2.0, 0.5, 0.1, NAN]
"""The pairs of best and worst: responses 2 and 1, 3 and 4."""


def test_each_way_to_make_a_pair() -> None:
    assert online_dpo.pair(KEYS, "max_min", 0) == (1, 2)
    assert online_dpo.pair(KEYS, "max_max", 0) == (1, 3)
    drawn = Counter(online_dpo.pair(KEYS, "max_random", key) for key in range(3000))
    assert {pair[0] for pair in drawn if pair} == {1}
    assert {pair[1]: round(number / 1000, 1) for pair, number in drawn.items() if pair} == {0: 1.0, 2: 1.0, 3: 1.0}
    drawn = Counter(online_dpo.pair(KEYS, "random", key) for key in range(6000))
    better = {(1, 0), (1, 2), (1, 3), (0, 2), (3, 0), (3, 2)}
    assert drawn.keys() == better
    assert all(abs(number - 1000) < 120 for number in drawn.values())  # four standard deviations of a sixth of 6000


@pytest.mark.parametrize("way", ["max_min", "max_max", "max_random", "random"])
def test_a_tie_or_fewer_than_two_responses_make_no_pair(way: Any) -> None:
    assert online_dpo.pair(torch.tensor([1.0, 1.0]), way, 0) is None
    assert online_dpo.pair(torch.tensor([NAN, 1.0, NAN]), way, 0) is None
    assert online_dpo.pair(torch.tensor([NAN, NAN]), way, 0) is None
    assert online_dpo.pair(torch.tensor([NAN, 1.0, 3.0]), way, 0) == (2, 1)


def _round(made: Any, **settings: Any) -> tuple[Any, Any, Experience]:
    tokens = measure_tokens(made, TREES, temperature=1.0, budget=4096, entropy=True)
    tokens["sampled_logprobs"] = tokens["behaviour_logprobs"]
    experience = Experience(TREES, tokens, torch.tensor(SCORES), torch.ones(6, dtype=torch.bool))
    chosen = online_dpo.Settings(num_samples=3, **settings)
    found = online_dpo.estimate(experience, Shaper(Unshaped())(experience), settings=chosen, seed=0)
    return chosen, found, experience


def _batch(found: Any, packed: bool) -> Any:
    assert found.keep.tolist() == [False, True, True, True, True, False]
    trees = [Tree(TREES[0].prompt, TREES[0].responses[1:]), Tree(TREES[1].prompt, TREES[1].responses[:2])]
    tokens = {name: [rows[i] for i in (1, 2, 3, 4)] for name, rows in found.tokens.items()}
    return online_dpo.collate(trees, tokens, packed=packed, pad_id=0)


@pytest.mark.parametrize("packed", [True, False])
def test_the_pair_is_learned_as_dpo_learns_a_pair(packed: bool) -> None:
    """The chosen one first, as a data set has it, and a reference that is another model."""
    made = models(("policy", "reference"), lora=True)
    settings, found, experience = _round(made, loss={"sigmoid": 1.0, "sft": 0.5}, margin_coef=0.1, beta=0.3)
    metrics = backward(made, online_dpo.passes(settings), [_batch(found, packed)])
    ours = gradients(made)
    pairs = [(TREES[0], 2, 1), (TREES[1], 0, 1)]
    reference = experience.tokens["reference_logprobs"]
    plain = models(("policy", "reference"), lora=True)
    batch = preference_batch(
        [Tree(tree.prompt, (tree.responses[good], tree.responses[bad])) for tree, good, bad in pairs],
        packed=packed,
        pad_id=0,
        margins=[3.0, 0.4],
        reference_logprobs=[reference[i] for i in (2, 1, 3, 4)],
    )
    of_pairs = dpo.Settings(loss={"sigmoid": 1.0, "sft": 0.5}, margin_coef=0.1, beta=0.3)
    expected = backward(plain, dpo.passes(of_pairs), [batch])
    assert relative_error(ours, gradients(plain)) < 1e-5
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(expected["rewards/margins"], rel=1e-4)


def test_with_the_rounds_start_as_reference_the_first_step_raises_the_chosen_and_lowers_the_rejected() -> None:
    """The loss is log 2, its gradient -beta/2 of log p(chosen) - log p(rejected), and no second model is kept."""
    settings = online_dpo.Settings(reference="round")
    assert online_dpo.roles(settings) == ("policy",)
    made = models(("policy",))
    settings, found, _ = _round(made, reference="round", beta=0.4)
    metrics = backward(made, online_dpo.passes(settings), [_batch(found, True)])
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    plain = models(("policy",))
    batch = token_batch(TREES, packed=True, pad_id=0)
    with plain.use("policy"):
        rows = by_response(plain(batch, frozenset({"logprobs"})).logprobs, batch)
    difference = torch.stack([rows[good].sum() - rows[bad].sum() for good, bad in ((2, 1), (3, 4))]).sum()
    (-0.4 / 2 * difference / 2).backward()  # two pairs
    assert relative_error(gradients(made), gradients(plain)) < 1e-4


@pytest.mark.parametrize(("reference", "fresh"), [("round", {0: 1.0, 4: 1.0}), ("start", {})])
def test_a_round_says_when_its_reference_is_the_policy_itself(reference: str, fresh: Any, tmp_path: Path) -> None:
    """Two rounds of four steps: the rewards are zero at the first of a round, and nobody is alarmed."""
    settings = {
        "run.directory": str(tmp_path),
        "data.template": "plain",
        "data.max_length": 32,
        "train.batch_size": 1,
        "train.steps": 8,
    }
    settings |= {"online_dpo.reference": reference, "online_dpo.rollout_size": 2, "online_dpo.epochs": 2}
    settings |= {"online_dpo.max_new_tokens": 4, "online_dpo.pairs": "random", "train.log_every": 1, "threads": 1}
    settings |= {"optim.learning_rate": 1e-2, "train.num_samples": 0, "tracking.console": False}
    model = base("llama", hidden_size=16, num_layers=1, num_heads=2, context_length=64).model
    rows = [{"prompt": "one two"}, {"prompt": "three four"}]
    result = fairlead.train(
        {"algorithm": "online_dpo"},
        settings,
        model=model,
        tokenizer=tokenizer(),
        data=rows,
        reward=lambda samples, **_: [float(len(each)) + i / 10 for i, each in enumerate(samples)],
    )
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    print([(line["step"], line["rewards/chosen"], line.get("rewards/fresh_reference")) for line in lines])
    assert {
        line["step"] - 1: line["rewards/fresh_reference"] for line in lines if "rewards/fresh_reference" in line
    } == fresh
    for line in lines:
        assert (abs(line["rewards/chosen"]) < 1e-6) == (line["step"] - 1 in (fresh or {0})), line
    alarms = result.path / "alarms.jsonl"
    assert not alarms.exists() or "rewards_stuck" not in alarms.read_text("utf-8")


def test_responses_that_were_cut_score_less() -> None:
    made = models(("policy",))
    tokens = measure_tokens(made, TREES, temperature=1.0, budget=4096, entropy=True)
    finished = torch.tensor([True, True, False, True, True, True])
    experience = Experience(TREES, tokens, torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1, 0.2]), finished)
    settings = online_dpo.Settings(num_samples=3, reference="round", missing_eos_penalty=5.0)
    shaped = Shaper(Unshaped(missing_eos_penalty=5.0))(experience)
    keep = online_dpo.estimate(experience, shaped, settings=settings, seed=0).keep
    assert keep is not None and keep.tolist() == [True, False, True, True, True, False]


def test_random_pairs_are_drawn_anew_each_round_and_alike_when_it_is_read_again() -> None:
    made = models(("policy",))
    _, _, experience = _round(made, reference="round")
    experience = replace(experience, scores=torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1, 0.2]))
    settings = online_dpo.Settings(num_samples=3, reference="round", pairs="random")

    def kept(number: int) -> Any:
        of_round = replace(experience, number=number)
        found = online_dpo.estimate(of_round, Shaper(Unshaped())(of_round), settings=settings, seed=0)
        assert found.keep is not None
        return tuple(found.keep.tolist())

    assert [kept(number) for number in range(8)] == [kept(number) for number in range(8)]
    assert len({kept(number) for number in range(8)}) > 2
