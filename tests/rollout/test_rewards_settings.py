"""What a recipe may say of rewards, and what is said of its mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import Field

from fairlead.config import Section
from fairlead.config_resolve import load_recipe
from fairlead.errors import ConfigError
from fairlead.models.heads import Combination
from fairlead.rollout.rewards.settings import (
    FunctionSource,
    ModelSource,
    RewardSource,
    RuleSource,
    UrlSource,
    model_paths,
    source_of,
    sources,
)


class Settings(Section):
    reward: RewardSource | None = None
    watch: dict[str, RewardSource] = Field(default_factory=dict)


def _resolve(*overrides: str, **own: Any) -> Any:
    recipe = {"algorithm": "mine", "mine": own}
    return load_recipe(recipe, overrides, settings_of=lambda name: (name, Settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/reward", ModelSource(path="runs/reward")),
        ("owner/name", ModelSource(path="owner/name")),
        ("my.module:function", FunctionSource(function="my.module:function")),
        ("rule:length", RuleSource(rule="length")),
        ("http://localhost:8000/score", UrlSource(url="http://localhost:8000/score")),
        ("https://scores.example", UrlSource(url="https://scores.example")),
    ],
)
def test_the_short_form_of_each_source(text: str, expected: object) -> None:
    assert source_of(text) == expected
    assert _resolve(reward=text).recipe.settings.reward == text


def test_a_path_with_a_colon_that_exists_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert source_of(f"{tmp_path}/a:b") == ModelSource(path=f"{tmp_path}/a:b")


def test_a_run_is_a_path_and_kinds_are_told_by_their_key() -> None:
    given = [
        "runs/a",
        {"run": "runs/b", "weight": 0.5},
        {"path": ["a", "b"], "combine": "minimum"},
        {"function": "m:f", "workers": 2},
        {"rule": "length", "arguments": {"max": 3}, "name": "short"},
        {"url": "http://h", "retries": 0},
    ]
    found = sources(_resolve(reward=given).recipe.settings.reward)
    assert found == [
        ModelSource(path="runs/a"),
        ModelSource(path="runs/b", weight=0.5),
        ModelSource(path=("a", "b"), combine="minimum"),
        FunctionSource(function="m:f", workers=2),
        RuleSource(rule="length", arguments={"max": 3}, name="short"),
        UrlSource(url="http://h", retries=0),
    ]
    assert [source.called for source in found if not callable(source)] == ["a", "b", "ensemble", "m:f", "short", "h"]
    assert model_paths(given) == ["runs/a", "runs/b", "a", "b"]


def test_a_resolved_recipe_is_read_again_as_it_was() -> None:
    given = [{"run": "runs/b", "label": "good"}, "rule:length", {"url": "http://h"}, {"function": "m:f"}]
    first = _resolve(reward=given, watch={"x": {"rule": "length"}, "y": ["rule:length", "m:f"]})
    again = load_recipe(first.as_dict(), settings_of=lambda name: (name, Settings))
    assert again.recipe.settings == first.recipe.settings
    assert again.as_dict() == first.as_dict()


def test_overrides_reach_into_a_source() -> None:
    settings = _resolve("mine.reward.arguments.max=9", reward={"rule": "length"}).recipe.settings
    assert settings.reward == RuleSource(rule="length", arguments={"max": 9})
    assert _resolve("mine.reward={rule: length, weight: 2}").recipe.settings.reward.weight == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rule:lenght", r"^mine\.reward.*: no rule 'lenght'; did you mean 'length'\?"),
        ({"rule": "lenght"}, r"^mine\.reward.*: no rule 'lenght'; did you mean 'length'\?"),
        ({"rul": "length"}, r"^mine\.reward.*: a reward says where it comes from: one of path \(or run\), function"),
        ({"weight": 2}, r"one of path \(or run\), function, rule, url"),
        ({"path": "a", "lable": "x"}, r"^mine\.reward.*: unknown key 'lable'; did you mean 'label'\?"),
        ({"path": "a", "run": "b"}, r"path and run are both given"),
        ({"path": "a", "rule": "length"}, r"path and rule are both given; a reward has one origin"),
        ({"rule": "length", "timeout": 3}, r"timeout is a setting of url, not of rule"),
        ({"rule": "length", "batch_size": 3}, r"batch_size is a setting of path and function and url, not of rule"),
        ({"path": "a", "use": "logits"}, r"^mine\.reward\.use.*: input should be 'probability' or 'logit'"),
        ({"path": ["a"]}, r"an ensemble has two members or more, got \['a'\]"),
        ({"path": ["a", "b"], "label": "x"}, r"label and use speak of one model"),
        ({"path": "a", "combine": "mean", "disagreement_weight": 1}, r"no effect with combine=mean"),
        ({"function": "m"}, r"^mine\.reward\.function.*should match pattern"),
        ({"url": "ftp://h"}, r"^mine\.reward\.url.*should match pattern"),
        (["rule:length", {"rule": "lenght"}], r"^mine\.reward\.1.*: no rule 'lenght'"),
        ([], r"^mine\.reward.*: list should have at least 1 item"),
        (3, r"one of path \(or run\), function, rule, url"),
    ],
)
def test_a_mistake_is_named_with_its_key(given: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _resolve(reward=given)


def test_python_may_hand_in_functions_paths_and_mappings() -> None:
    assert sources([len, Path("runs/a"), {"rule": "length"}, None]) == [
        len,
        ModelSource(path="runs/a"),
        RuleSource(rule="length"),
    ]
    with pytest.raises(ConfigError, match="no reward 3: a reward says where it comes from"):
        sources([3])


def test_the_combinations_are_those_of_a_reward_with_several_heads() -> None:
    literal, _ = get_args(ModelSource.model_fields["combine"].annotation)
    assert get_args(literal) == get_args(Combination)


@pytest.mark.parametrize("module", ["settings", "calls"])
def test_what_is_imported_before_a_model_is_needed_imports_no_torch(module: str) -> None:
    code = f"import fairlead.rollout.rewards.{module}, sys; print({{'torch', 'transformers'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
