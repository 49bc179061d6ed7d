"""A sweep of real runs, killed in the middle of one and then gone on with by two processes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.chaos.left import differing, left_behind
from tests.sweep.conftest import Files

from fairlead.errors import RunError
from fairlead.sweep import sweep
from fairlead.sweep.plan import hold


def started(recipe: str, space: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fairlead", "sweep", recipe, str(space), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


def test_a_killed_sweep_is_gone_on_with_by_two_processes_each_trial_trained_once(files: Files, tmp_path: Path) -> None:
    rates = [1e-3, 3e-3, 1e30]
    space = {"optim.learning_rate": {"choice": rates}}
    changes = {"train.steps": 60, "train.save_every": 2, "train.num_samples": 0}
    recipe, space = files(recipe=changes, sampler="grid", trials=None, space=space)
    folder = tmp_path / "sft-sweep"
    runs = [folder / "trials" / f"00{number}" for number in range(3)]

    killed = started(recipe, space)
    wait_until(lambda: (runs[1] / "checkpoints" / "step-000004").is_dir(), killed)
    killed.kill()
    os.kill(int((runs[1] / ".lock").read_text().split()[0]), signal.SIGKILL)
    killed.communicate()
    whole = left_behind(runs[0])
    assert {"summary.json", "model/model.safetensors"} <= whole.keys() and not (runs[1] / "summary.json").exists()

    other = started(recipe, space)
    claim = folder / "trials" / ".001.lock"
    wait_until(lambda: (held := hold(claim)) is None or held.close() is not None, other)
    said: list[str] = []
    result = sweep(recipe, space, say=said.append)
    out, err = other.communicate(timeout=60)
    assert other.returncode == 0, err
    assert json.loads(out)["trials"] == result["trials"]
    assert [line.split(":")[0] for line in err.splitlines() if ": optim" in line] == ["trial 1"]
    assert [line.split(":")[0] for line in said if ": optim" in line] == ["trial 2"]

    assert differing(left_behind(runs[0]), whole) == []
    assert [row["state"] for row in result["trials"]] == ["finished", "finished", "failed"]
    assert [row["parameters"]["optim.learning_rate"] for row in result["trials"]] == rates
    assert "the gradient's norm is" in result["trials"][2]["message"]
    logs = [run.with_suffix(".log").read_text() for run in runs]
    assert [log.count("finished after 60 steps") for log in logs] == [1, 1, 0]
    assert "continuing" not in logs[0] and f"continuing {runs[1]} after step" in logs[1]
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs[:2]]
    assert [[row["step"] for row in each] for each in rows] == [[*range(61)]] * 2
    for row, logged in zip(result["trials"], rows, strict=False):
        assert row["value"] == logged[-1]["eval/loss"]
    assert result["best"]["value"] == min(row["value"] for row in result["trials"][:2])
    with pytest.raises(RunError, match=r"recipe\.train\.steps: 60 before, 61 now"):
        sweep(recipe, space, ["train.steps=61"])
