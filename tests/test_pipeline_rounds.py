"""Stages that are repeated: each time from the last one's result, over files, continued wherever it was killed."""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fairlead.errors import ConfigError
from fairlead.pipeline import plan, run_pipeline
from fairlead.pipeline_file import read_pipeline
from fairlead.tracking import tree_sha256
from tests.end_to_end.rows import DEMONSTRATIONS, PROMPTS, SCRATCH, write

COMMON = {
    "data.max_length": 48,
    "data.template": "question-answer",
    "train.batch_size": 4,
    "train.num_samples": 0,
    "tracking.console": False,
    "threads": 1,
}
PIPELINE: dict[str, Any] = {
    "name": "staged",
    "seed": 2,
    "prompts": None,
    "reward": "tests.end_to_end.rows:brevity",
    "stages": {
        "sft": {
            "train": {"algorithm": "sft"},
            "model": {"scratch": SCRATCH},
            "data.path": "${prompts}/demonstrations.jsonl",
            "train.steps": 2,
            **COMMON,
        },
        "rounds": {
            "repeat": 2,
            "start": "${sft}",
            "stages": {
                "samples": {
                    "generate": "${previous}",
                    "prompts": "${prompts}/prompts.jsonl",
                    "num_samples": 4,
                    "rollout_size": 5,
                    "rollout_rows": 1,
                    "max_new_tokens": 8,
                },
                "scored": {"score": "${samples}", "reward": "${reward}", "model.tokenizer": "${previous}"},
                "selected": {"select": "${scored}"},
                "policy": {
                    "train": {"algorithm": "sft"},
                    "model.path": "${previous}",
                    "data.path": "${selected}",
                    "train.epochs": 2,
                    "train.save_every": 1,
                    **COMMON,
                },
            },
        },
        "evaluation": {
            "evaluate": ["sft", "rounds"],
            "reference": "sft",
            "prompts": "${prompts}/prompts.jsonl",
            "scores": {"brevity": "${reward}"},
            "num_prompts": 4,
            "max_new_tokens": 4,
        },
    },
}
ROUND = ["samples", "scored", "selected", "policy"]
FILES = ["prompts.jsonl", "samples.jsonl", "scored.jsonl", "selected.jsonl"]


def data(folder: Path) -> Path:
    folder.mkdir()
    write(folder / "demonstrations.jsonl", DEMONSTRATIONS)
    write(folder / "prompts.jsonl", PROMPTS)
    return folder


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {name: stage["status"] for name, stage in summary["stages"].items()}


def result(folder: Path) -> dict[str, bytes | str]:
    """What the rounds left: their files, and the hashes of their models."""
    files = {
        f"{number}/{name}": (folder / "rounds" / number / name).read_bytes()
        for number in ("000", "001")
        for name in FILES
    }
    return {
        **files,
        **{number: tree_sha256(folder / "rounds" / number / "policy" / "model") for number in ("000", "001")},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and summary of a pipeline that ran once; its data stand beside."""
    root = tmp_path_factory.mktemp("whole")
    given = [f"prompts={data(root / 'data')}"]
    return root / "staged", run_pipeline(PIPELINE, given, folder=root / "staged", say=lambda _: None)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_round_leaves_its_files_and_begins_from_the_last_one(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    names = [f"rounds/{number}/{stage}" for number in ("000", "001") for stage in ROUND]
    assert statuses(summary) == dict.fromkeys(["sft", *names, "evaluation"], "ran")
    asked: list[str] = []
    for number, start in (("000", "sft"), ("001", "rounds/000/policy")):
        place = folder / "rounds" / number
        assert {path.name for path in place.iterdir()} - {"selected.discarded.jsonl"} == {*FILES, *ROUND}
        recipe = yaml.safe_load((place / "policy" / "recipe.yaml").read_text())
        assert (recipe["model"]["path"], recipe["seed"]) == (str(folder / start), 2)
        assert recipe["data"]["path"] == str(place / "selected.jsonl")
        assert [len(rows(place / name)) for name in FILES] == [5, 20, 20, 5]
        asked += [row["prompt"] for row in rows(place / "prompts.jsonl")]
        assert all("topic" in row["columns"] for row in rows(place / "selected.jsonl"))
    assert set(asked[:8]) == {row["prompt"] for row in PROMPTS}  # the second round goes on where the first ended
    assert set(summary["models"]) == {"sft", "policy"}
    assert {"brevity", "kl", "win_rate"} <= summary["models"]["policy"]["metrics"].keys()


def test_what_is_done_is_skipped_and_more_rounds_are_added(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "staged")
    given = [f"prompts={whole[0].parent / 'data'}"]

    def again(*more: str) -> dict[str, str]:
        return statuses(run_pipeline(PIPELINE, [*given, *more], folder=tmp_path / "staged", say=lambda _: None))

    assert set(again().values()) == {"skipped"}
    third = again("stages.rounds.repeat=3")
    assert [name for name, status in third.items() if status == "ran"] == [
        *(f"rounds/002/{stage}" for stage in ROUND), "evaluation",
    ]  # fmt: skip
    changed = again("stages.rounds.stages.selected.keep=2")
    assert [name for name, status in changed.items() if status == "skipped"] == [
        "sft", "rounds/000/samples", "rounds/000/scored",
    ]  # fmt: skip
    assert len(rows(tmp_path / "staged" / "rounds" / "000" / "selected.jsonl")) == 10


def killed(folder: Path, given: list[str], reached: Callable[[], bool]) -> None:
    """Runs the pipeline in a process that ends without warning at a moment."""
    process = multiprocessing.get_context("fork").Process(
        target=run_pipeline, args=(PIPELINE, given), kwargs={"folder": folder}
    )
    process.start()
    while not reached():
        assert process.is_alive(), "the moment to kill never came"
        time.sleep(0.001)
    process.kill()
    process.join()


def test_killed_in_any_stage_it_ends_with_the_same_bytes(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, place = tmp_path / "staged", tmp_path / "staged" / "rounds"
    given = [f"prompts={whole[0].parent / 'data'}"]
    moments = (
        "000/.samples.jsonl.*/000/chunk-001.json",
        "000/policy/checkpoints/step-*/manifest.json",
        "001/samples.jsonl",
        "001/selected.jsonl",
    )
    sampled: dict[Path, int] = {}
    for moment in moments:
        killed(folder, given, lambda moment=moment: any(place.glob(moment)))
        sampled |= {path: path.stat().st_mtime_ns for path in place.glob("*/samples.jsonl")}
    assert len(sampled) == 2
    run_pipeline(PIPELINE, given, folder=folder, say=lambda _: None)
    assert result(folder) == result(whole[0])
    assert {path: path.stat().st_mtime_ns for path in sampled} == sampled  # never drawn twice


def test_raft_tiny_finds_shorter_walks_round_by_round(tmp_path: Path) -> None:
    small = {
        "directory": tmp_path,
        "stages.pretrain.train.steps": 60,
        "stages.pretrain.train.batch_size": 32,
        "stages.rounds.repeat": 2,
    }
    summary = run_pipeline("raft-tiny", small, say=lambda _: None)
    before, after = (summary["models"][name]["metrics"]["optimality"] for name in ("pretrain", "policy"))
    assert after["low"] > before["high"]
    rounds = tmp_path / "raft-tiny" / "rounds"
    scores = [[row["score"] for row in rows(rounds / number / "selected.jsonl")] for number in ("000", "001")]
    assert sum(scores[1]) / len(scores[1]) > sum(scores[0]) / len(scores[0])


def test_a_plan_says_of_every_stage_what_it_works_on(tmp_path: Path) -> None:
    stages = {name: settings for name, _, settings in plan(PIPELINE, [f"prompts={data(tmp_path / 'data')}"])}
    assert stages["rounds/001/samples"]["generate"] == "runs/staged/rounds/000/policy"
    assert stages["rounds/001/scored"]["score"] == "runs/staged/rounds/001/samples.jsonl"
    assert stages["rounds/001/selected"]["select"] == "runs/staged/rounds/001/scored.jsonl"
    assert (stages["rounds/001/selected"]["collect"], stages["rounds/001/samples"]["round"]) == ("local", 1)


ALONE = """
import gc
from transformers import PreTrainedModel
def alone(outputs, **_):
    gc.collect()
    models = sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())
    assert models == {0}, models
    return [float(len(output)) for output in outputs]
"""


def test_no_other_model_is_in_memory_beside_the_reward(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    gc.collect()
    held = sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())  # by other tests
    (tmp_path / "alone_or_not.py").write_text(ALONE.format(held))
    monkeypatch.syspath_prepend(tmp_path)
    given = [f"prompts={whole[0].parent / 'data'}", "reward=alone_or_not:alone"]
    source = {**PIPELINE, "stages": {name: PIPELINE["stages"][name] for name in ("sft", "rounds")}}
    assert run_pipeline(source, given, folder=tmp_path / "staged", say=lambda _: None)["status"] == "finished"


def test_an_override_reaches_into_the_repeated_stages() -> None:
    given = ["prompts=x", "stages.rounds.stages.samples.temperature=0.7", "stages.rounds.repeat=3"]
    stages = {stage.name: stage for stage in read_pipeline(PIPELINE, given).stages}
    assert [stages[f"rounds/00{number}/samples"].settings["round"] for number in range(3)] == [0, 1, 2]
    assert {stages[f"rounds/00{number}/samples"].settings["temperature"] for number in range(3)} == {0.7}
    assert stages["rounds/002/policy"].upstream == ("rounds/001/policy", "rounds/002/selected")
    assert stages["rounds/002/policy"].settings["model.path"] == "runs/staged/rounds/001/policy"
    assert stages["rounds/000/samples"].subject == "runs/staged/sft"
    assert stages["rounds/001/scored"].subject == "runs/staged/rounds/001/samples.jsonl"
    assert stages["evaluation"].subject == ["sft", "rounds/002/policy"]


def test_each_round_takes_its_own_of_the_values_that_are_listed_and_the_last_serves_the_rest() -> None:
    source = changed("policy", **{"optim.learning_rate": "${rate}", "optim.weight_decay": "${drop}"})
    source["stages"]["rounds"]["each"] = {"rate": [1e-3, 5e-4], "drop": ["${half}", 0.0, 0.1]}
    given = ["prompts=x", "stages.rounds.repeat=4"]
    stages = {stage.name: stage.settings for stage in read_pipeline({**source, "half": 0.5}, given).stages}
    found = [stages[f"rounds/00{number}/policy"] for number in range(4)]
    assert [each["optim.learning_rate"] for each in found] == [1e-3, 5e-4, 5e-4, 5e-4]
    assert [each["optim.weight_decay"] for each in found] == [0.5, 0.0, 0.1, 0.1]


def changed(stage: str, **settings: Any) -> dict[str, Any]:
    block = PIPELINE["stages"]["rounds"]
    inner = {**block["stages"], stage: {**block["stages"][stage], **settings}}
    return {**PIPELINE, "stages": {**PIPELINE["stages"], "rounds": {**block, "stages": inner}}}


def block(**settings: Any) -> dict[str, Any]:
    return {**PIPELINE, "stages": {**PIPELINE["stages"], "rounds": {**PIPELINE["stages"]["rounds"], **settings}}}


@pytest.mark.parametrize(
    ("source", "override", "message"),
    [
        (block(repeat=0), None, "stage 'rounds': repeat must be a whole number from 1, got 0"),
        (block(repeat=True), None, "repeat must be a whole number from 1, got True"),
        (block(begin="x"), None, "stage 'rounds': repeat, start and stages were expected"),
        (block(stages={}), None, "repeat, start and stages were expected"),
        (block(each={"rate": 1e-3}), None, "stage 'rounds': each must name lists of values, got {'rate': 0.001}"),
        (block(each={"rate": []}), None, "each must name lists of values"),
        (block(each={"sft": [1]}), None, "each names 'sft', which is something else here"),
        (block(each={"previous": [1]}), None, "each names 'previous'"),
        (block(stages={"x": {"repeat": 2}}), None, "a repeat inside a repeat"),
        (block(stages={"a.b": {"train": "sft"}}), None, "stage 'rounds/a.b': not the name of a stage"),
        (block(stages={"previous": {"train": "sft"}}), None, "not the name of a stage"),
        (block(start="${sfd}"), None, "refers to 'sfd', which is nothing in this file\nhint: did you mean 'sft'?"),
        (
            changed("samples", temprature=1),
            None,
            "temprature is no setting of generate\nhint: did you mean 'temperature'?",
        ),
        (changed("samples", prompts=None), None, "stage rounds/000/samples: prompts is not given"),
        (changed("samples", num_samples=0), None, "stage rounds/000/samples: generate.num_samples"),
        (changed("scored", reward=None), None, "stage rounds/000/scored: reward is not given"),
        (changed("selected", kep=2), None, "stage rounds/000/selected: kep is no setting of select"),
        (changed("policy", **{"data.path": "${scord}"}), None, "refers to 'scord'"),
        (changed("samples", generate="${policy}"), None, "refers to 'policy', which is not done before it"),
        (PIPELINE, "stages.rounds.stages.sample.top_k=1", "there is no stage 'sample'\nhint: did you mean 'samples'?"),
        (PIPELINE, "stages.rounds.stages.samples=1", "names a whole stage"),
    ],
)
def test_what_cannot_be_repeated_is_refused(
    source: dict[str, Any], override: str | None, message: str, tmp_path: Path
) -> None:
    given = [f"prompts={data(tmp_path / 'data')}", *([override] if override else [])]
    with pytest.raises(ConfigError) as caught:
        plan(source, given)
    assert message in str(caught.value)
