"""A tiny run of each algorithm, with what changes from step to step and from round to round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.end_to_end.rows import ONLINE, ROWS, SCRATCH, settings, write

ALGORITHMS = ("pretrain", "sft", "reward", "dpo", "ppo", "rloo", "raft", "online_dpo")
COMMON: dict[str, Any] = {
    "run.directory": "runs",
    "data.path": "rows.jsonl",
    "data.cache": "cache",
    "data.workers": 1,
    "train.steps": 6,
    "train.save_every": 2,
    "train.eval_every": 3,
    "train.sample_every": 3,
}
ADAPTER = {"model.path": "base", "model.adapter": {"rank": 2}}
OWN: dict[str, dict[str, Any]] = {
    "dpo": ADAPTER,
    "ppo": {
        "model.scratch": SCRATCH,
        "ppo.adaptive_kl": {"target": 0.1, "horizon": 20},
        "ppo.reward_scaling": "running",
        "ppo.target_kl": 1e-4,
        "ppo.num_samples": 2,
        "ppo.value.warm_up_steps": 2,
        "ppo.eval_prompts": ["why does the lamp stop?"],
        "ppo.mixed": {"path": "text.jsonl", "batch_size": 3},
    },
    "rloo": {**ADAPTER, "rloo.num_samples": 2},
    "raft": {
        "model.scratch": SCRATCH,
        "raft.num_samples": 2,
        "raft.clean": ["strip"],
        "raft.discard": [{"contains": {"part": "zz"}}],
        "raft.optimizer": "fresh",
    },
    "online_dpo": {"model.scratch": SCRATCH, "online_dpo.num_samples": 3, "online_dpo.reference": "round"},
}
"""Iterative DPO is online_dpo whose reference is the round's start."""


def recipe(algorithm: str) -> dict[str, Any]:
    """Settings by dotted key; every path is relative to the folder that the run is started in."""
    own = OWN.get(algorithm, {"model.scratch": SCRATCH})
    reward = {f"{algorithm}.reward": "tests.end_to_end.rows:brevity"} if algorithm in ONLINE else {}
    return settings(algorithm, Path(), **COMMON, **own, **reward) | {"run.directory": "runs"}


def furnish(folder: Path, algorithm: str, base: Path) -> None:
    """Put what a run reads into the folder that it is started in."""
    folder.mkdir(parents=True)
    write(folder / "rows.jsonl", ROWS[algorithm])
    write(folder / "text.jsonl", ROWS["pretrain"])
    (folder / "base").symlink_to(base, target_is_directory=True)
