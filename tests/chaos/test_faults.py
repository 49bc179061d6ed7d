"""A full disk, a read-only folder, torn files, a clock that jumps, signals, another number of threads."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.chaos.kills import base_model, start
from tests.chaos.left import differing, left_behind
from tests.chaos.runs import furnish, recipe
from tests.chaos.watch import Aim

import fairlead
from fairlead.cli import main
from fairlead.continuation import resume
from fairlead.errors import FairleadError, RunError
from fairlead.pipeline_file import nest


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of RAFT of two rounds was trained."""
    folder = tmp_path_factory.mktemp("whole")
    place, base = folder / "place", base_model(folder)  # what that imports, forks need not
    furnish(place, "raft", base)
    assert start("raft", place, None) is None
    return place


@pytest.fixture
def whole(uninterrupted: Path) -> dict[str, bytes]:
    """What it leaves."""
    return left_behind(uninterrupted / "runs" / "raft")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    furnish(tmp_path / "place", "raft", tmp_path)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def train(**more: Any) -> Path:
    return fairlead.train({"algorithm": "raft"}, recipe("raft") | more).path


@pytest.fixture
def disk(place: Path) -> Iterator[Callable[[str], None]]:
    """``runs`` as a disk of its own; called with the options to mount it with anew."""
    target = place / "runs"
    target.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", target], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")

    mount("size=16k")
    yield mount
    subprocess.run(["umount", "-l", target], check=True)


def test_wherever_the_disk_becomes_full_the_same_command_continues_with_more_room(
    place: Path, disk: Callable[[str], None], whole: dict[str, bytes]
) -> None:
    said: list[str] = []
    for kilobytes in range(16, 2000, 40):
        disk(f"remount,size={kilobytes}k")
        try:
            train()
            break
        except FairleadError as error:
            said.append(str(error))
            assert "No space left" in said[-1] and "hint: " in said[-1]
    assert differing(left_behind(place / "runs" / "raft"), whole) == []
    places = {each.partition(":")[0] for each in said}
    assert len(places) >= 3, places  # of samples, rounds, checkpoints and the model, whichever the sizes meet


def test_files_that_cannot_be_written_to_their_end_are_a_full_disk_too(place: Path, whole: dict[str, bytes]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1 << 12, 1 << 14, 1 << 15):  # bytes of a file: the weights are 34 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(FairleadError, match=r"(?s)File too large.*hint: "):
                train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train()
    assert differing(left_behind(place / "runs" / "raft"), whole) == []


def test_a_read_only_folder_is_named_before_and_in_the_middle_of_a_run(
    place: Path, disk: Callable[[str], None], whole: dict[str, bytes]
) -> None:
    disk("remount,ro")
    with pytest.raises(RunError, match=r"cannot create runs/raft: Read-only file system\nhint: "):
        train()
    disk("remount,rw,size=2m")
    assert start("raft", place, Aim("pruning", 1, None)) == "pruning"
    disk("remount,ro")
    with pytest.raises(RunError, match=r"cannot lock runs/raft/.lock: Read-only file system\nhint: "):
        train()
    disk("remount,rw")
    train()
    assert differing(left_behind(place / "runs" / "raft"), whole) == []


def test_a_run_killed_before_its_first_step_is_not_measured_again(place: Path, whole: dict[str, bytes]) -> None:
    assert start("raft", place, Aim("pruning", 1, None)) == "pruning"
    assert [path.name for path in (place / "runs" / "raft" / "checkpoints").iterdir()] == ["step-000000"]
    train()
    assert differing(left_behind(place / "runs" / "raft"), whole) == []


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_torn_files_are_passed_over_or_made_anew(
    place: Path, uninterrupted: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "runs" / "raft"
    in_all = json.loads((uninterrupted / "events.json").read_text())["scoring"]
    assert start("raft", place, Aim("scoring", in_all // 2 + 1, None)) == "scoring"  # the second round is sampled
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    cut(run / "checkpoints" / steps[-1] / "model.safetensors")
    chunks = list(run.glob("rounds/001/chunk-*.json"))
    assert len(chunks) == 3
    for chunk in chunks:
        cut(chunk)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "lo')
    train()
    assert (
        f"{steps[-1]}/model.safetensors does not match its checksum; the checkpoint before it is used"
        in capsys.readouterr().err
    )
    assert differing(left_behind(run), whole) == []


def test_a_clock_that_jumps_changes_nothing(
    place: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the time of day; what is measured, and when a checkpoint is due, goes by a clock that does not jump."""
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (-1) ** calls[0] * 86400 * 365

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        train()
    assert differing(left_behind(place / "runs" / "raft"), whole) == []
    rows = [json.loads(line) for line in (place / "runs" / "raft" / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] < 3600
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        path = train(**{"run.name": "by-time", "train.save_every": "1h", "train.eval_every": None})
    assert [each.name for each in (path / "checkpoints").iterdir() if each.name != "step-000000"] == ["step-000006"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_at_the_next_step_and_the_exit_code_says_which_it_was(
    place: Path, whole: dict[str, bytes], number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump(nest({"algorithm": "raft", **recipe("raft")})))
    run = place / "runs" / "raft"

    def command() -> None:
        sys.argv = ["fairlead", "train", "recipe.yaml"]
        with open("stderr.txt", "w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w")  # not the one that pytest reads
        main()

    process = multiprocessing.get_context("fork").Process(target=command)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    while not (run / "rounds" / "000" / "round.json").exists():
        assert process.is_alive()
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(120)
    said = (place / "stderr.txt").read_text()
    assert process.exitcode == code, said
    assert f"error: stopped by {number.name} after step" in said and "Traceback" not in said
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert list(run.glob("checkpoints/step-00000[1-5]/manifest.json"))
    train()
    assert differing(left_behind(run), whole) == []


def test_a_run_goes_on_with_the_threads_it_began_with_and_says_so(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, threads = train(threads=None), torch.get_num_threads()
    before = left_behind(path)
    assert json.loads((path / "manifest.json").read_text())["hardware"]["threads"] == threads
    torch.set_num_threads(threads + 1)
    try:
        resume(path, ["at=4"])
    finally:
        torch.set_num_threads(threads)
    assert f"was begun with {threads} CPU threads and goes on with as many; this process had {threads + 1}" in (
        capsys.readouterr().err
    )
    assert differing(left_behind(path), before) == []
