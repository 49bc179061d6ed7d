"""A recipe and a space in files, and processes that only pretend to train."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.end_to_end.rows import ROWS, SCRATCH, settings, write

from fairlead.pipeline_file import nest
from fairlead.sweep import run, trial
from fairlead.sweep.plan import Plan
from fairlead.tracking import RunDirectory

SPACE: dict[str, Any] = {
    "metric": "eval/loss",
    "goal": "min",
    "trials": 4,
    "space": {"optim.learning_rate": {"loguniform": [1e-5, 1e-1]}, "optim.schedule": {"choice": ["cosine", "linear"]}},
}
Files = Callable[..., tuple[str, Path]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes a recipe of a tiny SFT run and a space; of both what is given is changed."""

    def make(recipe: Mapping[str, Any] | None = None, **space: Any) -> tuple[str, Path]:
        data = write(tmp_path / "rows.jsonl", ROWS["sft"])
        given = settings("sft", tmp_path, **{"model.scratch": SCRATCH, "data.path": str(data), **(recipe or {})})
        given = {key: value for key, value in given.items() if key not in ("run.name", "optim.learning_rate")}
        (tmp_path / "sft.yaml").write_text(yaml.safe_dump(nest({"algorithm": "sft", **given}), sort_keys=False))
        (tmp_path / "space.yaml").write_text(yaml.safe_dump({**SPACE, **space}, sort_keys=False))
        return str(tmp_path / "sft.yaml"), tmp_path / "space.yaml"

    return make


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has trials trained by stub.py, which does what it is told."""

    def command(plan: Plan, of: RunDirectory, parameters: Mapping[str, Any]) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("stub.py")), str(of.path), json.dumps(parameters)]

    def tell(**told: Any) -> None:
        monkeypatch.setenv("STUB", json.dumps(told))

    monkeypatch.setattr(trial, "command", command)
    monkeypatch.setattr(run, "POLL", 0.01)
    monkeypatch.delenv("STUB", raising=False)
    return tell
