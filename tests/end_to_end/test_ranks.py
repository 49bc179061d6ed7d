"""Runs on several ranks: the files of one run, the numbers of one process, and a killed rank."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.end_to_end.rows import ONLINE, ROWS, SCRATCH, brevity, settings
from tests.ranks import ended, started

import fairlead

MORE = {"model.scratch": SCRATCH, "train.micro_batch_tokens": 96, "train.timeout": "60s", "train.save_every": 1}
MORE |= {"train.keep_checkpoints": 9, "train.eval_every": 2}


def run(algorithm: str, folder: Path, **more: Any) -> Callable[[], dict[str, Any]]:
    def train() -> dict[str, Any]:
        given = settings(algorithm, folder, **{**MORE, **more})
        reward = brevity if algorithm in ONLINE else None
        return fairlead.train({"algorithm": algorithm}, given, data=ROWS[algorithm], reward=reward).summary

    return train


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and not k.startswith("performance/")} for row in lines]


def files(run: Path) -> dict[str, bytes]:
    """All a run leaves, times aside."""
    last = max((run / "checkpoints").iterdir())
    found = {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    found["metrics"] = json.dumps(rows(run)).encode()
    paths = [*(run / "rounds").rglob("*.*"), *run.glob("samples.jsonl")]
    return found | {str(path.relative_to(run)): path.read_bytes() for path in sorted(paths)}


@pytest.mark.parametrize("algorithm", ["kto", "ppo"])
def test_two_ranks_make_the_run_of_one_process(algorithm: str, tmp_path: Path) -> None:
    more = {"model.dtype": "float64"}
    (alone,) = started(1, tmp_path / "fork", run(algorithm, tmp_path / "one", **more))
    first, second = started(2, tmp_path / "forks", run(algorithm, tmp_path / "two", **more))
    one, two = tmp_path / "one" / algorithm, tmp_path / "two" / algorithm
    assert first["status"] == second["status"] == "finished" and first["tokens"] == second["tokens"] == alone["tokens"]
    for got, wanted in zip(rows(two), rows(one), strict=True):
        assert got == pytest.approx(wanted, rel=1e-7, abs=1e-9, nan_ok=True)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    weights, wanted = (load_file(path / "model" / "model.safetensors") for path in (two, one))
    assert max(float((weights[name] - wanted[name]).abs().max()) for name in wanted) < 1e-7
    for name in ("samples.jsonl", "rounds/000/samples.jsonl", "rounds/001/scored.jsonl"):
        if (one / name).exists():
            assert (two / name).read_text() == (one / name).read_text()


@pytest.mark.parametrize(("algorithm", "victim"), [("dpo", 1), ("ppo", 0)])
def test_a_killed_rank_stops_the_other_and_the_same_command_ends_with_the_same_bytes(
    algorithm: str, victim: int, tmp_path: Path
) -> None:
    started(2, tmp_path / "forks", run(algorithm, tmp_path / "whole"))
    killed = tmp_path / "killed" / algorithm
    pids = started(2, tmp_path / "first", run(algorithm, tmp_path / "killed"), wait=False)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-000002" / "manifest.json").exists():
        assert time.monotonic() < deadline, "the second step never came"
        time.sleep(0.002)
    os.kill(pids[victim], signal.SIGKILL)
    found = ended(pids, tmp_path / "first")
    assert found[victim] == -signal.SIGKILL
    said = (
        rf"RanksError: rank {victim}( \(process \d+ on .*\) in step \d)? died: no word of why\nhint: the same command"
    )
    assert re.match(said, found[1 - victim]), found
    started(2, tmp_path / "second", run(algorithm, tmp_path / "killed"))
    whole, again = files(tmp_path / "whole" / algorithm), files(killed)
    assert whole.keys() == again.keys()
    assert [name for name in whole if whole[name] != again[name]] == []


def test_another_number_of_ranks_continues_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sft"
    (alone,) = started(1, tmp_path / "fork", run("sft", tmp_path))
    for step in (3, 4):
        for file in (path / "checkpoints" / f"step-00000{step}").iterdir():
            file.unlink()
    (path / "summary.json").unlink()
    first, _ = started(2, tmp_path / "forks", run("sft", tmp_path))
    assert "so far on 1 rank, from here on 2: the continued run differs" in capfd.readouterr().err
    assert first["steps"] == 4
    assert first["metrics"]["loss"]["mean"] == pytest.approx(alone["metrics"]["loss"]["mean"], rel=1e-5)
