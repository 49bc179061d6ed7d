"""What the pipeline imdb-sentiment found, as benchmarks/results/imdb-sentiment.json: figures of held-out prompts before
and after each algorithm, accuracies of the two classifiers, and the source's four prompts one by one.

    fairlead pipeline imdb-sentiment data.path=ACLIMDB data.second=RT_POLARITY
    python benchmarks/imdb_sentiment.py runs/imdb-sentiment
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME = "imdb-sentiment"
COMMAND = f"fairlead pipeline {NAME} data.path=ACLIMDB data.second=RT_POLARITY"
ALGORITHMS = ("ppo", "raft")
SCORES = {"positive": "the classifier PPO learned from", "second": "the classifier of rt-polarity"}
UNITS = {"kl": "nats", "length": "tokens", "distinct_2": "share", "distinct_1": "share", "finished": "share"}


def held_out(folder: Path) -> list[dict[str, Any]]:
    """Each figure of the evaluation, before and after each algorithm that was run."""
    found = json.loads((folder / "evaluation" / "metrics.json").read_text("utf-8"))
    return [
        {
            "case": "held-out prompts",
            "algorithm": algorithm,
            "metric": metric,
            "unit": UNITS.get(metric, "probability"),
            "before": found["pretrain"].get(metric),
            "ours": after,
            "peer": None,
        }
        for algorithm in ALGORITHMS
        if algorithm in found
        for metric, after in found[algorithm].items()
    ]


def sampled_tokens(folder: Path) -> dict[str, int]:
    """Of the responses that each algorithm sampled to learn from."""
    files = {name: sorted((folder / name).glob("rounds/*/samples.jsonl")) for name in ALGORITHMS}
    lines = {name: [line for file in found for line in file.open(encoding="utf-8")] for name, found in files.items()}
    return {name: sum(json.loads(line)["length"] for line in found) for name, found in lines.items() if found}


def accuracies(folder: Path) -> list[dict[str, Any]]:
    """Of the classifiers, on what they were not trained on."""
    cases: list[dict[str, Any]] = []
    for run in ("classifier", "second"):
        metrics = json.loads((folder / run / "summary.json").read_text("utf-8"))["metrics"]
        ours, of = metrics["eval/rewards/accuracies"]["mean"], json.loads((folder / run / "manifest.json").read_text())
        number = of.get("data", {}).get("eval", {}).get("kept")
        cases.append(
            {"case": run, "metric": "held-out accuracy", "unit": "share", "ours": ours, "peer": None, "n": number}
        )
    return cases


def prompts(folder: Path) -> list[dict[str, Any]]:
    """The prompts of the source: the mean over their responses, and the first response, before and after."""
    lines = (folder / "ppo" / "eval_prompts.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    steps = {row["step"] for row in rows}
    first, last = ([row for row in rows if row["step"] == step] for step in (min(steps), max(steps)))
    return [
        {
            "prompt": before["prompt"],
            "samples": len(before["scores"]),
            "before": round(before["score"], 3),
            "after": round(after["score"], 3),
            "change": round(after["score"] - before["score"], 3),
            "response_before": before["response"],
            "response_after": after["response"],
        }
        for before, after in zip(first, last, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the finished pipeline")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{NAME}.json")
    given = parser.parse_args()
    summary = json.loads((given.folder / "summary.json").read_text("utf-8"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "command": COMMAND,
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seconds": {name: stage["seconds"] for name, stage in summary["stages"].items()},
        "scores": SCORES,
        "sampled_tokens": sampled_tokens(given.folder),
        "cases": held_out(given.folder) + accuracies(given.folder),
        "prompts": prompts(given.folder),
    }
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
