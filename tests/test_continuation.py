"""Runs that go on from an earlier step, and forks of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fairlead
from fairlead.continuation import fork, resume
from fairlead.errors import CheckpointError, ConfigError, FairleadError, RunError
from fairlead.tracking import tree_sha256
from tests.chaos.left import differing, left_behind
from tests.end_to_end.rows import PROMPTS, ROWS, SCRATCH, settings, write

REWARD = "tests.end_to_end.rows:brevity"
KEPT = {"model.scratch": SCRATCH, "train.save_every": 1, "train.keep_checkpoints": 9}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of PPO: four steps, the first two of round 0."""
    folder = tmp_path_factory.mktemp("finished")
    data = write(folder / "rows.jsonl", PROMPTS)
    more = {**KEPT, "ppo.epochs": 1, "train.sample_every": 1}
    return fairlead.train({"algorithm": "ppo"}, settings("ppo", folder, **more), data=data, reward=REWARD).path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, in the same place as seen from its recipe."""
    kept = tmp_path / "kept"
    shutil.copytree(finished, kept)
    yield finished
    shutil.rmtree(finished.parent)
    finished.parent.mkdir()
    write(finished.parent / "rows.jsonl", PROMPTS)
    shutil.copytree(kept, finished)


@pytest.mark.parametrize("step", [3, 2, 1])
def test_a_run_goes_back_to_a_step_and_ends_with_the_same_bytes(
    run: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, first = left_behind(run), (run / "rounds" / "001" / "round.json").stat().st_mtime_ns
    resume(run, [f"at={step}"])
    said = capsys.readouterr().err
    removed = [f"checkpoints/step-00000{n}" for n in range(4, step, -1)] + ["rounds/001"] * (step < 3)
    assert f"{run} goes back to step {step}; removed: summary.json, model, {', '.join(removed)}\n" in said
    assert f"continuing {run} after step {step} of 4" in said
    assert differing(left_behind(run), whole) == []
    assert ((run / "rounds" / "001" / "round.json").stat().st_mtime_ns != first) == (step < 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("at=7", r"has no checkpoint of step 7\nhint: there are checkpoints of steps: 0, 1, 2, 3, 4;"),
        ("at=last", "at=last: the number of a step was expected"),
        ("optim.learning_rate=1", r"resume changes no settings, got optim.learning_rate\nhint: fairlead fork "),
    ],
)
def test_going_back_to_nothing_is_refused_and_removes_nothing(finished: Path, given: str, message: str) -> None:
    before = left_behind(finished)
    with pytest.raises(FairleadError, match=message):
        resume(finished, [given])
    assert differing(left_behind(finished), before) == []


def test_a_damaged_checkpoint_is_not_gone_back_to(run: Path) -> None:
    (run / "checkpoints" / "step-000002" / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"step-000002/state.json does not match its checksum\nhint: there are"):
        resume(run, ["at=2"])
    assert (run / "model").is_dir()


def test_a_fork_without_changes_ends_as_its_parent(run: Path) -> None:
    fork(run, ["at=1"])
    made = run.with_name("ppo-at-1")
    parent, own = left_behind(run), left_behind(made)
    named = [name for name in own if name.rpartition("/")[2] in ("README.md", "recipe.yaml", "summary.json")]
    assert [name for name in differing(parent, own) if name not in named] == [
        "checkpoints/step-000000/" + name
        for name in ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    ] + ["manifest.json"]
    manifest = json.loads((made / "manifest.json").read_text())
    digest = tree_sha256(run / "checkpoints" / "step-000001")
    assert manifest["parent"] == {"run": str(run), "step": 1, "checkpoint": digest}
    assert manifest["name"] == "ppo-at-1"


def test_a_fork_goes_on_with_other_settings_and_more_steps(run: Path) -> None:
    before = left_behind(run)
    changes = ["optim.learning_rate=0.5", "ppo.kl_coef=0.7", "train.steps=6", "run.name=bolder"]
    result = fork(run, ["at=2", *changes])
    assert differing(left_behind(run), before) == []
    old, new = rows(run / "metrics.jsonl"), rows(result.path / "metrics.jsonl")
    assert [row["step"] for row in new] == [0, 1, 2, 3, 4, 5, 6]
    assert new[:3] == old[:3]
    assert new[3]["learning_rate"] > 100 * old[3]["learning_rate"]
    assert (old[3]["objective/kl_coef"], new[3]["objective/kl_coef"]) == (0.05, 0.7)
    assert [(result.path / "rounds" / name).is_dir() for name in ("000", "001", "002")] == [True] * 3
    with pytest.raises(RunError, match="holds a finished run of this recipe"):
        fork(run, ["at=2", *changes])


def test_an_unfinished_fork_is_continued_by_the_same_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = fork(run, ["at=2", "optim.learning_rate=0.01"]).path
    whole = left_behind(made)
    shutil.rmtree(made / "checkpoints" / "step-000004")
    shutil.rmtree(made / "model")
    (made / "summary.json").unlink()
    capsys.readouterr()
    fork(run, ["at=2", "optim.learning_rate=0.01"])
    said = capsys.readouterr().err
    assert f"continuing {made} after step 3 of 4" in said
    assert "forked" not in said
    assert differing(left_behind(made), whole) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"fork needs the step to begin from\nhint: there are checkpoints of steps: 0, 1, 2, 3, 4;"),
        (["at=9"], "has no checkpoint of step 9"),
        (["at=2", "seed=1"], r"seed cannot be changed in a fork: the order of the records .*\nhint: .*model.path=RUN"),
        (["at=2", "model.scratch.hidden_size=32"], "the weights of this model"),
        (["at=2", "model.adapter.rank=2"], "model.adapter needs a base"),
        (["at=2", "data.max_length=40"], "how far the run is in these records"),
        (["at=2", "train.batch_size=2"], "how far the run is in these records"),
        (["at=2", "optim.name=sgd"], "the states of this optimizer"),
        (["at=2", "algorithm=rloo"], "rloo|algorithm"),
        (["at=2", "train.steps=1"], r"train.steps=1 is before step 2, where the fork begins"),
        (["at=2", "ppo.value.trunk=model"], "holds other parameters than this model"),
        (["at=2", "optim.learning_rat=1"], "unknown key 'optim.learning_rat'"),
    ],
)
def test_a_fork_that_its_checkpoint_cannot_carry_is_refused_and_leaves_nothing(
    finished: Path, given: list[str], message: str
) -> None:
    with pytest.raises((ConfigError, RunError, CheckpointError), match=message):
        fork(finished, given)
    assert sorted(path.name for path in finished.parent.iterdir()) == ["ppo", "rows.jsonl"]


def test_a_fork_does_not_go_on_over_another_content_of_its_data(run: Path) -> None:
    write(run.parent / "rows.jsonl", PROMPTS[:-1])
    with pytest.raises(RunError, match=r"was begun with another content of data.path"):
        fork(run, ["at=2"])
    assert not run.with_name("ppo-at-2").exists()


def test_another_runs_folder_is_not_taken_for_a_fork(run: Path) -> None:
    with pytest.raises(RunError, match=r"ppo exists, and is no fork of this step of"):
        fork(run, ["at=2", "run.name=ppo"])


def test_a_fork_of_a_run_over_records_goes_on_in_their_order(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["sft"])
    given = settings("sft", tmp_path, **KEPT)
    long = fairlead.train({"algorithm": "sft"}, given | {"run.name": "long", "train.steps": 6}, data=data).path
    short = fairlead.train({"algorithm": "sft"}, given | {"run.name": "short", "train.steps": 4}, data=data).path
    made = fork(short, ["at=4", "train.steps=6", "optim.schedule=constant"]).path
    tokens = [[row["tokens"] for row in rows(path / "metrics.jsonl") if row["step"]] for path in (made, long)]
    assert len(tokens[0]) == 6 and tokens[0] == tokens[1]
