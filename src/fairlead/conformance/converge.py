"""Runs one case through the real trainer and measures how far it ends from what it must reach."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fairlead.conformance.case import Case, Found

COMMON = {
    "run.name": "run",
    "threads": 1,
    "data.template": "plain",
    "data.cache": "none",
    "optim.schedule": "cosine",
    "train.num_samples": 0,
    "train.log_every": 50,
    "train.save_every": "never",
    "tracking.console": False,
}


def converge(case: Case, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    from fairlead.runner import train

    start = case.task.save(folder / "start")
    given = {
        **COMMON,
        "run.directory": str(folder),
        "model.path": str(start),
        "data.max_length": case.task.max_length,
        **case.settings,
    }
    began = time.process_time()
    result = train({"algorithm": case.algorithm}, given, data=case.rows, reward=case.reward)
    seconds = time.process_time() - began
    return row(case, folder, result.path / "model") | {"steps": result.summary["steps"], "seconds": round(seconds, 1)}


def row(case: Case, start: Path, trained: Path) -> dict[str, Any]:
    """The distance of what was saved in a folder, whoever trained it. ``start`` holds the folder the run began with."""
    task = case.task
    read = task.scores if case.algorithm == "reward" else task.logprobs
    distance = case.distance(Found(task, task.logprobs(start / "start"), read(trained)))
    return {
        "case": case.name,
        "task": f"{len(task.prompts)} x {len(task.responses)}",
        "algorithm": case.algorithm,
        "reaches": case.reaches,
        "measure": case.measure,
        "distance": distance,
        "bound": case.bound,
        "pass": distance <= case.bound,
    }
