"""The file that says what is searched, and the recipe it must fit, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.sweep.conftest import Files

from fairlead.errors import ConfigError, DataError, FairleadError
from fairlead.sweep import make_plan
from fairlead.sweep.space import Parameter, Space, read_space


def of(**given: Any) -> Parameter:
    return Parameter.model_validate(given)


@pytest.mark.parametrize(
    ("parameter", "values", "samples"),
    [
        (of(choice=["adamw", "lion", None]), ("adamw", "lion", None), ("adamw", "lion", None)),
        (of(int=[2, 5]), range(2, 6), (2, 5)),
        (of(int=[2, 8], step=4), range(2, 9, 4), (2, 6)),
        (of(int=[1, 64], log=True), range(1, 65), (1, 64)),
        (of(uniform=[0.1, 0.45], step=0.1), [0.1, 0.2, 0.3, 0.4], (0.1, 0.4)),
        (of(uniform=[0, 1]), None, (0.0, 1.0, pytest.approx(0.618034))),
        (of(loguniform=[1, 2]), None, (1.0, 2.0, pytest.approx(1.618034))),
    ],
)
def test_the_values_of_a_parameter_and_those_a_recipe_is_tried_with(
    parameter: Parameter, values: Any, samples: tuple[Any, ...]
) -> None:
    assert parameter.values == values
    assert tuple(parameter.samples) == samples


def test_a_grid_holds_every_combination_once_the_last_key_first() -> None:
    space = {"a": {"choice": ["x", "y"]}, "b": {"int": [1, 3]}}
    grid = Space.model_validate({"metric": "loss", "goal": "min", "sampler": "grid", "space": space})
    assert grid.num_trials == 6
    pairs = [tuple(grid.combination(n)[key] for key in "ab") for n in range(6)]
    assert pairs == [("x", 1), ("x", 2), ("x", 3), ("y", 1), ("y", 2), ("y", 3)]
    assert grid.model_copy(update={"trials": 4}).num_trials == 4
    assert grid.model_copy(update={"trials": 40}).num_trials == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gaol": "max"}, r"unknown key 'gaol' \(.*space.yaml:\d+\); did you mean 'goal'\?"),
        ({"goal": "maximise"}, r"goal \(.*space.yaml:2\): input should be 'max' or 'min', got 'maximise'"),
        ({"goal": None}, "goal.*input should be 'max' or 'min', got None"),
        ({"metric": ""}, "metric.*at least 1 character"),
        ({"trials": 0}, "trials.*greater than or equal to 1"),
        ({"read": "first"}, "read.*'last', 'mean' or 'best'"),
        ({"sampler": "bayes"}, "sampler.*'tpe', 'random' or 'grid'"),
        ({"pruner": True}, "pruner.*'none' or 'median'"),
        ({"space": {}}, "space.*at least 1 item"),
        ({"space": None}, "space.*valid dictionary"),
        ({"space": {"x": [1, 2]}}, "space.x.*a section of settings was expected"),
        ({"space": {"x": {}}}, "space.x.*one of uniform, loguniform, int, choice was expected, got none"),
        ({"space": {"x.y": {"choise": [1]}}}, r"unknown key 'space.x.y.choise' \(.*:\d+\); did you mean 'choice'\?"),
        ({"space": {"x": {"choice": [1], "int": [1, 2]}}}, "got int and choice"),
        ({"space": {"x": {"uniform": [1]}}}, "space.x.uniform.1.*field required"),
        ({"space": {"x": {"uniform": [2, 1]}}}, "goes from low to high, got 2 to 1"),
        ({"space": {"x": {"uniform": ["a", 1]}}}, "space.x.uniform.0.*valid number"),
        ({"space": {"x": {"uniform": [0, float("inf")]}}}, "space.x.uniform.1.*finite number"),
        ({"space": {"x": {"loguniform": [0, 1]}}}, "a logarithm needs values above 0, got 0"),
        ({"space": {"x": {"loguniform": [1, 9], "step": 1}}}, "step is for uniform"),
        ({"space": {"x": {"int": [0, 9], "log": True}}}, "a logarithm needs values above 0, got 0"),
        ({"space": {"x": {"int": [1, 9], "step": 0.5}}}, "step is for uniform, and a whole number for int"),
        ({"space": {"x": {"int": [1, 9], "step": 10}}}, "step=10 leads out of 1 to 9"),
        ({"space": {"x": {"int": [1.5, 9]}}}, "space.x.int.0.*valid integer"),
        ({"space": {"x": {"uniform": [1, 9], "log": True}}}, "log is for int"),
        ({"space": {"x": {"choice": []}}}, "choice is empty, or holds a value twice"),
        ({"space": {"x": {"choice": [1, 2, 1]}}}, "choice is empty, or holds a value twice"),
        ({"space": {"x": {"choice": [float("nan")]}}}, "choice holds what no recipe can hold"),
        ({"sampler": "grid"}, "a grid needs choice, int, or uniform with a step, but not so optim.learning_rate"),
    ],
)
def test_what_is_wrong_in_a_space_is_named_with_its_line(files: Files, change: dict[str, Any], message: str) -> None:
    _, space = files(**change)
    with pytest.raises(ConfigError, match=message):
        read_space(space)


def test_a_space_that_is_missing_or_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_space(tmp_path / "space.yaml")
    (tmp_path / "space.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="a mapping of settings was expected, got list"):
        read_space(tmp_path / "space.yaml")


# --- against a recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optim.learning_rat": {"choice": [1]}}, r"unknown key 'optim.learning_rat' \(.*space.yaml\); did you mean"),
        ({"dpo.beta": {"choice": [0.1]}}, r"with dpo.beta=0.1: unknown key 'dpo'"),
        ({"optim.learning_rate": {"uniform": [0, 1]}}, r"with optim.learning_rate=0.0: .*greater than 0, got 0.0"),
        ({"data.eval_fraction": {"uniform": [0, 1]}}, r"with data.eval_fraction=1.0: .*less than 1, got 1.0"),
        ({"train.batch_size": {"uniform": [1, 8]}}, r"with train.batch_size=5.3\d*: .*valid integer"),
        ({"optim.name": {"choice": ["adamw", "adamm"]}}, r'with optim.name="adamm": '),
        ({"optim.name": {"choice": ["lion"]}, "optim.state_dtype": {"choice": ["bfloat16"]}}, "is for adamw, not for"),
        ({"run.name": {"choice": ["a", "b"]}}, r"run.name: a sweep names its runs itself"),
        ({"train.steps": {"int": [1, 2]}}, r"train.steps is also on the command line"),
        ({"seed.x": {"int": [1, 2]}}, r"seed.x=1: seed.*valid integer|'seed' is a value"),
    ],
)
def test_a_key_or_value_that_the_recipe_does_not_take_costs_nothing(
    files: Files, tmp_path: Path, space: dict[str, Any], message: str
) -> None:
    recipe, path = files(space=space)
    with pytest.raises(ConfigError, match=message):
        make_plan(recipe, path, ["train.steps=2"])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows.jsonl", "sft.yaml", "space.yaml"]


def test_a_fitting_space_has_a_folder_beside_the_recipes_runs(files: Files, tmp_path: Path) -> None:
    recipe, space = files()
    plan = make_plan(recipe, space)
    assert plan.folder == tmp_path / "sft-sweep"
    assert make_plan(recipe, space, ["run.name=mine"]).folder == tmp_path / "mine-sweep"
    assert make_plan(recipe, space, out=tmp_path / "here").folder == tmp_path / "here"
    assert (plan.num_trials, plan.as_dict()["planned"]) == (4, 4)
    assert plan.as_dict()["space"] == yaml.safe_load(space.read_text())["space"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data.path": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"data.path": None}, ConfigError, r"data.path is not given\nhint: add data.path=... to the command"),
        ({"model.scratch": None}, ConfigError, "model.path is not given"),
    ],
)
def test_a_recipe_without_its_files_is_refused(
    files: Files, change: dict[str, Any], error: type[FairleadError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_plan(*files(recipe=change))


def test_files_that_are_searched_must_be_there_too(files: Files, tmp_path: Path) -> None:
    paths = [str(tmp_path / "rows.jsonl"), str(tmp_path / "other.jsonl")]
    with pytest.raises(DataError, match=re.escape(paths[1])):
        make_plan(*files(recipe={"data.path": None}, space={"data.path": {"choice": paths}}))


GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "sweeps.md").read_text("utf-8")


def test_the_space_of_the_guide_fits_the_recipe_it_is_shown_with(tmp_path: Path) -> None:
    (space := tmp_path / "space.yaml").write_text(re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[0])
    (data := tmp_path / "pairs.jsonl").touch()
    plan = make_plan("dpo", space, [f"model.path={tmp_path}", f"data.path={data}", "data.eval_fraction=0.1"])
    assert (plan.space.metric, plan.space.goal, plan.num_trials) == ("eval/rewards/accuracies", "max", 20)


def test_the_guide_lists_every_setting_of_a_space() -> None:
    rows = re.findall(r"^\| (`.*?) \|", GUIDE.partition("\n## ")[0], re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(Space.model_fields)


def test_a_pipeline_is_refused_with_what_to_do(files: Files, tmp_path: Path) -> None:
    _, space = files()
    (tmp_path / "chain.yaml").write_text("stages: {sft: {train: sft}}\n")
    for given in ("hh-tiny", str(tmp_path / "chain.yaml")):
        with pytest.raises(ConfigError, match=r"is a pipeline, and a sweep trains one recipe\nhint: run the pipeline"):
            make_plan(given, space)
