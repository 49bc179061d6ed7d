"""What a sweep does with its trials, which here only pretend to train."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend, JournalStorage
from tests.sweep.conftest import SPACE, Files

from fairlead.errors import ConfigError, Interrupted, RunError, Terminated, TrainingError
from fairlead.sweep import run as run_module
from fairlead.sweep import sweep
from fairlead.sweep import trial as trial_module

END = run_module._end
Stub = Callable[..., None]


def quietly(*arguments: Any, **options: Any) -> dict[str, Any]:
    return sweep(*arguments, **options, say=lambda _: None)


def column(result: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in result["trials"]]


def starts(folder: Path) -> list[int]:
    """The trials for which a process was begun, in order."""
    return list(map(int, (folder / "trials" / "starts.txt").read_text().split()))


def test_a_sweep_says_of_each_trial_what_it_tried_and_how_it_ended(files: Files, tmp_path: Path, stub: Stub) -> None:
    said: list[str] = []
    stub(fail=[1], alarm=[2])
    result = sweep(*files(), say=said.append)
    assert column(result, "number") == [0, 1, 2, 3]
    assert column(result, "state") == ["finished", "failed", "finished", "finished"]
    assert column(result, "run") == ["trials/000", "trials/001", "trials/002", "trials/003"]
    assert [each["optim.schedule"] in ("cosine", "linear") for each in column(result, "parameters")] == [True] * 4
    assert column(result, "seconds")[::2] == [1.5, 1.5]
    messages = column(result, "message")
    assert messages[1].startswith("<b>step 3</b>: no hint: {'optim.learning_rate': ")
    assert messages[::2] == ["", "alarm: length"]
    best = min((row for row in result["trials"] if row["state"] == "finished"), key=lambda row: row["value"])
    assert result["best"] == best
    assert result == json.loads((tmp_path / "sft-sweep" / "sweep.json").read_text())
    assert any(line.startswith("trial 1: failed, ") and "<b>step 3</b>: no" in line for line in said)


def test_a_finished_sweep_runs_nothing_again_and_more_trials_may_be_asked_for(files: Files, stub: Stub) -> None:
    recipe, space = files()
    first = quietly(recipe, space)
    folder = Path(first["folder"])
    assert quietly(recipe, space) == first
    assert starts(folder) == [0, 1, 2, 3]
    files(trials=6)
    more = quietly(recipe, space)
    assert more["trials"][:4] == first["trials"]
    assert starts(folder) == [0, 1, 2, 3, 4, 5]
    assert quietly(*files(trials=2))["trials"] == more["trials"]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_seed_gives_one_sweep_also_where_it_was_continued(
    files: Files, tmp_path: Path, stub: Stub, sampler: str
) -> None:
    """TPE learns from the eleventh trial on."""
    stub(steps=1)
    most = 13 if sampler == "tpe" else 4
    recipe, space = files(sampler=sampler, trials=most)
    whole = quietly(recipe, space, out=tmp_path / "whole")["trials"]
    for trials in (2, most - 1, most):
        files(sampler=sampler, trials=trials)
        parts = quietly(recipe, space, out=tmp_path / "parts")["trials"]
        assert parts == whole[:trials]
    files(sampler=sampler, trials=2, seed=1)
    other = quietly(recipe, space, out=tmp_path / "other")["trials"]
    assert all(a["parameters"] != b["parameters"] for a, b in zip(whole, other, strict=False))
    rates = [row["parameters"]["optim.learning_rate"] for row in whole]
    assert len(set(rates)) == most and all(1e-5 <= rate <= 1e-1 for rate in rates)


def test_a_grid_tries_every_combination(files: Files, stub: Stub) -> None:
    space = {"optim.learning_rate": {"choice": [1e-3, 1e-2]}, "optim.betas": {"choice": [[0.9, 0.95], [0.9, 0.99]]}}
    result = quietly(*files(sampler="grid", trials=None, space=space))
    tried = [tuple(each.values()) for each in column(result, "parameters")]
    assert tried == [(1e-3, [0.9, 0.95]), (1e-3, [0.9, 0.99]), (1e-2, [0.9, 0.95]), (1e-2, [0.9, 0.99])]
    assert column(result, "value") == pytest.approx([1 / 3, 1 / 3, 4 / 3, 4 / 3])
    assert result["best"]["number"] == 0


@pytest.mark.parametrize(("read", "value"), [("last", 1 / 8), ("mean", (1 / 7 + 1 / 8) / 2), ("best", 1 / 8)])
def test_how_a_metric_is_read(files: Files, stub: Stub, read: str, value: float) -> None:
    """The curve is 1/(1+step) above its end, which is 0 at a rate of 1e-3."""
    stub(steps=8)
    given = {"read": read, "trials": 1, "space": {"optim.learning_rate": {"choice": [1e-3]}}}
    assert column(quietly(*files(**given)), "value") == [pytest.approx(value)]
    if read == "best":
        recipe, space = files(**given, goal="max")
        upwards = quietly(recipe, space, out=space.parent / "upwards")
        assert column(upwards, "value") == [1.0]


def test_a_value_that_is_no_number_is_a_failure(files: Files, stub: Stub) -> None:
    stub(nan=[1])
    result = quietly(*files())
    assert (column(result, "state")[1], column(result, "message")[1]) == ("failed", "eval/loss is not finite")


def test_a_metric_that_no_run_logs_ends_the_sweep_with_the_nearest_one(files: Files, stub: Stub) -> None:
    said: list[str] = []
    recipe, space = files(metric="eval/los")
    with pytest.raises(ConfigError, match=r"has no metric 'eval/los'\nhint: did you mean 'eval/loss'\?"):
        sweep(recipe, space, say=said.append)
    assert starts(space.parent / "sft-sweep") == [0]
    stub(slow={"000": 0.1})
    with pytest.raises(ConfigError):
        sweep(recipe, space, out=space.parent / "slow", say=said.append)
    assert "000/metrics.jsonl has no metric 'eval/los' yet; did you mean 'eval/loss'?" in said[-1]


@pytest.mark.parametrize(
    ("fail", "most", "message"),
    [
        ([0, 1, 2], 5, r"the first 3 trials have failed\nhint: each said why in .*trials/NUMBER.log"),
        ([1, 2, 3, 4], 4, "the last 4 trials have failed"),
        ([2], 1, "the last trial has failed"),
    ],
)
def test_trials_that_only_fail_end_the_sweep_and_the_same_command_goes_on(
    files: Files, stub: Stub, fail: list[int], most: int, message: str
) -> None:
    recipe, space = files(trials=7, max_failures=most)
    stub(fail=fail)
    with pytest.raises(TrainingError, match=message):
        quietly(recipe, space)
    assert starts(space.parent / "sft-sweep")[-1] == fail[-1]
    stub()
    states = column(quietly(recipe, space), "state")
    assert states == ["failed" if number in fail else "finished" for number in range(7)]


def test_fewer_failures_do_not(files: Files, stub: Stub) -> None:
    stub(fail=[0, 1, 3, 4])
    assert column(quietly(*files(trials=6, max_failures=3)), "state").count("failed") == 4


RATES = [1e-3, 1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 1e-1, 1.05e-3]
"""The curve of the sixth lies two above that of the others at every step."""
PRUNED = {
    "pruner": "median",
    "sampler": "grid",
    "trials": None,
    "space": {"optim.learning_rate": {"choice": RATES}},
}


def test_a_hopeless_trial_is_stopped_and_keeps_the_value_it_had(files: Files, stub: Stub) -> None:
    stub(steps=30, slow={"005": 0.1})
    result = quietly(*files(**PRUNED))
    assert column(result, "state") == ["finished"] * 5 + ["pruned", "finished"]
    assert column(result, "value")[5] == 3.0
    storage = JournalStorage(JournalFileBackend(f"{result['folder']}/journal.log"))
    known = [list(trial.intermediate_values) for trial in optuna.load_study(study_name="sweep", storage=storage).trials]
    assert known == [[*range(30)]] * 5 + [[0]] + [[*range(30)]]
    run = Path(result["folder"]) / "trials" / "005"
    assert (run / "metrics.jsonl").read_text().count("\n") < 30 and not (run / "model").exists()


def test_a_trial_given_up_before_a_kill_stays_given_up(
    files: Files, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(steps=30, slow={"005": 0.1})
    recipe, space = files(**PRUNED)
    with monkeypatch.context() as killed:
        killed.setattr(
            "fairlead.sweep.run._end", lambda plan, study, taken, *rest: killed_at(5, plan, study, taken, *rest)
        )
        with pytest.raises(OSError, match="killed"):
            quietly(recipe, space)
    folder = space.parent / "sft-sweep"
    assert column(json.loads((folder / "sweep.json").read_text()), "state")[5] == "unfinished"
    result = quietly(recipe, space)
    assert column(result, "state") == ["finished"] * 5 + ["pruned", "finished"]
    assert column(result, "value")[5] == 3.0
    assert starts(folder) == [0, 1, 2, 3, 4, 5, 6]


def killed_at(number: int, plan: Any, study: Any, taken: Any, *rest: Any) -> bool:
    if taken.number == number:
        raise OSError("killed")
    return END(plan, study, taken, *rest)


# --- stopped, killed, shared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, Interrupted)])
def test_a_signal_stops_the_trials_cleanly_and_the_same_command_continues_them(
    files: Files, tmp_path: Path, stub: Stub, number: signal.Signals, error: type[Interrupted]
) -> None:
    recipe, space = files(trials=3)
    folder = tmp_path / "sft-sweep"
    stub(steps=10)
    whole = quietly(recipe, space, out=tmp_path / "whole")["trials"]
    stub(steps=10, slow={"000": 0.2, "001": 0.2})

    def signal_when_two_are_at_work() -> None:
        while not all((folder / "trials" / f"00{n}" / "metrics.jsonl").exists() for n in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=signal_when_two_are_at_work)
    thread.start()
    with pytest.raises(error, match=r"stopped by SIG.*\nhint: the same command continues the sweep") as caught:
        quietly(recipe, space, jobs=2)
    thread.join()
    assert type(caught.value) is error
    states = column(json.loads((folder / "sweep.json").read_text()), "state")
    assert states == ["unfinished", "unfinished"]
    logged = [(folder / "trials" / f"00{n}" / "metrics.jsonl").read_text().count("\n") for n in (0, 1)]
    assert all(0 < lines < 10 for lines in logged)
    stub(steps=10)
    assert quietly(recipe, space)["trials"] == whole
    assert starts(folder) in ([0, 1, 0, 1, 2], [1, 0, 0, 1, 2])


def test_a_trial_that_a_killed_sweep_left_at_work_is_waited_for(files: Files, tmp_path: Path, stub: Stub) -> None:
    recipe, space = files(trials=2)
    stub(fail=[0, 1])
    quietly(recipe, space)
    folder = tmp_path / "sft-sweep"
    files(trials=3)
    run = folder / "trials" / "002"
    run.mkdir()
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        release = threading.Timer(0.5, lock.close)
        release.start()
        began = time.monotonic()
        stub()
        assert column(quietly(recipe, space), "state")[2] == "finished"
        assert time.monotonic() - began > 0.45


def test_several_trials_run_side_by_side_with_their_share_of_the_cores(
    files: Files, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    plain = trial_module.Trial.__init__

    def noted(self: Any, *arguments: Any) -> None:
        threads.append(arguments[-1])
        plain(self, *arguments)

    monkeypatch.setattr(trial_module.Trial, "__init__", noted)
    monkeypatch.setattr("fairlead.sweep.run.cores", lambda: 8)
    stub(slow=dict.fromkeys(("000", "001", "002", "003"), 0.1))
    recipe, space = files()
    said: list[str] = []
    for jobs in (1, 4):
        sweep(recipe, space, jobs=jobs, out=space.parent / f"of-{jobs}", say=said.append)
    assert [": optim" in line for line in said] == [True, False] * 4 + [True] * 4 + [False] * 4
    assert threads == [8] * 4 + [2] * 4


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "space", "told"),
    [
        ({"train.steps": 5}, {}, ["recipe.train.steps: 4 before, 5 now"]),
        ({}, {"space": dict(reversed(SPACE["space"].items()))}, ['keys in order: ["optim.learning_rate", "optim.sch']),
        (
            {},
            {"metric": "loss", "seed": 2},
            ['space.metric: "eval/loss" before, "loss" now', "space.seed: 0 before, 2"],
        ),
        (
            {},
            {"space": {"optim.learning_rate": {"uniform": [1e-5, 1e-1]}}},
            ["space.space.optim.learning_rate.uniform: not there before, [1e-05, 0.1] now", "optim.schedule.choice"],
        ),
    ],
)
def test_another_recipe_or_space_is_refused_with_what_differs(
    files: Files, stub: Stub, recipe: dict[str, Any], space: dict[str, Any], told: list[str]
) -> None:
    before = quietly(*files(trials=1))
    with pytest.raises(RunError, match="holds a sweep of another recipe or space") as caught:
        quietly(*files(recipe=recipe, **space))
    assert [text for text in told if text not in str(caught.value)] == []
    assert "trials and max_failures may be changed" in str(caught.value)
    assert "trials: 1" not in str(caught.value)
    assert starts(Path(before["folder"])) == [0]


def test_a_setting_of_the_command_line_belongs_to_the_recipe(files: Files, stub: Stub) -> None:
    recipe, space = files(trials=1)
    folder = Path(quietly(recipe, space, ["train.steps=9"])["folder"])
    assert yaml.safe_load((folder / "base.yaml").read_text())["train"]["steps"] == 9
    with pytest.raises(RunError, match=r"recipe.train.steps: 9 before, 4 now"):
        quietly(recipe, space)


def test_a_folder_with_other_files_is_no_sweeps(files: Files, tmp_path: Path, stub: Stub) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"holds files that are no sweep: thesis\.tex"):
        quietly(*files(), out=tmp_path / "taken")
    assert [each.name for each in (tmp_path / "taken").iterdir() if each.is_file() and each.name[0] != "."] == [
        "thesis.tex"
    ]


def test_without_optuna_it_is_said_what_to_install(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "fairlead.sweep.study", raising=False)
    with pytest.raises(
        ConfigError, match=r"needs optuna, which is not installed\nhint: pip install 'fairlead\[sweep\]'"
    ):
        quietly(*files())
    assert not (tmp_path / "sft-sweep").exists()


def test_a_line_of_the_journal_that_was_cut_is_taken_away(files: Files, stub: Stub) -> None:
    recipe, space = files(trials=1)
    folder = Path(quietly(recipe, space)["folder"])
    with (folder / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "stu')
    files(trials=2)
    assert column(quietly(recipe, space), "state") == ["finished"] * 2
