"""Trained rewards judge text with their own tokenizer and template, as models of their own or on the policy's base."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from tests.tiny import CPU, base, models, scatter, tokenizer

from fairlead.config import AdapterSection, ModelSection
from fairlead.data.pack import preference_batch
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, ModelError
from fairlead.models.export import save_model
from fairlead.models.load import Base, load_base
from fairlead.models.roles import Models
from fairlead.rollout.rewards import RoleReward, open_reward, shared_reward
from fairlead.types import Conversation, Preference, Prompt, Rollout


def _renderer(template: str = "question-answer") -> Renderer:
    return Renderer(tokenizer(), template=template, max_length=128)


def _rollout(prompt: Conversation, text: str, **columns: object) -> Rollout:
    return Rollout(Prompt(prompt, columns), (3,), (4, 1), (-1.0, -1.0), True, text)


def test_a_reward_that_is_nowhere_is_refused() -> None:
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
    got = reward([_rollout(prompt, text) for prompt, text in texts]).values
    assert got == pytest.approx(wanted, abs=1e-5)


def test_a_policy_is_refused_as_a_reward_model(tmp_path: Path) -> None:
    save_model(models(("policy",)), tmp_path / "model", template="plain")
    with pytest.raises(ModelError, match="no reward head"):
        open_reward(str(tmp_path), _renderer(), device=CPU)


# --- on the policy's base ------------------------------------------------------------------------------------------


PAIRS = [Preference("why?", "the fuse", "a lamp flickers"), Preference("the lamp?", "loose", "is it so?")]
SECTION = AdapterSection(rank=4)


def _texts() -> list[Rollout]:
    return [_rollout(pair.prompt, text) for pair in PAIRS for text in (pair.chosen, pair.rejected)]


def _adapter_run(folder: Path, place: Path, role: str = "reward", seed: int = 3) -> Path:
    """A run that trained an adapter on the base at ``place``; the base is made where there is none."""
    if not place.is_dir():
        start = base()
        start.model.config._attn_implementation = "sdpa"
        start.model.save_pretrained(place)
        start.tokenizer.save_pretrained(place)
    made = Models(_load(place), (role,), adapter=SECTION)
    scatter(made, 0.2, seed)
    save_model(made, folder / "model", template="question-answer")
    return folder


def _load(place: Path, adapter: AdapterSection | None = None) -> Base:
    return load_base(ModelSection(path=str(place), adapter=adapter), tokenizer(), None, seed=0, device=CPU)


def _plain_scores(place: Path, folder: Path, rollouts: list[Rollout]) -> list[float]:
    """By transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1)
    model = PeftModel.from_pretrained(classifier, str(folder / "model"))
    texts = [f"Question: {r.prompt.prompt}\n\nAnswer: {r.text}" for r in rollouts]
    with torch.no_grad():
        rows = [[*tokenizer()(text).input_ids, tokenizer().eos_token_id] for text in texts]
        return [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]


def test_a_shared_reward_scores_as_a_model_of_its_own_and_as_plain_peft(tmp_path: Path) -> None:
    place = tmp_path / "base"
    reward, sft = _adapter_run(tmp_path / "reward", place), _adapter_run(tmp_path / "sft", place, "policy", seed=4)
    found, why = shared_reward(str(reward), ModelSection(path=str(sft), adapter=SECTION))
    assert found is not None and not why
    policy = Models(_load(sft, SECTION), ("policy", "reference"), adapter=SECTION, reward=found)
    scatter(policy, 0.3)
    shared = open_reward(str(reward), _renderer("hh"), device=CPU, models=policy)
    alone = open_reward(str(reward), _renderer("hh"), device=CPU)
    assert isinstance(shared, RoleReward) and isinstance(alone, RoleReward)
    assert len(policy.network.peft_config) == 3
    rollouts = _texts()
    wanted = _plain_scores(place, reward, rollouts)
    assert max(wanted) - min(wanted) > 1e-2
    assert list(shared(rollouts).values) == pytest.approx(wanted, abs=1e-5)
    assert list(alone(rollouts).values) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "the policy trains no adapter"),
        ({"adapter": SECTION, "roles": "separate"}, "model.roles=separate"),
        ({"adapter": SECTION, "path": "other"}, "its base is .*base, the policy's is .*other"),
    ],
)
def test_a_reward_that_cannot_stand_on_the_policys_base_says_why(tmp_path: Path, settings: dict, why: str) -> None:
    place = tmp_path / "base"
    reward = _adapter_run(tmp_path / "reward", place)
    if "path" in settings:
        other = base(seed=1)
        other.model.save_pretrained(tmp_path / "other")
        settings = settings | {"path": str(tmp_path / "other")}
    found, said = shared_reward(str(reward), ModelSection(**{"path": str(place), **settings}))
    assert found is None and re.search(why, said)


def test_a_base_that_was_moved_is_known_by_its_weights(tmp_path: Path) -> None:
    reward = _adapter_run(tmp_path / "reward", tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    found, _ = shared_reward(str(reward), ModelSection(path=str(tmp_path / "copy"), adapter=SECTION))
    assert found is not None


def test_a_whole_model_is_refused_where_roles_must_be_shared(tmp_path: Path) -> None:
    save_model(models(("reward",)), tmp_path / "model", template="plain")
    section = ModelSection(path=str(tmp_path), adapter=SECTION, roles="shared")
    with pytest.raises(ConfigError, match=r"(?s)cannot stand on the policy's base: it is a whole model.*roles=auto"):
        shared_reward(str(tmp_path), section)


def test_a_reward_adapter_that_lost_its_score_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    reward = _adapter_run(tmp_path / "reward", tmp_path / "base")
    file = reward / "model" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(ModelError, match="lacks its score head"):
        open_reward(str(reward), _renderer(), device=CPU)
