"""A few dozen rows of each kind, and the tiny runs that tests train on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOPICS = ("lamp", "kettle", "radio", "pump", "drill", "fan", "stove", "bell")
FAULTS = ("fuse", "belt", "wire", "seal")

PAIRS = [
    {
        "prompt": f"why does the {topic} stop after {n} hours?",
        "chosen": f"the {fault} is loose",
        "rejected": f"buy a {topic}",
    }
    for n, topic in enumerate(TOPICS, 1)
    for fault in FAULTS
]
DEMONSTRATIONS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
TEXTS = [{"text": f"{row['prompt']} {row['chosen']}."} for row in PAIRS]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
PROMPTS = [{"prompt": row["prompt"], "topic": row["prompt"].split()[3]} for row in PAIRS[:: len(FAULTS)]]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": TEXTS,
    "sft": DEMONSTRATIONS,
    "reward": PAIRS,
    "dpo": PAIRS,
    "simpo": PAIRS,
    "cpo": PAIRS,
    "orpo": PAIRS,
    "kto": LABELLED,
    "bco": LABELLED,
    "ppo": PROMPTS,
    "rloo": PROMPTS,
    "grpo": PROMPTS,
    "reinforce": PROMPTS,
    "raft": PROMPTS,
    "rft": PROMPTS,
    "online_dpo": PROMPTS,
}
ONLINE = ("ppo", "rloo", "grpo", "reinforce", "raft", "rft", "online_dpo")
"""Those that sample, and need a reward."""

SETTINGS: dict[str, Any] = {
    "threads": 1,
    "data.max_length": 48,
    "data.template": "question-answer",
    "data.eval_fraction": 0.25,
    "optim.learning_rate": 1e-3,
    "train.batch_size": 8,
    "train.steps": 4,
    "train.log_every": 1,
    "train.num_samples": 1,
    "tracking.console": False,
}
OWN: dict[str, dict[str, Any]] = {
    algorithm: {
        "train.batch_size": 3,
        f"{algorithm}.rollout_size": 6,
        f"{algorithm}.rollout_rows": 2,
        f"{algorithm}.epochs": 2,
        f"{algorithm}.max_new_tokens": 12,
    }
    for algorithm in ONLINE
}
SCRATCH = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 300, "context_length": 64}


def brevity(outputs: list[str], topic: list[str] | None = None, **_: Any) -> list[float]:
    """A reward with a column: short answers that name the topic, where there is one."""
    names = topic or ["no topic"] * len(outputs)
    return [(name in output) - len(output) / 40 for output, name in zip(outputs, names, strict=True)]


def settings(algorithm: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {**SETTINGS, **OWN.get(algorithm, {}), "run.directory": str(folder), "run.name": algorithm, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
