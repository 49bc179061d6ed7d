"""Whole pipelines on a world of forty sums: models of one layer, two steps a stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fairlead
from fairlead.config_resolve import flatten
from fairlead.errors import ConfigError, DataError, FairleadError, Interrupted, RunError
from fairlead.pipeline import plan, run_pipeline
from fairlead.pipeline_file import read_pipeline
from fairlead.tracking import RunDirectory, tree_sha256

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 300, "context_length": 128}
COMMON = {
    "data.path": "${prepared}",
    "data.max_length": 64,
    "train.steps": "${steps}",
    "train.batch_size": 8,
    "train.num_samples": 0,
    "tracking.console": False,
    "threads": 1,
}
PIPELINE: dict[str, Any] = {
    "name": "sums",
    "seed": 3,
    "steps": 2,
    "data": {"path": None, "text": None},
    "stages": {
        "prepared": {"prepare": "hh-rlhf", "path": "${data.path}", "text": "${data.text}", "heldout": 0.4},
        "pretrain": {"train": {"algorithm": "pretrain"}, "model": {"scratch": TINY}, **COMMON},
        "sft": {"train": {"algorithm": "sft"}, "model.path": "${pretrain}", **COMMON},
        "reward": {"train": {"algorithm": "reward"}, "model.path": "${pretrain}", **COMMON},
        "evaluation": {
            "evaluate": ["pretrain", "sft"],
            "reference": "pretrain",
            "prompts": "${prepared}",
            "scores": {"score": "${reward}"},
            "num_prompts": 4,
            "max_new_tokens": 4,
        },
        "report": {"report": ["pretrain", "sft"], "before": "pretrain"},
    },
}
STAGES = list(PIPELINE["stages"])


def dialogue(number: int, answer: str) -> str:
    return f"\n\nHuman: What is {number} plus {number}?\n\nAssistant: {answer}"


def write_pairs(path: Path, last: int = 40) -> Path:
    rows = [
        {"chosen": dialogue(n, f"It is {2 * n}."), "rejected": dialogue(n, f"I like the number {n}.")}
        for n in range(last)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def changed(**stages: dict[str, Any] | None) -> dict[str, Any]:
    """The pipeline with some stages changed, or left out."""
    merged = {name: {**spec, **(stages.get(name) or {})} for name, spec in PIPELINE["stages"].items()}
    kept = {name: spec for name, spec in merged.items() if name not in stages or stages[name] is not None}
    new = {name: spec for name, spec in stages.items() if name not in PIPELINE["stages"] and spec is not None}
    return {**PIPELINE, "stages": {**kept, **new}}


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {name: stage["status"] for name, stage in summary["stages"].items()}


def skipping(*redone: str) -> dict[str, str]:
    return {name: "ran" if name in redone else "skipped" for name in STAGES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Folder, summary and what was said of a pipeline that ran once; its data stands beside the folder."""
    root = tmp_path_factory.mktemp("finished")
    pairs, said = write_pairs(root / "pairs.jsonl"), list[str]()
    summary = run_pipeline(PIPELINE, [f"data.path={pairs}"], folder=root / "sums", say=said.append)
    return root / "sums", summary, said


@pytest.fixture
def again(finished: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Runs a pipeline over a moved copy of the finished one and tells what became of each stage."""
    shutil.copytree(finished[0], tmp_path / "sums")
    pairs = shutil.copy(finished[0].parent / "pairs.jsonl", tmp_path / "pairs.jsonl")

    def run(*overrides: str, source: Any = PIPELINE) -> dict[str, str]:
        given = [f"data.path={pairs}", *overrides]
        return statuses(run_pipeline(source, given, folder=tmp_path / "sums", say=lambda _: None))

    return run


def refused(source: Any, *overrides: str, kind: type[FairleadError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        plan(source, overrides)
    return str(caught.value)


# --- order, references, results


def test_stages_run_in_order_each_from_the_results_of_earlier_ones(finished):
    folder, summary, said = finished
    assert statuses(summary) == dict.fromkeys(STAGES, "ran")
    assert [line.split(": ")[0] for line in said] == [
        f"[{n}/6] {name}" for n, name in enumerate(STAGES, 1) for _ in range(2)
    ]
    assert said[2] == "[2/6] pretrain: train pretrain"
    assert said[3].endswith(" s")
    recipes = {name: yaml.safe_load((folder / name / "recipe.yaml").read_text()) for name in STAGES[1:4]}
    assert {recipe["data"]["path"] for recipe in recipes.values()} == {str(folder / "prepared")}
    assert recipes["sft"]["model"]["path"] == recipes["reward"]["model"]["path"] == str(folder / "pretrain")
    assert {(recipe["seed"], recipe["train"]["steps"]) for recipe in recipes.values()} == {(3, 2)}
    assert recipes["sft"]["run"] == {"name": "sft", "directory": str(folder)}
    assert json.loads((folder / "prepared" / "manifest.json").read_text())["options"] == {
        "heldout": 0.4,
        "pretrain_on_chosen": True,
    }


def test_the_summary_holds_the_stages_and_the_metrics_of_the_models_evaluated(finished):
    folder, summary, _ = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["pipeline"], summary["status"]) == ("sums", "finished")
    assert summary["seconds"] == pytest.approx(sum(stage["seconds"] for stage in summary["stages"].values()), abs=0.01)
    assert [stage["verb"] for stage in summary["stages"].values()] == [
        "prepare", "train", "train", "train", "evaluate", "report",
    ]  # fmt: skip
    for run in ("pretrain", "sft"):
        own = json.loads((folder / run / "evaluation" / "metrics.json").read_text())
        assert summary["models"][run] == {"metrics": own["metrics"]}
        assert own["reference"] == "pretrain"
        assert own["metrics"]["score"]["n"] == 4
    assert list(summary["models"]) == ["pretrain", "sft"]
    assert "<html" in (folder / "report.html").read_text()


def test_an_adapter_is_merged_for_the_stages_after_it_and_not_twice(again, tmp_path):
    adapted = {"train": {"algorithm": "sft"}, "model": {"path": "${pretrain}", "adapter": {"rank": 2}}, **COMMON}
    source = changed(evaluation=None, report=None, reward=None, sft=adapted, merged={"merge": "${sft}"})
    source["stages"]["next"] = {"train": {"algorithm": "sft"}, "model.path": "${merged}", **COMMON}
    folder = tmp_path / "sums" / "merged"
    assert again(source=source) == {"prepared": "skipped", "pretrain": "skipped"} | dict.fromkeys(
        ("sft", "merged", "next"), "ran"
    )
    assert (folder / "merge.json").is_file()
    assert again(source=source)["merged"] == "skipped"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    (folder / ".stage.json").unlink()  # a kill between the merge and its marker
    found = again(source=source)
    assert (found["merged"], found["next"]) == ("ran", "skipped")
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert again("stages.merged.dtype=bfloat16", source=source)["next"] == "ran"


def test_a_cross_validation_stands_in_the_summary_and_is_skipped_when_done(again):
    folds = {"cross_validate": {"algorithm": "reward"}, "model.path": "${pretrain}", "folds": 2, **COMMON}
    source = changed(evaluation=None, report=None, sft=None, reward=None, folds=folds)
    assert again(source=source) == {"prepared": "skipped", "pretrain": "skipped", "folds": "ran"}
    assert again(source=source)["folds"] == "skipped"
    assert again("stages.folds.folds=3", source=source)["folds"] == "ran"


def test_plan_gives_the_resolved_settings_and_makes_nothing(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    planned = plan(PIPELINE, [f"data.path={pairs}", f"directory={tmp_path}/runs", "stages.sft.optim.eps=1e-6"])
    assert [(name, verb) for name, verb, _ in planned][2] == ("sft", "train")
    assert planned[0][2] == {"prepare": "hh-rlhf", "path": str(pairs), "text": None, "heldout": 0.4, "seed": 3}
    assert planned[2][2]["model"]["path"] == f"{tmp_path}/runs/sums/pretrain"
    assert planned[2][2]["optim"]["eps"] == 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_data_that_are_made_here_take_no_path():
    made = {"prepare": "arithmetic", "solved": 5}
    ((_, _, settings),) = plan({"seed": 4, "stages": {"prepared": made}})
    assert settings == made | {"seed": 4}
    assert "stage prepared: no setting 'path'" in refused({"stages": {"prepared": made | {"path": "sums.jsonl"}}})


# --- what is done again


def test_a_finished_pipeline_is_skipped_though_it_was_moved_and_no_file_of_its_models_is_touched(again, tmp_path):
    models = [file for name in STAGES[1:4] for file in (tmp_path / "sums" / name / "model").rglob("*")]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in models}
    assert again() == skipping()
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in models} == before
    assert "models" in json.loads((tmp_path / "sums" / "summary.json").read_text())


def test_a_changed_setting_redoes_its_stage_and_those_that_depend_on_it(again, tmp_path):
    before = tree_sha256(tmp_path / "sums" / "sft" / "model")
    assert again("stages.sft.optim.learning_rate=0.01") == skipping("sft", "evaluation", "report")
    assert tree_sha256(tmp_path / "sums" / "sft" / "model") != before
    assert again("stages.sft.optim.learning_rate=0.01") == skipping()


def test_a_stage_that_gives_the_same_result_again_does_not_redo_what_trains_on_it(again):
    # The logs of pretrain differ, its model does not; its evaluation stood in the folder that was made anew.
    assert again("stages.pretrain.train.log_every=2") == skipping("pretrain", "evaluation", "report")


def test_who_watches_a_run_is_no_change(again):
    assert again("stages.sft.tracking.project=other") == skipping()


def test_a_changed_input_file_redoes_all_and_another_name_for_it_nothing(again, tmp_path):
    other = shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "renamed.jsonl")
    assert again(f"data.path={other}") == skipping()
    write_pairs(tmp_path / "pairs.jsonl", last=39)
    assert again() == skipping(*STAGES)


def test_a_result_that_is_gone_or_damaged_is_made_again(again, tmp_path):
    (tmp_path / "sums" / "report.html").unlink()
    shutil.rmtree(tmp_path / "sums" / "reward" / "model")
    assert again() == skipping("reward", "report")
    (tmp_path / "sums" / "prepared" / "sft.jsonl").write_text("")
    assert again() == skipping("prepared")


def test_a_changed_reward_function_redoes_what_scores_with_it(again, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "some_scores.py"
    module.write_text("def length(outputs, **_):\n    return [len(text) for text in outputs]\n")
    source = changed(evaluation={"scores": {"score": "some_scores:length"}}, report=None)
    assert again(source=source)["evaluation"] == "ran"
    assert again(source=source)["evaluation"] == "skipped"
    module.write_text("def length(outputs, **_):\n    return [-len(text) for text in outputs]\n")
    assert again(source=source)["evaluation"] == "ran"


def test_a_stage_has_the_seed_of_its_own_or_that_of_the_pipeline(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    own = changed(sft={"seed": 5}, reward={"train": {"algorithm": "reward", "seed": 6}})
    seeds = {name: settings.get("seed") for name, _, settings in plan(own, [f"data.path={pairs}", "seed=4"])}
    assert seeds == {"prepared": 4, "pretrain": 4, "sft": 5, "reward": 6, "evaluation": 4, "report": None}


# --- kills, strangers, locks

KILLED = """
import json, sys
from fairlead.pipeline import run_pipeline
run_pipeline(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
"""


def test_a_stage_killed_while_training_continues_and_gives_the_model_of_an_uninterrupted_run(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    source = changed(sft={"train.save_every": 5}, reward=None, evaluation=None, report=None)
    given = [f"data.path={pairs}", "stages.sft.train.steps=40"]
    folder = tmp_path / "killed" / "sums"
    command = [sys.executable, "-c", KILLED, json.dumps(source), json.dumps([*given, f"directory={folder.parent}"])]
    environment = os.environ | {"PYTHONPATH": str(Path(fairlead.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (folder / "sft" / "checkpoints" / "step-000005").is_dir():
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "sft" / "model").exists()
    assert not (folder / "summary.json").exists()
    summary = run_pipeline(source, given, folder=folder)
    assert statuses(summary) == {"prepared": "skipped", "pretrain": "skipped", "sft": "continued"}
    run_pipeline(source, given, folder=tmp_path / "whole")
    weights = "sft/model/model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_run_that_was_finished_when_the_pipeline_was_killed_is_not_trained_again(again, tmp_path):
    run = tmp_path / "sums" / "sft"
    weights = run / "model" / "model.safetensors"

    def kill_after_training() -> None:
        marker = json.loads((run / ".stage.json").read_text())
        (run / ".stage.json").write_text(json.dumps(marker | {"output": None}))

    kill_after_training()
    assert again()["sft"] == "ran"  # the copy's recipe names paths of the original: it is no half of this run
    kill_after_training()
    before = weights.stat().st_mtime_ns
    assert again()["sft"] == "continued"
    assert weights.stat().st_mtime_ns == before


def test_a_stop_signal_leaves_an_interrupted_summary_and_names_the_stage(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    given = [f"data.path={pairs}", "stages.pretrain.train.steps=1000"]

    def stop_once_training() -> None:
        while not (tmp_path / "sums" / "pretrain" / "metrics.jsonl").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_training, daemon=True).start()
    with pytest.raises(Interrupted, match=r"stage pretrain: stopped by SIGTERM after step \d+ of 1000") as caught:
        run_pipeline(PIPELINE, given, folder=tmp_path / "sums", say=lambda _: None)
    assert caught.value.hint == "the same command continues the run"
    summary = json.loads((tmp_path / "sums" / "summary.json").read_text())
    assert (summary["status"], list(summary["stages"])) == ("interrupted", ["prepared"])


def test_what_a_kill_leaves_behind_before_a_stage_has_its_marker_is_no_stranger(again, tmp_path):
    folder = tmp_path / "sums" / "sft"
    folder.rename(tmp_path / "sums" / ".sft.removing")
    folder.mkdir()
    (folder / "..stage.json.1234.tmp").write_text("{")
    assert again() == skipping("sft", "evaluation", "report")
    assert not (tmp_path / "sums" / ".sft.removing").exists()


@pytest.mark.parametrize("name", ["sft", "evaluation"])
def test_a_folder_that_the_pipeline_did_not_make_is_refused_and_left(again, tmp_path, name):
    folder = tmp_path / "sums" / name
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=f"stage {name}: .* was not made by this pipeline"):
        again()
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_link_to_a_folder_elsewhere_is_refused_and_what_it_leads_to_left(again, tmp_path):
    folder = tmp_path / "sums" / "sft"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert again() == skipping()
    with pytest.raises(RunError, match="was not made by this pipeline"):
        again("stages.sft.seed=9")
    assert (tmp_path / "elsewhere" / "model").is_dir()


def test_data_that_the_pipeline_did_not_prepare_are_refused_and_left(again, tmp_path):
    folder = tmp_path / "sums" / "prepared"
    (folder / ".stage.json").unlink()
    assert again() == skipping("prepared")  # as after a kill: the data are whole and stay
    (folder / ".stage.json").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"stage prepared: .* holds other files: 'notes\.txt'"):
        again("stages.prepared.heldout=0.3")
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_pipeline_in_use_and_a_folder_that_holds_a_run_are_refused(again, tmp_path):
    with RunDirectory(tmp_path / "sums").lock(), pytest.raises(RunError, match="is in use by process"):
        again()
    pairs = tmp_path / "pairs.jsonl"
    with pytest.raises(RunError, match="holds a run, not a pipeline"):
        run_pipeline(PIPELINE, [f"data.path={pairs}"], folder=tmp_path / "sums" / "sft")


def test_a_stage_that_fails_is_named_its_hint_kept_and_the_summary_says_failed(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"chosen": "one", "rejected": "two"}\n')
    with pytest.raises(DataError, match=r"stage prepared: nothing of .* can be used") as caught:
        run_pipeline(PIPELINE, [f"data.path={pairs}"], folder=tmp_path / "sums", say=lambda _: None)
    assert caught.value.hint == "is this really hh-rlhf data?"
    assert json.loads((tmp_path / "sums" / "summary.json").read_text())["status"] == "failed"


# --- what is refused before anything runs


def test_a_typo_in_a_late_stage_fails_before_anything_ran(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    given = [f"data.path={pairs}"]
    for source, message in (
        (changed(prepared={"heldouts": 0.4}), "stage prepared: hh-rlhf has no option 'heldouts'\nhint: .*heldout"),
        (changed(prepared={"prepare": "hh"}), "stage prepared: unknown kind of data 'hh'"),
        (changed(reward={"optim.learning_rat": 1e-3}), "stage reward: unknown key 'optim.learning_rat'"),
        (changed(evaluation={"num_promts": 2}), "stage evaluation: no setting 'num_promts'\nhint: .*num_prompts"),
        (changed(reward={"data.eval_path": "missing.jsonl"}), r"stage reward: missing\.jsonl does not exist"),
        (changed(reward={"data.path": None}), "stage reward: data.path is not given"),
        (changed(pretrain={"model": {}}), "stage pretrain: model.path is not given"),
        (changed(reward={"run.name": "mine"}), "stage 'reward': the run bears the stage's name"),
    ):
        with pytest.raises(FairleadError, match=message):
            run_pipeline(source, given, folder=tmp_path / "sums")
        assert not (tmp_path / "sums").exists()


def test_data_that_were_not_given_are_asked_for_by_the_key_to_give():
    said = refused(PIPELINE)
    assert "stage 'prepared' needs data.path, which is not given" in said
    assert "hint: add data.path=FILE to the command" in said
    said = refused({**PIPELINE, "stages": {"prepared": {"prepare": "hh-rlhf"}}})
    assert "stage prepared: path is not given" in said


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("${pretrian}", "refers to 'pretrian', which is nothing in this file\nhint: did you mean 'pretrain'?"),
        ("${data.pth}", "refers to 'data.pth', which is nothing in this file\nhint: did you mean 'data.path'?"),
        ("${reward}", "refers to 'reward', which is not done before it"),
        ("${sft}", "refers to 'sft', which is not done before it"),
        ("${loop.a}", "loop.a -> loop.b -> loop.a refers to itself"),
        ("${loop}/model", "loop -> loop.b -> loop.a -> loop.b refers to itself"),
        ("${data}/model", "data is no single value"),
        ("${data.text}/model", "needs data.text, which is not given"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused(reference, message):
    source = changed(sft={"model.path": reference}) | {"loop": {"a": "${loop.b}", "b": "${loop.a}"}}
    assert message in refused(source, "data.path=x")


def test_a_reference_keeps_the_type_of_a_value_and_may_stand_inside_a_text(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    source = {
        "name": "sums",
        "data": {"folder": str(tmp_path), "path": "${data.folder}/pairs.jsonl"},
        "limits": {"steps": 7, "rate": 0.5},
        "stages": {
            "prepared": {"prepare": "hh-rlhf", "path": "${data.path}"},
            "sft": {
                "train": "sft",
                "data.path": "${prepared}/sft.jsonl",
                "train.steps": "${limits.steps}",
                "optim.learning_rate": "${limits.rate}",
            },
        },
    }
    stages = read_pipeline(source).stages
    assert stages[0].settings == {"path": str(pairs)}
    assert stages[1].settings["train.steps"] == 7
    assert stages[1].settings["optim.learning_rate"] == 0.5
    assert stages[1].settings["data.path"] == "runs/sums/prepared/sft.jsonl"
    assert stages[1].upstream == ("prepared",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.pth=x", "no value 'data.pth'\nhint: did you mean 'data.path'?"),
        ("sft.optim.eps=1", "no value 'sft.optim.eps'\nhint: write stages.sft.optim.eps=value"),
        ("stages.sfd.seed=1", "there is no stage 'sfd'\nhint: did you mean 'sft'?"),
        ("stages.sft=1", "stages.sft names a whole stage"),
        ("stages=1", "no value 'stages'"),
        ("stages.sft.optim.epz=1", "unknown key 'optim.epz'"),
        ("seed=-1", "seed must be a whole number from 0, got -1"),
        ("name=../x", "name='../x' cannot be a folder's name"),
    ],
)
def test_an_override_that_the_file_does_not_know_is_refused(tmp_path, override, message):
    assert message in refused(PIPELINE, f"data.path={write_pairs(tmp_path / 'pairs.jsonl')}", override)


def test_an_override_wins_over_a_setting_however_the_file_spells_it():
    source = changed(sft={"optim": {"eps": 1e-7}, "optim.name": "sgd"})
    given = ["data.path=x", "stages.sft.optim.eps=1e-5", "stages.sft.optim.name=adam", "stages.pretrain.model.path=m"]
    stages = {stage.name: stage.settings for stage in read_pipeline(source, given).stages}
    assert (stages["sft"]["optim.eps"], stages["sft"]["optim.name"]) == (1e-5, "adam")
    assert stages["pretrain"]["model.path"] == "m"
    assert stages["pretrain"]["model.scratch.hidden_size"] == 16


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"trian": "sft"}, "stage 'x' has no verb; its first key is 'trian'\nhint: did you mean 'train'?"),
        ({"train": "sft", "report": []}, "stage 'x' has two verbs: train and report"),
        ({}, "stage 'x' has no verb"),
        ("sft", "stage 'x': a mapping was expected, got 'sft'"),
        ({"evaluate": ["sfd"]}, "stage 'x': 'sfd' is no earlier train stage\nhint: did you mean 'sft'?"),
        ({"evaluate": ["prepared"]}, "stage 'x': 'prepared' is no earlier train stage"),
        ({"evaluate": []}, "stage 'x': [] is no earlier train stage"),
        ({"evaluate": ["sft"], "reference": "sfd"}, "reference='sfd' is none of the runs\nhint: did you mean 'sft'?"),
        ({"report": ["sft"], "before": "pretrain"}, "before='pretrain' is none of the runs"),
        ({"train": "sftt"}, "stage x: no recipe 'sftt'"),
    ],
)
def test_a_stage_that_cannot_be_understood_is_refused(tmp_path, stage, message):
    source = {**PIPELINE, "stages": {**PIPELINE["stages"], "x": stage}}
    assert message in refused(source, f"data.path={write_pairs(tmp_path / 'pairs.jsonl')}")


@pytest.mark.parametrize("name", ["data", "../x", "a.b", ".x", "", "seed", 3])
def test_a_stage_bears_a_name_that_can_be_a_folder_and_is_no_section(name):
    assert "not the name of a stage" in refused({**PIPELINE, "stages": {name: {"train": "sft"}}})


def test_a_file_is_read_with_its_lines_and_gives_the_pipeline_its_name(tmp_path):
    path = tmp_path / "forty-sums.yaml"
    path.write_text(yaml.safe_dump({name: PIPELINE[name] for name in ("data", "stages", "steps")}, sort_keys=False))
    pipeline = read_pipeline(path, ["data.path=x"])
    assert (pipeline.name, pipeline.folder) == ("forty-sums", Path("runs/forty-sums"))
    assert read_pipeline(path, {"data.path": Path("x"), "name": "other", "directory": tmp_path}).folder == (
        tmp_path / "other"
    )
    line = 1 + path.read_text().splitlines().index("  prepared:")
    assert f"{path}:{line}, stage 'prepared' needs data.path" in refused(path)
    path.write_text("name: empty\n")
    assert "a pipeline needs stages" in refused(path)
    assert "no pipeline 'no-such-file'" in refused("no-such-file")


def test_the_pipeline_that_ran_is_kept_and_can_be_run_again(finished, tmp_path):
    folder = finished[0]
    kept = yaml.safe_load((folder / "pipeline.yaml").read_text())
    assert flatten(kept) == flatten(PIPELINE) | {"data.path": str(folder.parent / "pairs.jsonl")}
    assert statuses(run_pipeline(folder / "pipeline.yaml", folder=folder, say=lambda _: None)) == skipping()
