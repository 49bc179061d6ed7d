"""Run directories as Fairlead writes them, made by hand: small ones with chosen numbers, and a whole pipeline."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

TOPICS = ("printer", "router", "garden pump", "espresso machine", "bicycle", "phone", "boiler")
FAULTS = ("stops after a minute", "makes a loud noise", "does not start", "forgets its settings")
CAUSES = ("a loose cable", "old firmware", "a blocked filter", "a worn seal", "low voltage")
STEPS = ("unplug it", "clean the filter", "tighten the screws", "update the firmware", "call nobody")


def write_run(folder: Path, **files: Any) -> Path:
    """A run directory: recipe and manifest always, other files by keyword (`evaluation_metrics` is in a subfolder)."""
    content: dict[str, Any] = {
        "recipe": {"algorithm": "dpo", "run": {"name": folder.name}},
        "manifest": {"format_version": 1, "algorithm": "dpo", "name": folder.name, "seed": 0},
        **files,
    }
    for name, value in content.items():
        path = folder / name.replace("evaluation_", "evaluation/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "recipe":
            path.with_suffix(".yaml").write_text(yaml.safe_dump(value, sort_keys=False))
        elif isinstance(value, Mapping):
            path.with_suffix(".json").write_text(json.dumps(value))
        else:
            lines = "".join(json.dumps(row) + "\n" for row in value)
            path.with_suffix(".jsonl").write_text(lines)
    return folder


def responses(scores: Mapping[str, Iterable[float]], text: str = "a response") -> list[Any]:
    """`responses.jsonl`: for each prompt one draw a score, in `gold`."""
    return [
        {"prompt": p, "draw": d, "response": f"{text} {d}", "finished": True, "scores": {"gold": s}}
        for p, draws in scores.items()
        for d, s in enumerate(draws)
    ]


def estimate(mean: float, half_width: float, n: int = 64) -> dict[str, float]:
    return {"mean": mean, "low": mean - half_width, "high": mean + half_width, "n": n}


def write_pipeline(folder: Path) -> Path:
    """A demonstration as it comes out of a small machine: five runs, three of them evaluated against the first."""
    stages = ("sft", "reward", "dpo", "raft", "ppo")
    gains = {"sft": (0.52, 0.3, 0.0), "dpo": (0.64, 0.9, 2.1), "raft": (0.67, 1.0, 1.6)}
    gains["ppo"] = (0.71, 1.9, 3.14)
    for minute, stage in enumerate(stages):
        rng = random.Random(stage)
        files: dict[str, Any] = {
            "recipe": {
                "algorithm": stage,
                "run": {"name": stage, "directory": "runs"},
                "model": {"path": "runs/sft/model", "scratch": None, "dtype": "auto"},
                "data": {"path": "data/pairs.jsonl", "eval_fraction": 0.1, "max_length": 256},
                "optim": {"learning_rate": 3e-4, "betas": [0.9, 0.95], "schedule": "cosine"},
                stage: {"beta": 0.1, "kl_coef": 0.05},
            },
            "manifest": {
                "format_version": 1,
                "algorithm": stage,
                "name": stage,
                "created": f"2026-11-21T04:{minute * 7:02d}:00+00:00",
                "seed": 0,
                "versions": {"fairlead": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
                "hardware": {"device": "cpu", "processor": "x86-64, 2 cores", "threads": 2},
                "inputs": {"data.path": {"path": "data/pairs.jsonl", "sha256": "9f2c" * 16}},
                "data": {
                    "train": {
                        "read": 12480,
                        "kept": 12377,
                        "cut": 41,
                        "dropped": {"prompt longer than max_prompt_length": 62, "equal pair": 41},
                    },
                    "eval": {"read": 1200, "kept": 1200, "cut": 0, "dropped": {}},
                },
                "parameters": {"total": 4213760, "trainable": 4213760, "heads": {"value": 257}},
                "notes": ["optim.eps has no effect here"] if stage == "raft" else [],
            },
            "metrics": _metrics(stage, rng),
            "samples": [
                {"step": step, "prompt": p, "response": _answer(rng, skill), "finished": skill > 0}
                for step, skill in ((0, 0.1), (200, 0.8), (400, 0.8))
                for p in _prompts()[:4]
            ],
            "alarms": [],
            "summary": {
                "stage": stage,
                "algorithm": stage,
                "status": "finished",
                "steps": 400,
                "tokens": 819200,
                "seconds": 312.4 if stage != "ppo" else 1893.0,
                "metrics": {"eval/loss": {"mean": 0.61, "low": None, "high": None, "n": 1}},
            },
        }
        if stage == "ppo":
            files["alarms"] = [
                {"step": step, "alarm": "length", "message": "responses grew by 61 % in 50 steps"}
                for step in (250, 300, 350)
            ]
        if stage == "reward":
            accuracy = {"accuracy": estimate(0.743, 0.03, 512)}
            files["evaluation_metrics"] = _evaluation(stage, None, accuracy)
        if stage in gains:
            gold, score, kl = gains[stage]
            metrics = {
                "score": estimate(score, 0.17),
                "gold": estimate(gold, 0.03),
                "kl": estimate(kl, 0.2 * kl),
                "length": estimate(31.4 + 9 * kl, 2.2),
                "distinct_1": estimate(0.41 - 0.05 * kl, 0.02),
                "distinct_2": estimate(0.83 - 0.08 * kl, 0.02),
            }
            if stage != "sft":
                metrics["win_rate"] = estimate(gold + 0.06, 0.05)
            files["evaluation_metrics"] = _evaluation(stage, "sft", metrics)
            files["evaluation_responses"] = [
                {
                    "prompt": prompt,
                    "draw": draw,
                    "response": _answer(rng, gold),
                    "length": 31,
                    "finished": draw == 0,
                    "kl": kl,
                    "scores": {"score": rng.gauss(score, 0.6), "gold": rng.gauss(gold, 0.2)},
                }
                for prompt in _prompts()
                for draw in range(2)
            ]
        write_run(folder / stage, **files)
    models = {stage: {"metrics": {"gold": estimate(g, 0.03)}} for stage, (g, _, _) in gains.items()}
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "models": models}))
    return folder


def _evaluation(run: str, reference: str | None, metrics: dict[str, Any]) -> dict[str, Any]:
    sampling = {"max_new_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    counts = {"run": run, "reference": reference, "prompts": 64, "draws": 2}
    return {**counts, "sampling": sampling, "metrics": metrics}


def _prompts() -> list[str]:
    return [f"My {t} {f}. What can I do?" for f in FAULTS for t in TOPICS]


def _answer(rng: random.Random, skill: float) -> str:
    steps = [rng.choice(STEPS) for _ in range(1 + int(12 * skill * rng.random()))]
    text = f"The cause is probably {rng.choice(CAUSES)}.\n\nFirst, {'. Then, '.join(steps)}."
    return text if rng.random() > 0.1 else ""


def _metrics(stage: str, rng: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, 401):
        t = step / 400
        row: dict[str, Any] = {"step": step, "seconds": 0.78 * step, "tokens": 2048 * step}
        row["loss"] = 0.7 - 0.25 * t + rng.gauss(0, 0.06)
        row["learning_rate"] = 3e-4 * (1 + math.cos(math.pi * t)) / 2
        row["grad_norm"] = abs(rng.gauss(0.8, 0.2))
        if stage in ("dpo", "reward"):
            row["rewards/chosen"] = 0.6 * t + rng.gauss(0, 0.1)
            row["rewards/rejected"] = -1.1 * t + rng.gauss(0, 0.1)
            row["rewards/accuracies"] = 0.5 + 0.24 * math.tanh(4 * t) + rng.gauss(0, 0.05)
            row["logps/chosen"] = -61 - 4 * t + rng.gauss(0, 1)
            row["logps/rejected"] = -66 - 21 * t + rng.gauss(0, 1)
        if stage in ("ppo", "raft"):
            row["objective/kl"] = 5.4 * t + rng.gauss(0, 0.2)
            row["objective/scores"] = 0.3 + 2.1 * t + rng.gauss(0, 0.3)
            row["policy/clip_fraction"] = abs(rng.gauss(0.07, 0.02))
            row["policy/ratio_max"] = 1e9 if step == 217 else 1 + abs(rng.gauss(0, 0.3))
            row["values/explained_variance"] = None if step < 20 else 0.8 * math.tanh(3 * t)
        if step % 40 == 0 or step == 1:
            row["eval/loss"] = 0.71 - 0.1 * t + 0.04 * max(0, t - 0.6)
            if stage == "ppo":
                row |= {"eval/kl": 5.4 * t, "eval/score": 0.3 + 2.1 * t}
                row["eval/gold"] = 0.52 + 0.9 * t - 0.88 * t * t
            if stage in ("dpo", "reward"):
                row["eval/rewards/accuracies"] = 0.5 + 0.21 * math.tanh(4 * t)
        if step == 400:
            row["train/peak_memory_gb"] = 1.27
        rows.append(row)
    return rows
