"""What the sampler says of its draws, and what the trainer measures of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.algorithms.rounds import measured
from fairlead.conformance.case import prompts
from fairlead.conformance.staged import staged
from fairlead.conformance.tasks import Task
from fairlead.data.render import Tree
from fairlead.rollout.experience import CHECKED, Collector, Experience, trees_of
from fairlead.types import Prompt, Rollout, Support

TASK = Task("abc", 2, ("a b", "b c", "c a", "a a"), seed=5)
COPIES, SAMPLES, TEMPERATURE = 5, 3, 0.6


def collector(folder: Path, dtype: torch.dtype = torch.float64, **more: Any) -> Collector:
    """Of a run moved away from where it began, with a reference."""
    own = {
        "num_samples": SAMPLES,
        "temperature": TEMPERATURE,
        "rollout_size": "all",
        "rollout_rows": 64,
        "kl_coef": 0.1,
    }
    settings = {f"rloo.{name}": value for name, value in ({**own, "max_new_tokens": 2} | more).items()}
    run = staged(TASK, "rloo", settings, prompts(TASK, COPIES), folder, dtype=dtype, reward=TASK.reward)
    run.move()
    return run.source._collector


def collect(made: Collector) -> Experience:
    return made.collect(0, [Prompt(row["prompt"]) for row in prompts(TASK, COPIES)])[0]


def exact(made: Collector, found: Experience) -> list[torch.Tensor]:
    """At the temperature, token by token, by the plain model."""
    model, rows = made.models.causal, list[torch.Tensor]()
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    for tree in found.trees:
        for response in tree.responses:
            logits = model(input_ids=torch.tensor([[*tree.prompt, *response]])).logits[0, len(tree.prompt) - 1 : -1]
            logprobs = (logits.detach() / TEMPERATURE).log_softmax(-1)
            rows.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0].float())
    model.set_attn_implementation(own)
    return rows


def test_the_samplers_word_is_the_plain_models_and_one_prompt_in_eight_is_measured_twice(tmp_path: Path) -> None:
    made = collector(tmp_path)
    found = collect(made)
    wanted = exact(made, found)
    for at, (row, trainers, right) in enumerate(
        zip(found.tokens["behaviour_logprobs"], found.tokens["trainer_logprobs"], wanted, strict=True)
    ):
        torch.testing.assert_close(row, right, atol=1e-6, rtol=0)
        if at // SAMPLES % CHECKED == 0:
            torch.testing.assert_close(trainers, right, atol=1e-6, rtol=0)
        else:
            assert bool(trainers.isnan().all())
    told = measured(found)
    assert 0 <= told["rollout/sampler_difference"] < 1e-5
    assert 0 < told["policy/entropy"] < torch.tensor(4.0).log()


def test_a_sampler_that_says_what_is_not_so_is_found_out(tmp_path: Path) -> None:
    made = collector(tmp_path)
    honest = made.sampler.generate

    def lies(*given: Any, **named: Any) -> Any:
        return [
            replace(each, behaviour_logprobs=tuple(value - 0.25 for value in each.behaviour_logprobs))
            for each in honest(*given, **named)
        ]

    object.__setattr__(made, "sampler", type("Liar", (), {"generate": staticmethod(lies)})())
    assert measured(collect(made))["rollout/sampler_difference_mean"] == pytest.approx(0.25, abs=1e-5)


def test_where_rounding_is_coarse_the_trainer_measures_all(tmp_path: Path) -> None:
    assert collector(tmp_path / "fp64").own_sampler and collector(tmp_path / "fp32", torch.float32).own_sampler
    assert not collector(tmp_path / "bf16", torch.bfloat16).own_sampler
    assert not collector(tmp_path / "generate", engine="generate").own_sampler
    made = replace(collector(tmp_path / "other"), own_sampler=False)
    found = collect(made)
    assert "trainer_logprobs" not in found.tokens
    for row, right in zip(found.tokens["behaviour_logprobs"], exact(made, found), strict=True):
        torch.testing.assert_close(row, right, atol=1e-6, rtol=0)


def test_what_was_drawn_of_the_likeliest_tokens_is_measured_among_these(tmp_path: Path) -> None:
    made = replace(collector(tmp_path, top_k=2), own_sampler=False)
    found = collect(made)
    rows = zip(found.tokens["behaviour_logprobs"], found.tokens["sampled_logprobs"], exact(made, found), strict=True)
    for trainers, samplers, whole in rows:
        torch.testing.assert_close(trainers, samplers, atol=1e-6, rtol=0)
        assert bool((trainers > whole).all())


def test_experience_is_the_same_after_it_was_written() -> None:
    tokens = {
        "sampled_logprobs": [torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.25])],
        "values": [torch.zeros(3), torch.ones(2)],
    }
    made = Experience(
        [Tree((5,), ((6, 7, 1),)), Tree((5,), ((8, 9),))],
        tokens,
        torch.tensor([2.0, 1.0]),
        torch.tensor([True, False]),
        parts={"a": torch.tensor([1.0, 2.0])},
        support=Support(torch.tensor([4, 9, 1, 8]), torch.tensor([2, 0, 1, 0, 1]), torch.tensor([-1, 1, -1, -1, -1])),
        measured={"distinct_2": 1 / 3},
    )
    again = Experience.from_tensors(made.tensors())
    assert again.trees == made.trees and again.measured == made.measured
    torch.testing.assert_close(again.tokens, made.tokens, rtol=0, atol=0)
    torch.testing.assert_close(again.parts, made.parts, rtol=0, atol=0)
    chosen = again.support_of([1, 0])
    assert chosen is not None
    assert chosen.kept.tolist() == [8, 4, 9, 1]
    assert chosen.counts.tolist() == [0, 1, 2, 0, 1]
    assert chosen.banned.tolist() == [-1, -1, -1, 1, -1]


def test_a_prompt_with_one_response_is_a_tree_of_one() -> None:
    rollouts = [Rollout(Prompt(text), (at,), (9, at), (-1.0,) * 2, True, "") for at, text in enumerate("ab")]
    assert trees_of(rollouts, 1) == [Tree((0,), ((9, 0),)), Tree((1,), ((9, 1),))]
    assert trees_of([rollouts[0]] * 2 + [rollouts[1]] * 2, 2) == [
        Tree((0,), ((9, 0), (9, 0))),
        Tree((1,), ((9, 1), (9, 1))),
    ]


def test_of_texts_that_were_cleaned_the_trainer_measures_all(tmp_path: Path) -> None:
    """A cleaned response is another one than was drawn, of which the sampler knows nothing."""
    made = collector(tmp_path)
    rollouts = made.sampler.generate([Prompt("a b")], sampling=made.sampling, key=(0,), num_samples=SAMPLES)
    unknown = [replace(each, behaviour_logprobs=(float("nan"),) * len(each.response_ids)) for each in rollouts[:1]]
    found = made.measure([*unknown, *rollouts[1:]], made.reward(rollouts))
    for row, right in zip(found.tokens["behaviour_logprobs"], exact(made, found), strict=True):
        torch.testing.assert_close(row, right, atol=1e-6, rtol=0)
