"""What the pipeline imdb-sentiment found, as benchmarks/results/imdb-sentiment.json: figures of held-out prompts before
and after each algorithm, accuracies of the two classifiers, and the source's four prompts one by one.

    fairlead pipeline imdb-sentiment data.path=ACLIMDB data.second=RT_POLARITY
    python -m benchmarks.imdb_sentiment runs/imdb-sentiment
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.pipelines import RESULTS, about, read_json, read_rows, sampled_tokens, write_result

NAME = "imdb-sentiment"
COMMAND = f"fairlead pipeline {NAME} data.path=ACLIMDB data.second=RT_POLARITY"
ALGORITHMS = ("ppo", "raft")
SCORES = {"positive": "the classifier PPO learned from", "second": "the classifier of rt-polarity"}
UNITS = {"kl": "nats", "length": "tokens", "distinct_2": "share", "distinct_1": "share", "finished": "share"}


def held_out(folder: Path) -> list[dict[str, Any]]:
    """Each figure of the evaluation, before and after each algorithm that was run."""
    found = read_json(folder / "evaluation" / "metrics.json")
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


def accuracies(folder: Path) -> list[dict[str, Any]]:
    """Of the classifiers, on what they were not trained on."""
    cases: list[dict[str, Any]] = []
    for run in ("classifier", "second"):
        metrics = read_json(folder / run / "summary.json")["metrics"]
        ours, of = metrics["eval/rewards/accuracies"]["mean"], read_json(folder / run / "manifest.json")
        number = of.get("data", {}).get("eval", {}).get("kept")
        cases.append(
            {"case": run, "metric": "held-out accuracy", "unit": "share", "ours": ours, "peer": None, "n": number}
        )
    return cases


def prompts(folder: Path) -> list[dict[str, Any]]:
    """The prompts of the source: the mean over their responses, and the first response, before and after."""
    rows = read_rows(folder / "ppo" / "eval_prompts.jsonl")
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
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json")
    given = parser.parse_args()
    summary = read_json(given.folder / "summary.json")
    result = {
        **about(COMMAND, "one thread a stage"),
        "seconds": {name: stage["seconds"] for name, stage in summary["stages"].items()},
        "scores": SCORES,
        "sampled_tokens": {
            name: sampled_tokens(given.folder / name) for name in ALGORITHMS if (given.folder / name).is_dir()
        },
        "cases": held_out(given.folder) + accuracies(given.folder),
        "prompts": prompts(given.folder),
    }
    write_result(result, given.out)


if __name__ == "__main__":
    main()
