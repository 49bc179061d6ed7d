"""Rewards of several numbers a text: heads of one model, runs trained apart, and weighted lists of sources."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CPU, base, models, scatter, tokenizer

from fairlead.config import AdapterSection, ModelSection
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, ModelError, TrainingError
from fairlead.models.export import save_model
from fairlead.models.heads import RewardHeads
from fairlead.models.load import Base, load_base
from fairlead.models.roles import Models
from fairlead.rollout.rewards import EnsembleReward, RoleReward, open_model, open_reward, shared_reward
from fairlead.types import Prompt, Rollout, Scores

NAMES = ("a", "b", "c")
ENSEMBLE = RewardHeads("ensemble", NAMES, "mean-minus-disagreement")
ATTRIBUTES = RewardHeads("attributes", NAMES, "mean", (0.5, 0.25, -1.0))
SECTION = AdapterSection(rank=4)
TEXTS = [("why?", "the fuse"), ("why?", "a lamp flickers"), ("the lamp?", "loose")]


def _rollouts() -> list[Rollout]:
    return [_rollout(prompt, text) for prompt, text in TEXTS]


def _rollout(prompt: str, text: str) -> Rollout:
    ids = _renderer().response_ids([(prompt, text)])[0]
    return Rollout(Prompt(prompt), (3,), ids, (-1.0,) * len(ids), True, text)


def _renderer() -> Renderer:
    return Renderer(tokenizer(), template="question-answer", max_length=128)


def _score(source: Any, **options: Any) -> Scores:
    return open_reward(source, _renderer(), device=CPU, **options)(_rollouts())


def _run(folder: Path, heads: RewardHeads | None, seed: int = 3) -> str:
    """A finished run of a reward whose weights are all its own."""
    made = models(("reward",), reward_heads=heads)
    scatter(made, 0.2, seed)
    save_model(made, folder / "model", template="question-answer")
    return str(folder)


def _adapter_run(folder: Path, place: Path, heads: RewardHeads | None = None, seed: int = 3) -> str:
    """A finished run of an adapter on the base at ``place``; the base is made where there is none."""
    if not place.is_dir():
        start = base()
        start.model.config._attn_implementation = "sdpa"
        start.model.save_pretrained(place)
        start.tokenizer.save_pretrained(place)
    made = Models(_load(place), ("reward",), adapter=SECTION, reward_heads=heads)
    scatter(made, 0.2, seed)
    save_model(made, folder / "model", template="question-answer")
    return str(folder)


def _load(place: Path, adapter: AdapterSection | None = None) -> Base:
    return load_base(ModelSection(path=str(place), adapter=adapter), tokenizer(), None, seed=0, device=CPU)


def _plain(folder: str) -> list[list[float]]:
    """What each head says, by transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model")
    return [_logits(model, prompt, text) for prompt, text in TEXTS]


def _plain_adapter(place: Path, folder: str) -> list[list[float]]:
    """What each head says, by transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(NAMES))
    model = PeftModel.from_pretrained(classifier, f"{folder}/model")
    return [_logits(model, prompt, text) for prompt, text in TEXTS]


def _logits(model: Any, prompt: str, text: str) -> list[float]:
    row = [*tokenizer()(f"Question: {prompt}\n\nAnswer: {text}").input_ids, tokenizer().eos_token_id]
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].tolist()


def _close(got: Any, wanted: Any) -> bool:
    return got == pytest.approx(wanted, abs=2e-5)


# --- heads of one model --------------------------------------------------------------------------------------------


def test_the_heads_of_an_ensemble_score_by_their_mean_less_their_disagreement(tmp_path: Path) -> None:
    place = _run(tmp_path, ENSEMBLE)
    plain = _plain(place)
    found = _score(place)
    spread = [statistics.pstdev(row) for row in plain]
    assert min(spread) > 0.05
    assert _close(found.values, [statistics.mean(row) - by for row, by in zip(plain, spread, strict=True)])
    assert set(found.parts) == {*NAMES, "disagreement"}
    assert _close(found.parts["disagreement"], spread)
    for number, name in enumerate(NAMES):
        assert _close(found.parts[name], [row[number] for row in plain])
    matrix = open_model(place, device=CPU).matrix(TEXTS)
    assert matrix.shape == (3, 3) and matrix.dtype == torch.float32
    assert _close(matrix.flatten().tolist(), [value for row in plain for value in row])
    assert _close(open_model(place, device=CPU).score(TEXTS), found.values)


def test_a_source_combines_the_heads_otherwise(tmp_path: Path) -> None:
    place = _run(tmp_path, ENSEMBLE)
    plain = _plain(place)
    assert _close(_score({"path": place, "combine": "minimum"}).values, list(map(min, plain)))
    assert _close(_score({"path": place, "combine": "mean"}).values, list(map(statistics.mean, plain)))
    wanted = [statistics.mean(row) - 3 * statistics.pstdev(row) for row in plain]
    assert _close(_score({"path": place, "disagreement_weight": 3}).values, wanted)


def test_attributes_score_by_their_weights_or_one_of_them_alone(tmp_path: Path) -> None:
    place = _run(tmp_path, ATTRIBUTES)
    plain = _plain(place)
    found = _score(place)
    assert _close(found.values, [0.5 * a + 0.25 * b - c for a, b, c in plain])
    assert set(found.parts) == set(NAMES)
    assert _close(_score({"path": place, "label": "b"}).values, [b for _, b, _ in plain])


def test_an_adapter_with_several_heads_scores_alike_on_the_policys_base_and_alone(tmp_path: Path) -> None:
    place = tmp_path / "base"
    reward = _adapter_run(tmp_path / "reward", place, ENSEMBLE)
    shared, _ = shared_reward([{"rule": "length"}, {"path": reward}], ModelSection(path=str(place), adapter=SECTION))
    policy = Models(_load(place, SECTION), ("policy", "reference"), adapter=SECTION, reward=shared)
    scatter(policy, 0.3)
    plain = _plain_adapter(place, reward)
    opened = open_reward({"path": reward, "combine": "minimum"}, _renderer(), device=CPU, models=policy)
    assert isinstance(opened, RoleReward)
    assert _close(opened(_rollouts()).values, list(map(min, plain)))
    assert _close(_score({"path": reward, "combine": "minimum"}).values, list(map(min, plain)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label": "d"}, r"(?s)has no head 'd': a, b, c"),
        ({"use": "logit"}, r"use=logit, but .* is a trained reward"),
        ({"label": "a", "combine": "mean"}, r"label=a picks one head .*, so nothing is combined"),
        ({"disagreement_weight": 2}, r"(?s)no effect on .*combine=mean.*combine=mean-minus-disagreement"),
    ],
)
def test_an_option_that_says_nothing_of_these_heads_is_refused(tmp_path: Path, options: dict, said: str) -> None:
    place = _run(tmp_path, ATTRIBUTES)
    with pytest.raises(ConfigError, match=said):
        _score({"path": place} | options)


@pytest.mark.parametrize("option", [{"label": "reward"}, {"combine": "mean"}, {"disagreement_weight": 1}])
def test_a_reward_of_one_head_takes_no_option_of_several(tmp_path: Path, option: dict) -> None:
    place = _run(tmp_path, None)
    with pytest.raises(ConfigError, match=f"{next(iter(option))} has no effect on .*: it is a reward of one head"):
        _score({"path": place} | option)


def test_the_probability_of_a_trained_reward_is_the_sigmoid_of_its_score(tmp_path: Path) -> None:
    place = _run(tmp_path, None)
    logits = _score(place).values
    assert _close(_score({"path": place, "use": "probability"}).values, [1 / (1 + math.exp(-x)) for x in logits])
    assert _close(_score({"path": place, "use": "logit"}).values, logits)


def test_a_folder_whose_heads_are_not_those_it_names_is_refused(tmp_path: Path) -> None:
    place = _run(tmp_path, ENSEMBLE)
    file = tmp_path / "model" / "fairlead.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"heads": meta["heads"] | {"names": ["a", "b"]}}))
    with pytest.raises(ModelError, match="has 3 labels; a reward model has 2: a, b"):
        _score(place)


def test_a_reward_that_is_no_number_names_source_and_sample(tmp_path: Path) -> None:
    made = models(("reward",))
    scatter(made, 0.2)
    with torch.no_grad():
        made.heads["reward"].get_parameter("linear.weight").fill_(float("nan"))
    save_model(made, tmp_path / "run" / "model", template="question-answer")
    with pytest.raises(TrainingError, match="the reward run returned nan for the sample 'the fuse'"):
        _score(str(tmp_path / "run"))
    with pytest.raises(TrainingError, match="the reward mine returned nan for the sample 'the fuse'"):
        _score({"path": str(tmp_path / "run"), "name": "mine"})
    with pytest.raises(TrainingError, match="the reward run returned nan for the sample number 0"):
        open_model(str(tmp_path / "run"), device=CPU).score(TEXTS)


def test_max_length_leaves_out_the_beginning_and_batch_size_changes_nothing(tmp_path: Path) -> None:
    place = _run(tmp_path, None)
    whole = _score(place).values
    assert _close(_score({"path": place, "batch_size": 1}).values, whole)
    assert _close(_score({"path": place, "max_length": 200}).values, whole)
    cut = _score({"path": place, "max_length": 4}).values
    ids = open_model(place, device=CPU).ids(TEXTS)
    assert _close(cut, open_model(place, device=CPU).score_ids([row[-4:] for row in ids]))
    assert abs(cut[0] - whole[0]) > 1e-3


# --- runs trained apart --------------------------------------------------------------------------------------------


def test_runs_trained_apart_are_an_ensemble(tmp_path: Path) -> None:
    places = [_run(tmp_path / "one", None, 3), _run(tmp_path / "two", None, 4), _run(tmp_path / "three", None, 5)]
    single = [[row[0] for row in _plain(place)] for place in places]
    rows = list(zip(*single, strict=True))
    source = {"path": places, "combine": "mean-minus-disagreement", "disagreement_weight": 0.5, "name": "three judges"}
    opened = open_reward(source, _renderer(), device=CPU)
    assert isinstance(opened, EnsembleReward) and opened.name == "three judges"
    found = opened(_rollouts())
    assert _close(found.values, [statistics.mean(row) - 0.5 * statistics.pstdev(row) for row in rows])
    assert _close(found.parts["disagreement"], list(map(statistics.pstdev, rows)))
    assert set(found.parts) == {"one", "two", "three", "disagreement"} and _close(found.parts["two"], single[1])
    assert _close(_score({"path": places}).values, list(map(statistics.mean, rows)))
    assert _close(_score({"path": places, "combine": "minimum"}).values, list(map(min, rows)))


def test_the_first_member_that_can_stands_on_the_policys_base(tmp_path: Path) -> None:
    place = tmp_path / "base"
    whole, one = _run(tmp_path / "whole", None), _adapter_run(tmp_path / "one", place)
    two = _adapter_run(tmp_path / "two", place, seed=5)
    section = ModelSection(path=str(place), adapter=SECTION)
    source = ["rule:length", whole, {"path": [one, two]}]
    found, why = shared_reward(source, section)
    assert found is not None and found.path == Path(one) / "model" and not why
    policy = Models(_load(place, SECTION), ("policy",), adapter=SECTION, reward=found)
    opened = open_reward({"path": [one, two]}, _renderer(), device=CPU, models=policy)
    assert _close(opened(_rollouts()).values, _score({"path": [one, two]}).values)
    assert shared_reward(["rule:length", len, "m:f", {"url": "http://h"}], section) == (None, "")
    assert shared_reward(None, section) == (None, "")
    assert shared_reward([whole], section) == (None, "it is a whole model, not an adapter")


# --- weighted lists ------------------------------------------------------------------------------------------------


def _halves(outputs: list[str]) -> list[float]:
    return [len(output) / 2 for output in outputs]


def _spans(outputs: list[str]) -> list[list[tuple[int, int, float]]]:
    return [[(0, 1, 1.0), (0, len(output), 0.5)] for output in outputs]


def test_a_list_adds_up_weighted_scores_and_keeps_each_sources_own() -> None:
    found = _score(["rule:length", {"rule": "length", "weight": -0.5, "arguments": {"unit": "words"}}, _halves])
    assert found.values == (8 - 1.0 + 4, 15 - 1.5 + 7.5, 5 - 0.5 + 2.5)
    assert found.parts == {"length": (8.0, 15.0, 5.0), "length-2": (2.0, 3.0, 1.0), "_halves": (4.0, 7.5, 2.5)}
    assert found.tokens is None


def test_one_source_with_a_weight_is_weighed() -> None:
    found = _score({"rule": "length", "weight": 0.1, "name": "short"})
    assert found.values == pytest.approx((0.8, 1.5, 0.5)) and found.parts == {"short": (8.0, 15.0, 5.0)}


def test_parts_of_parts_stand_under_the_name_of_their_source(tmp_path: Path) -> None:
    place = _run(tmp_path / "run", ENSEMBLE)
    found = _score([{"path": place, "weight": 2}, "rule:length"])
    alone = _score(place)
    wanted = [2 * value + len(text) for value, (_, text) in zip(alone.values, TEXTS, strict=True)]
    assert found.values == pytest.approx(wanted)
    assert found.parts["run"] == alone.values and found.parts["run/disagreement"] == alone.parts["disagreement"]
    assert set(found.parts) == {"run", *(f"run/{name}" for name in alone.parts), "length"}


def test_dense_rewards_add_up_and_others_count_at_the_last_token() -> None:
    found = _score([_spans, {"rule": "length", "weight": 0.1}])
    dense = _score(_spans)
    assert found.tokens is not None and dense.tokens is not None
    for tokens, alone, value, (_, text) in zip(found.tokens, dense.tokens, found.values, TEXTS, strict=True):
        assert tokens[:-1] == alone[:-1] and tokens[-1] == pytest.approx(0.1 * len(text))
        assert sum(tokens) == pytest.approx(value) == pytest.approx(1.5 + 0.1 * len(text))
    assert found.parts["_spans"] == (1.5, 1.5, 1.5)


def test_an_error_in_a_list_names_its_source() -> None:
    def judge(outputs: list[str]) -> list[float]:
        return [float("nan")] * len(outputs)

    with pytest.raises(TrainingError, match="the reward judge returned nan for the sample 'the fuse'"):
        _score(["rule:length", judge])
