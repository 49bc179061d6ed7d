"""Rewards judge text: a reward model with its own tokenizer and template, a function with trlX's signature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import CPU, models, scatter, tokenizer

from fairlead.data.pack import preference_batch
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, ModelError, TrainingError
from fairlead.models.export import save_model
from fairlead.rollout.rewards import open_reward
from fairlead.types import Conversation, Preference, Prompt, Rollout


def _renderer(template: str = "question-answer") -> Renderer:
    return Renderer(tokenizer(), template=template, max_length=128)


def _rollout(prompt: Conversation, text: str, **columns: object) -> Rollout:
    return Rollout(Prompt(prompt, columns), (3,), (4, 1), (-1.0, -1.0), True, text)


def test_a_function_gets_samples_prompts_outputs_and_the_prompts_columns() -> None:
    seen = {}

    def judge(samples, prompts, outputs, **columns):
        seen.update(samples=samples, prompts=prompts, outputs=outputs, **columns)
        return [len(output) for output in outputs]

    reward = open_reward(judge, _renderer(), device=CPU)
    assert reward([_rollout("why?", "so", topic="x"), _rollout("how?", "thus")]) == [2.0, 4.0]
    assert seen == {
        "samples": ["Question: why?\n\nAnswer: so", "Question: how?\n\nAnswer: thus"],
        "prompts": ["Question: why?\n\nAnswer:", "Question: how?\n\nAnswer:"],
        "outputs": ["so", "thus"],
        "topic": ["x", None],
    }


@pytest.mark.parametrize(
    ("scores", "message"),
    [([float("nan")], "returned nan for the sample 'so'"), ([1.0, 2.0], "returned 2 scores for 1 samples")],
)
def test_a_score_that_is_no_number_or_too_many_is_an_error_that_names_the_source(scores, message) -> None:
    def judge(**_):
        return scores

    with pytest.raises(TrainingError, match=f"reward judge {message}"):
        open_reward(judge, _renderer(), device=CPU)([_rollout("why?", "so")])


def test_a_reward_that_raises_is_named_with_its_reason() -> None:
    def judge(**_):
        raise KeyError("lost")

    with pytest.raises(TrainingError, match="reward judge raised KeyError: 'lost'"):
        open_reward(judge, _renderer(), device=CPU)([_rollout("why?", "so")])


def test_a_reward_that_cannot_be_found_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"no reward 'os:nothing'.*"):
        open_reward("os:nothing", _renderer(), device=CPU)
    with pytest.raises(ModelError, match="does not exist"):
        open_reward("./nowhere", _renderer(), device=CPU)


def test_a_reward_model_scores_text_as_it_did_in_training(tmp_path: Path) -> None:
    made = models(("reward",))
    scatter(made, 0.2)
    save_model(made, tmp_path / "model", template="question-answer")
    renderer = _renderer()
    pairs = [Preference("why?", "the fuse", "a lamp flickers"), Preference("the lamp?", "loose", "is it so?")]
    trees, _, _ = renderer.trees(pairs)
    batch = preference_batch(trees, packed=True, pad_id=0)
    with torch.no_grad(), made.use("reward"):
        wanted = made(batch, frozenset({"scores"})).scores.tolist()
    reward = open_reward(str(tmp_path), renderer, device=CPU)
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    got = reward([_rollout(prompt, text) for prompt, text in texts])
    assert got == pytest.approx(wanted, abs=1e-5)


def test_a_policy_is_refused_as_a_reward_model(tmp_path: Path) -> None:
    save_model(models(("policy",)), tmp_path / "model", template="plain")
    with pytest.raises(ModelError, match="no reward head"):
        open_reward(str(tmp_path), _renderer(), device=CPU)
