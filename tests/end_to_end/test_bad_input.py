"""A user's mistake ends in one message, an exit code of its own and nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.end_to_end.rows import PAIRS, ROWS, SCRATCH, settings, write

import fairlead
from fairlead.cli import main
from fairlead.errors import CheckpointError
from fairlead.pipeline_file import nest
from fairlead.training import checkpoint, stored

RUN = {"data.eval_fraction": 0.0, "train.save_every": 1, "train.keep_checkpoints": 9}
NOT_UTF_8 = json.dumps(ROWS["sft"][0]).encode() + b'\n{"prompt": "caf\xe9", "response": "x"}\n'


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def fairlead_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process, with its exit code and what it printed."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["fairlead", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return call


def recipe(folder: Path, algorithm: str = "sft", **more: Any) -> Path:
    """A recipe file of a tiny run in ``folder/runs``."""
    given = settings(algorithm, folder / "runs", **{"model.scratch": SCRATCH, **more})
    path = folder / f"{algorithm}.yaml"
    path.write_text(yaml.safe_dump(nest({"algorithm": algorithm, **given}), sort_keys=False), "utf-8")
    return path


def put(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return name


def explained(done: Done, code: int, *words: str) -> None:
    """One error of exit code ``code`` that holds all ``words``; stdout, which is data, is empty."""
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.code == code, done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert done.stdout == ""


def half_written(folder: Path) -> list[str]:
    """Temporary files and folders, and models that an error should not have left."""
    marks = (".writing-", ".partial", ".tmp")
    found = [path for path in folder.rglob("*") if path.name == "model" or any(m in path.name for m in marks)]
    return [str(path.relative_to(folder)) for path in found]


# --- mistakes in data, settings and models -------------------------------------------------------------------------

# What stands in the folder, the algorithm, its settings, the exit code, and what the message and its hint must hold.
MISTAKES: dict[str, tuple[dict[str, bytes], str, list[str], int, list[str]]] = {
    "missing data file": (
        {"rows.jsonl": b"{}"},
        "sft",
        ["data.path=rowz.jsonl"],
        3,
        ["rowz.jsonl does not exist", "hint: did you mean rows.jsonl?"],
    ),
    "empty data file": ({"d.jsonl": b""}, "sft", ["data.path=d.jsonl"], 3, ["d.jsonl holds no rows", "hint: "]),
    "a pdf": (
        {"d.pdf": b"%PDF-1.7"},
        "sft",
        ["data.path=d.pdf"],
        3,
        ["d.pdf has no known format", "hint: ", ".jsonl"],
    ),
    "a binary file": (
        {"d.jsonl": b"\x7fELF\x02\x01\x01" + bytes(64)},
        "sft",
        ["data.path=d.jsonl"],
        3,
        ["d.jsonl:1: not JSON", "ELF", "hint: "],
    ),
    "no UTF-8": (
        {"d.jsonl": NOT_UTF_8},
        "sft",
        ["data.path=d.jsonl"],
        3,
        ["d.jsonl:2: byte 0xe9 at offset", "is not UTF-8", "hint: convert the file", "WINDOWS-1252"],
    ),
    "a prepared folder without the file": (
        {"folder/pretrain.jsonl": b'{"text": "a"}'},
        "sft",
        ["data.path=folder"],
        3,
        ["folder is a directory without sft.jsonl", "hint: give a file of records"],
    ),
    "a row without the field": (
        {"d.jsonl": json.dumps(ROWS["sft"][0]).encode() + b'\n{"prompt": "why?", "answr": "so"}\n'},
        "sft",
        ["data.path=d.jsonl"],
        3,
        ["d.jsonl:2: the row has prompt, answr and is read as prompt", "hint: to be prompt-response it lacks"],
    ),
    "a field of another type": (
        {"d.jsonl": b'{"prompt": "why?", "response": 3}\n'},
        "sft",
        ["data.path=d.jsonl"],
        3,
        ["d.jsonl:1: response must be text, got int 3"],
    ),
    "chosen equal to rejected everywhere": (
        {"d.jsonl": b"".join(json.dumps({**row, "rejected": row["chosen"]}).encode() + b"\n" for row in PAIRS)},
        "dpo",
        ["data.path=d.jsonl"],
        3,
        ["no usable row in d.jsonl: 32 read, dropped {'chosen equal to rejected': 32}", "hint: "],
    ),
    "every response empty": (
        {"d.jsonl": b'{"prompt": "why?", "response": " "}\n' * 3},
        "sft",
        ["data.path=d.jsonl"],
        3,
        ["no usable row in d.jsonl: 3 read, dropped {'empty response': 3}", "hint: "],
    ),
    "max_length shorter than every prompt": (
        {},
        "sft",
        ["data.max_length=4"],
        3,
        ["no record is left", "max_length=4", "prompt longer than 3 tokens", "hint: raise data.max_length"],
    ),
    "max_length beyond the model's positions": (
        {},
        "sft",
        ["data.max_length=65"],
        2,
        ["data.max_length=65", "positions end at 64", "hint: set data.max_length=64"],
    ),
    "no data": ({}, "sft", ["data.path=null"], 2, ["data.path is not given", "hint: for example data.path="]),
    "no room for new tokens": (
        {},
        "ppo",
        ["ppo.reward=tests.end_to_end.rows:brevity", "ppo.max_new_tokens=48"],
        2,
        ["data.max_length=48 leaves no room for a prompt and 48 new tokens", "hint: raise data.max_length"],
    ),
    "chat without a chat template": (
        {},
        "sft",
        ["data.template=chat"],
        3,
        ["data.template=chat", "no chat template", "hint: name another template"],
    ),
    "unknown template": (
        {},
        "sft",
        ["data.template=qa"],
        3,
        ["no template 'qa'", "hint: there are: chat, alpaca, chatml, hash, hh, llama-3, plain"],
    ),
    "unknown key": (
        {},
        "sft",
        ["train.batchsize=4"],
        2,
        ["unknown key 'train.batchsize' (command line)", "did you mean 'batch_size'?"],
    ),
    "no setting": ({}, "sft", ["seed"], 2, ["'seed' is no setting", "hint: write section.key=value"]),
    "value out of range": (
        {},
        "sft",
        ["optim.learning_rate=-1"],
        2,
        ["optim.learning_rate (command line): input should be greater than 0, got -1"],
    ),
    "value of another type": (
        {},
        "sft",
        ["train.batch_size=many"],
        2,
        ["train.batch_size (command line): input should be a valid integer", "got 'many'"],
    ),
    "unknown algorithm": ({}, "sft", ["algorithm=stf"], 2, ["no algorithm 'stf'; did you mean 'sft'?", "hint: "]),
    "unknown tracker": (
        {},
        "sft",
        ["tracking.sinks=[tensorbord]"],
        2,
        ["no tracker 'tensorbord'", "hint: did you mean 'tensorboard'?"],
    ),
    "unknown device": ({}, "sft", ["model.device=gpu"], 2, ["model.device='gpu' is no device", "hint: auto, cpu"]),
    "a model folder that does not exist": (
        {},
        "sft",
        ["model.scratch=null", "model.path=./nowhere"],
        4,
        ["./nowhere does not exist", "hint: check model.path"],
    ),
    "a run that does not exist": (
        {},
        "sft",
        ["model.scratch=null", "model.path=runs/nowhere"],
        4,
        ["runs/nowhere cannot be loaded", "hint: there is no folder runs/nowhere here", "taken for a hub id"],
    ),
    "a model that is a file": (
        {"weights.bin": b"0"},
        "sft",
        ["model.scratch=null", "model.path=weights.bin"],
        4,
        ["weights.bin is a file; a folder saved by transformers, a run, or a hub id was meant"],
    ),
    "a folder without a model": (
        {"folder/notes.txt": b"0"},
        "sft",
        ["model.scratch=null", "model.path=folder"],
        4,
        ["folder holds no model: neither config.json nor", "hint: give a folder saved by transformers"],
    ),
    "a model whose config.json says nothing": (
        {"folder/config.json": b"{}"},
        "sft",
        ["model.scratch=null", "model.path=folder"],
        4,
        ["folder cannot be loaded as a causal language model", "hint: give a folder saved by transformers"],
    ),
    "a model from scratch with an adapter": (
        {},
        "sft",
        ["model.adapter.rank=4"],
        2,
        ["model (command line): model.adapter needs a base that is saved somewhere"],
    ),
    "a model of two origins": (
        {},
        "sft",
        ["model.path=runs/sft"],
        2,
        ["model.path and model.scratch are both given; a model has one origin"],
    ),
    "ppo without a reward": ({}, "ppo", [], 2, ["no reward to optimise", "hint: set ppo.reward"]),
    "a reward that is nowhere": (
        {},
        "ppo",
        ["ppo.reward=rewardz:score"],
        2,
        ["no reward 'rewardz:score'", "hint: write module:function"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_and_leaves_nothing(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fairlead_command: Command
) -> None:
    files, algorithm, given, code, words = MISTAKES[mistake]
    write(tmp_path / "good.jsonl", ROWS[algorithm])
    file = recipe(tmp_path, algorithm, **{"data.path": "good.jsonl"})
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    explained(fairlead_command("train", file, *given), code, *words)
    assert not (tmp_path / "runs" / algorithm).exists()
    assert half_written(tmp_path) == []


def test_a_corrected_command_is_not_refused_by_what_the_mistaken_one_left(
    tmp_path: Path, fairlead_command: Command
) -> None:
    write(tmp_path / "good.jsonl", ROWS["sft"])
    file = recipe(tmp_path, **{"data.path": str(tmp_path / "bad.jsonl")})
    assert fairlead_command("train", file).code == 3
    assert fairlead_command("train", file, f"data.path={tmp_path / 'good.jsonl'}", "tracking.sinks=[x]").code == 2
    done = fairlead_command("train", file, f"data.path={tmp_path / 'good.jsonl'}")
    assert done.code == 0, done.stderr


def test_a_reward_that_raises_is_named_with_what_it_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fairlead_command: Command
) -> None:
    (tmp_path / "raising_reward.py").write_text("def score(**_):\n    raise ZeroDivisionError('no words')\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "prompts.jsonl", ROWS["ppo"])
    file = recipe(tmp_path, "ppo", **{"data.path": str(data), "ppo.reward": "raising_reward:score"})
    done = fairlead_command("train", file)
    explained(done, 5, "the reward raising_reward:score raised ZeroDivisionError: no words", "hint: mend the function")
    assert half_written(tmp_path) == []
    assert json.loads((tmp_path / "runs" / "ppo" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "dpoo"], 2, ["no recipe 'dpoo'", "hint: did you mean 'dpo'?"]),
        (["train", "folder"], 2, ["folder is a directory; a recipe file was meant", "hint: give a .yaml file"]),
        (["train", "latin.yaml"], 2, ["latin.yaml: not UTF-8 (byte 14)", "hint: save the file as UTF-8"]),
        (["train", "torn.yaml"], 2, ["torn.yaml:2: not valid YAML"]),
        (["pipeline", "hh-tinny"], 2, ["no pipeline 'hh-tinny'", "hint: did you mean 'hh-tiny'?"]),
        (["pipeline", "hh-tiny"], 2, ["needs data.path, which is not given", "hint: add data.path=FILE"]),
        (["resume", "folder"], 7, ["folder is not a run: it has no recipe.yaml", "hint: "]),
        (["evaluate", "folder"], 7, ["folder is not a run: it has no recipe.yaml", "hint: "]),
        (["evaluate", "nowhere"], 7, ["nowhere is not a run", "hint: "]),
        (["report", "folder"], 7, ["not a run directory: folder", "hint: a run directory holds manifest.json"]),
        (["report", "nowhere"], 7, ["no such run directory: nowhere", "hint: give a folder written by"]),
        (["prepare", "hh", "folder", "--out", "out"], 2, ["unknown kind of data 'hh'", "hint: known are hh-rlhf"]),
        (["prepare", "hh-rlhf", "nowhere.jsonl", "--out", "out"], 3, ["nowhere.jsonl does not exist", "hint: "]),
        (["prepare", "hh-rlhf", "folder", "--out", "out"], 3, ["folder holds no", "hint: "]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_other_verbs_explain_what_they_were_given(
    arguments: list[str],
    code: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fairlead_command: Command,
) -> None:
    (tmp_path / "folder").mkdir()
    put(tmp_path, "latin.yaml", b"algorithm: caf\xe9\n")
    put(tmp_path, "torn.yaml", b"algorithm: sft\ndata: }\n")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    explained(fairlead_command(*arguments), code, *words)
    assert sorted(tmp_path.rglob("*")) == before


# --- run directories and checkpoints that do not serve ---------------------------------------------------------------


def break_saving(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk is full once ``after`` checkpoints, of two tensor files each, have been written."""
    real, calls = stored.save_file, 0

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 * after:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(stored, "save_file", save_file)


@dataclass(frozen=True, slots=True)
class Runs:
    finished: Path
    unfinished: Path
    """Its checkpoints are those of steps 1 and 2; four steps were asked for."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "sft.jsonl", ROWS["sft"])
    given = {name: settings("sft", folder / name, **{"model.scratch": SCRATCH, **RUN}) for name in ("a", "b")}
    fairlead.train({"algorithm": "sft"}, given["a"], data=data)
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_saving(monkeypatch, after=2)
        with pytest.raises(CheckpointError, match="step 3 could not be written"):
            fairlead.train({"algorithm": "sft"}, given["b"], data=data)
    return Runs(folder / "a" / "sft", folder / "b" / "sft")


@pytest.fixture
def unfinished(runs: Runs, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(runs.unfinished, tmp_path / "sft"))


def whole(folder: Path) -> bool:
    """Whether every file of a checkpoint has the checksum its manifest names."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= files.keys()
    return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in files.items())


def rewrite_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(checkpoint.sealed(manifest | changes), "utf-8")


def test_a_finished_run_and_a_run_of_another_recipe_are_not_overwritten(runs: Runs, fairlead_command: Command) -> None:
    model = runs.finished / "model" / "model.safetensors"
    before = model.read_bytes()
    explained(
        fairlead_command("resume", runs.finished), 7, f"{runs.finished} holds a finished run", "hint: choose another"
    )
    again = ["train", runs.finished / "recipe.yaml", f"run.directory={runs.finished.parent}"]
    explained(fairlead_command(*again), 7, f"{runs.finished} holds a finished run", "hint: choose another run.name")
    explained(
        fairlead_command(*again, "seed=1"),
        7,
        f"{runs.finished} holds a run of another recipe",
        "hint: choose another name, continue that run with `fairlead resume",
    )
    assert model.read_bytes() == before


def test_files_that_are_no_run_are_not_touched(tmp_path: Path, fairlead_command: Command) -> None:
    data = write(tmp_path / "sft.jsonl", ROWS["sft"])
    folder = tmp_path / "runs" / "sft"
    folder.mkdir(parents=True)
    put(folder, "thesis.txt", b"years of work")
    done = fairlead_command("train", recipe(tmp_path, **{"data.path": str(data)}))
    explained(done, 7, f"{folder} holds files that are no run: thesis.txt", "hint: choose another name")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_an_unfinished_run_is_not_evaluated(unfinished: Path, fairlead_command: Command) -> None:
    done = fairlead_command("evaluate", unfinished, "--prompts", "prompts.jsonl")
    explained(done, 7, "has not finished: it has no model yet", "hint: continue it with `fairlead resume")


def test_a_checkpoint_of_another_format_version_is_refused(unfinished: Path, fairlead_command: Command) -> None:
    rewrite_manifest(unfinished / "checkpoints" / "step-000002", format_version=99)
    done = fairlead_command("resume", unfinished)
    explained(done, 6, "step-000002 has format version 99, this Fairlead reads 2", "hint: continue the run with")
    assert half_written(unfinished) == []
    assert whole(unfinished / "checkpoints" / "step-000001")


def test_another_number_of_threads_is_refused_with_the_one_to_set(unfinished: Path, fairlead_command: Command) -> None:
    rewrite_manifest(unfinished / "checkpoints" / "step-000002", threads=7)
    done = fairlead_command("resume", unfinished)
    explained(done, 6, "was trained with 7 CPU threads, this process has 1", "hint: set threads=7")


@pytest.mark.parametrize("damage", ["a byte flipped", "cut short", "manifest missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, runs: Runs, unfinished: Path, fairlead_command: Command
) -> None:
    last = unfinished / "checkpoints" / "step-000002"
    weights = last / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "a byte flipped":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "cut short":
        weights.write_bytes(content[:-9])
    else:
        (last / "manifest.json").unlink()
    done = fairlead_command("resume", unfinished)
    assert done.code == 0, done.stderr
    assert "step-000002" in done.stderr and "the checkpoint before it is used" in done.stderr
    assert "after step 1 of 4" in done.stderr
    for step in (2, 4):
        name = f"checkpoints/step-{step:06d}"
        assert whole(unfinished / name)
        ours, theirs = (run / name / "model.safetensors" for run in (unfinished, runs.finished))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_full_disk_leaves_the_checkpoint_before_and_the_same_command_finishes(
    runs: Runs, tmp_path: Path, fairlead_command: Command
) -> None:
    data = write(tmp_path / "sft.jsonl", ROWS["sft"])
    command = ["train", recipe(tmp_path, **RUN, **{"data.path": str(data)})]
    run = tmp_path / "runs" / "sft"
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_saving(monkeypatch, after=1)
        done = fairlead_command(*command)
    explained(done, 6, "the checkpoint of step 2 could not be written", "No space left on device", "hint: make room")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert whole(run / "checkpoints" / "step-000001")
    assert half_written(run) == []
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    again = fairlead_command(*command)
    assert again.code == 0, again.stderr
    assert f"continuing {run} after step 1 of 4" in again.stderr
    ours, theirs = (each / "model" / "model.safetensors" for each in (run, runs.finished))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_in_use_by_another_process_is_left_alone(runs: Runs, unfinished: Path, fairlead_command: Command) -> None:
    from fairlead.tracking import RunDirectory

    with RunDirectory(unfinished).lock():
        done = fairlead_command("resume", unfinished)
    explained(done, 7, f"{unfinished} is in use by process", "hint: wait until it ends")
