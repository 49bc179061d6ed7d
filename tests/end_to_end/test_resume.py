"""A run killed at any moment and started again by the same command ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.rows import ONLINE, PAIRS, PROMPTS, ROWS, SCRATCH, settings, write

SCRIPT = """
import json, sys
import fairlead
recipe, settings, data, reward = json.loads(sys.argv[1])
fairlead.train(recipe, settings, data=data, reward=reward)
"""


def _command(algorithm: str, folder: Path, data: Path, extra: dict[str, Any] | None = None) -> list[str]:
    more = {"model.scratch": SCRATCH, "train.steps": 8, "train.save_every": 1, "train.keep_checkpoints": 9}
    more |= extra or {}
    given = settings(algorithm, folder, **more)
    reward = "tests.end_to_end.slow_reward:score" if algorithm in ONLINE else None
    return [sys.executable, "-c", SCRIPT, json.dumps([{"algorithm": algorithm}, given, str(data), reward])]


def _final(folder: Path) -> dict[str, bytes]:
    """Weights, optimizer and metrics; wall-clock fields aside."""
    last = max((folder / "checkpoints").iterdir())
    files = {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("performance/")} for row in rows]
    files["metrics"] = json.dumps(kept).encode()
    for name in ("samples.jsonl", "eval_prompts.jsonl"):
        files[name] = (folder / name).read_bytes() if (folder / name).exists() else b""
    for path in sorted((folder / "rounds").rglob("*.*")):
        files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def _kill_when(command: list[str], reached, timeout: float = 120) -> None:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + timeout
    while not reached():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def _finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr


CHANGING = {
    "ppo.adaptive_kl": {"target": 0.1, "horizon": 20},
    "ppo.reward_scaling": "running",
    "ppo.reward_clip": 2.0,
    "ppo.target_kl": 1e-4,
    "ppo.top_k": 40,
    "ppo.min_new_tokens": 3,
    "ppo.shortest_limit": 6,
    "ppo.num_samples": 2,
    "ppo.value.warm_up_steps": 2,
    "ppo.eval_prompts": ["why does the lamp stop?"],
    "train.eval_every": 3,
}
"""What changes from round to round, or ends one early."""
RANKED = {"raft.num_samples": 4, "raft.clean": ["strip"], "raft.discard": [{"contains": {"part": "b"}}]}
ROUNDS = {
    "raft.num_samples": 2,
    "raft.epochs": 1,
    "raft.optimizer": "fresh",
    "raft.round_decay": 0.5,
    "raft.plateau": 1,
}
"""Of which each begins the optimizer anew; the second is the last, though more were planned."""
GROWN = {"rft.num_samples": 3, "rft.epochs": 3, "rft.rollout_size": "all"}
PAIRED = {"online_dpo.num_samples": 3, "online_dpo.pairs": "random", "online_dpo.reference": "round"}


@pytest.mark.parametrize(
    ("algorithm", "extra"),
    [
        ("sft", {}),
        ("dpo", {}),
        ("ppo", {}),
        ("ppo", CHANGING),
        ("grpo", {"grpo.drop": ["alike"]}),
        ("raft", RANKED),
        ("raft", ROUNDS),
        ("rft", GROWN),
        ("online_dpo", PAIRED),
    ],
    ids=["sft", "dpo", "ppo", "ppo, changing", "grpo", "raft", "raft, fresh rounds", "rft", "online dpo"],
)
def test_a_killed_run_continues_to_the_same_bytes(algorithm: str, extra: dict[str, Any], tmp_path: Path) -> None:
    rows = PROMPTS if algorithm in ONLINE else PAIRS if algorithm == "dpo" else ROWS["sft"]
    data = write(tmp_path / "rows.jsonl", rows)
    if extra is CHANGING:
        extra = {**extra, "ppo.mixed": {"path": str(write(tmp_path / "text.jsonl", ROWS["pretrain"])), "batch_size": 3}}
    _finish(_command(algorithm, tmp_path / "whole", data, extra))
    command, run = _command(algorithm, tmp_path / "killed", data, extra), tmp_path / "killed" / algorithm
    _kill_when(command, lambda: (run / "checkpoints" / "step-000003" / "manifest.json").exists())
    if algorithm == "ppo" and not extra:  # once more in the middle of a rollout: a chunk of the second round is sampled
        _kill_when(command, lambda: (run / "rounds" / "001" / "chunk-000.json").exists())
        assert not (run / "rounds" / "001" / "round.json").exists()
    _finish(command)
    whole, killed = _final(tmp_path / "whole" / algorithm), _final(run)
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


def test_ctrl_c_saves_at_the_next_step_and_the_same_command_continues(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PROMPTS)
    command, run = _command("ppo", tmp_path, data), tmp_path / "ppo"
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    while not (run / "checkpoints" / "step-000001" / "manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert "Interrupted: stopped by SIGINT after step" in stderr
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert not list((run / "checkpoints").glob(".writing-*"))
    _finish(command)
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_a_run_does_not_continue_with_another_content_of_its_data(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["sft"])
    command, run = _command("sft", tmp_path, data), tmp_path / "sft"
    _kill_when(command, lambda: (run / "checkpoints" / "step-000001" / "manifest.json").exists())
    write(data, ROWS["sft"][:-1])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode != 0
    assert "begun with another content of data.path" in done.stderr
