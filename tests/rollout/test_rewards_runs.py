"""Rewards of every form in a run: trained on, logged, fingerprinted and planned for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.rows import PROMPTS, ROWS, SCRATCH, brevity, settings
from tests.tiny import base, models, scatter

from fairlead.algorithms import find
from fairlead.assemble import Given, build_models
from fairlead.errors import DataError
from fairlead.evaluation import evaluate
from fairlead.manifest import fingerprints
from fairlead.models.export import save_model
from fairlead.pipeline_file import require_inputs
from fairlead.planning.plan import plan_run
from fairlead.runner import resolve, train
from fairlead.tracking import tree_sha256

SMALL = {"model.path": None, "model.adapter": None, "model.scratch": SCRATCH}


@pytest.fixture
def reward_run(tmp_path: Path) -> Path:
    made = models(("reward",))
    scatter(made, 0.2)
    save_model(made, tmp_path / "judge" / "model", template="question-answer")
    return tmp_path / "judge"


def _sources(run: Path) -> list[Any]:
    return [
        str(run),
        {"rule": "length", "weight": 0.1, "arguments": {"max": 5}},
        {"function": "tests.end_to_end.rows:brevity", "weight": 2, "name": "brief"},
    ]


def test_a_run_learns_from_a_list_and_keeps_what_each_source_says(tmp_path: Path, reward_run: Path) -> None:
    own = {
        "model.path": None,
        "model.adapter": None,
        "model.scratch": SCRATCH,
        "ppo.reward": _sources(reward_run),
        "ppo.watch": {"again": "rule:repetition"},
    }
    run = train("ppo", settings("ppo", tmp_path, **own), data=PROMPTS)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all("eval/again" in row for row in rows if "eval/score" in row)
    first = next(row for row in rows if "objective/scores" in row)
    judged, length, brief = (first[f"objective/scores/{name}"] for name in ("judge", "length", "brief"))
    assert length < 0
    assert first["objective/scores"] == pytest.approx(judged + 0.1 * length + 2 * brief, abs=1e-5)
    assert resolve(run.path / "recipe.yaml").recipe.settings.reward[2].name == "brief"


def test_python_may_mix_functions_with_other_sources(tmp_path: Path) -> None:
    given = settings("ppo", tmp_path, **{**SMALL, "train.steps": 1})
    run = train("ppo", given, data=PROMPTS, reward=[brevity, "rule:length"])
    row = next(
        json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines() if "objective" in line
    )
    both = row["objective/scores/brevity"] + row["objective/scores/length"]
    assert row["objective/scores"] == pytest.approx(both, abs=1e-5)


def _recipe(folder: Path, *rewards: str) -> Any:
    base().model.config.save_pretrained(folder)
    return resolve({"algorithm": "ppo", "model": {"path": str(folder)}}, ["data.max_length=80", *rewards]).recipe


def test_every_model_that_a_reward_reads_is_fingerprinted(tmp_path: Path, reward_run: Path) -> None:
    found = fingerprints(_recipe(tmp_path / "base", f"ppo.reward=[rule:length, {reward_run}]"), Given())
    wanted = {"path": str(reward_run), "sha256": tree_sha256(reward_run / "model")}
    assert found[f"reward: {reward_run}"] == wanted
    assert fingerprints(_recipe(tmp_path / "base", f"ppo.reward={reward_run}"), Given())["reward"] == wanted
    of_function = fingerprints(_recipe(tmp_path / "base", "ppo.reward=tests.end_to_end.rows:brevity"), Given())
    assert [name for name in of_function if name.startswith("reward")] == []


def test_the_memory_plan_counts_each_model_that_is_loaded_beside_the_policy(tmp_path: Path, reward_run: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    one = AutoModelForSequenceClassification.from_pretrained(reward_run / "model")
    size = sum(parameter.nbytes for parameter in one.parameters())
    several = f"ppo.reward=[rule:length, {{path: [{reward_run}, {reward_run}]}}]"
    recipe = _recipe(tmp_path / "base", several, f"ppo.watch={{again: {reward_run}, rule: 'rule:length'}}")
    assert plan_run(recipe, find("ppo"), build_models).others == {"reward": 2 * size, "again": size}


def test_a_pipeline_looks_for_the_files_of_rewards_and_for_no_pattern(tmp_path: Path) -> None:
    pattern = {"rule": "regex", "arguments": {"pattern": "./.*"}}
    require_inputs({"ppo": {"reward": ["rule:length", pattern], "watch": {"again": pattern}}}, tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        require_inputs({"ppo": {"reward": [pattern, {"path": ["./nowhere", "./else"]}]}}, tmp_path)


def test_an_evaluation_takes_every_form_of_reward(tmp_path: Path, reward_run: Path) -> None:
    run = train("pretrain", settings("pretrain", tmp_path, **SMALL), data=ROWS["pretrain"]).path
    scores = {"words": {"rule": "length", "arguments": {"unit": "words"}}, "both": [reward_run, brevity]}
    found = evaluate([run], prompts=PROMPTS, scores=scores, num_prompts=4, max_new_tokens=6)["pretrain"]
    assert found["words"]["mean"] >= 0 and found["words"]["n"] == found["both"]["n"] == 4
