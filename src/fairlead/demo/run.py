"""`fairlead demo`: writes the miniature site, runs the shipped pipeline on it, checks and shows the figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairlead.demo.site import write_dump
from fairlead.errors import RunError

NUM_QUESTIONS = 8000
BEST = "best_of_4"
MODELS = ("sft", BEST, "ppo", "dpo", "kto", "raft", "ppo_no_kl")
METRICS = ("gold", "score", "kl", "length", "distinct_2", "win_rate")


def run_demo(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """The chain from the site's dump to the report, for one seed; returns the checked summary."""
    from fairlead.pipeline import run_pipeline

    print(
        "The whole chain, offline: a question-and-answer site of an invented world is written, a small model learns\n"
        "to answer on it, and PPO, DPO, KTO and RAFT align it to the site's votes. The world knows the true quality\n"
        "(gold) of any answer; training sees votes only.",
        file=sys.stderr,
    )
    dump = out.parent / f"{out.name}-site"
    write_dump(dump, seed=seed, num_questions=NUM_QUESTIONS)
    summary = run_pipeline(
        "demo", {"name": out.name, "directory": str(out.parent), "seed": seed, "data.path": str(dump)}
    )
    check(summary)
    show(summary, out)
    return summary


def check(summary: dict[str, Any]) -> None:
    """Every figure of the table is there, finite, with an interval. Raises RunError naming the first that is not."""
    for model in MODELS:
        metrics = summary.get("models", {}).get(model, {}).get("metrics", {})
        for name in METRICS:
            if model == "sft" and name in ("kl", "win_rate"):
                continue
            found = metrics.get(name, {})
            wanted = ("mean",) if (model, name) == (BEST, "kl") else ("mean", "low", "high")  # computed, not measured
            if not all(isinstance(v := found.get(k), (int, float)) and math.isfinite(v) for k in wanted):
                raise RunError(f"the demo's summary lacks models.{model}.metrics.{name} with its interval: {found}")


def show(summary: dict[str, Any], out: Path) -> None:
    """The table and what it says, computed from the figures."""
    from fairlead.evaluation.show import print_table

    models = {name: summary["models"][name]["metrics"] for name in MODELS}
    print_table({name: {m: metrics[m] for m in METRICS if m in metrics} for name, metrics in models.items()})
    start = models["sft"]["gold"]
    for name in MODELS[1:]:
        gold = models[name]["gold"]
        apart = gold["low"] > start["high"] or gold["high"] < start["low"]
        word = "raised" if gold["mean"] > start["mean"] else "lowered"
        print(
            f"{name} {word} gold from {start['mean']:.3f} to {gold['mean']:.3f}"
            f" ({'beyond' if apart else 'within'} the intervals)"
        )
    print(f"report: {out / 'report.html'}")
    print(
        f"next: fairlead train dpo run.name=mine model.path={out / 'sft'} model.adapter=null"
        f" data.path={out / 'prepared'} data.template=auto data.max_length=192 dpo.beta=0.05"
    )


def run_seeds(out: Path, *, seeds: Sequence[int]) -> dict[str, Any]:
    """The demo over several seeds: per-prompt gains in gold over SFT, pooled, with a sign-flip test."""
    from fairlead.evaluation.metrics import sign_flip_p_value

    for seed in seeds:
        run_demo(out / f"seed-{seed}", seed=seed)
    result: dict[str, Any] = {"seeds": list(seeds), "models": {}}
    for model in MODELS[1:]:
        gains: list[float] = []
        prompts: list[str] = []
        by_seed: list[float] = []
        for seed in seeds:
            before, after = (_gold(_responses(out / f"seed-{seed}", name)) for name in ("sft", model))
            mine = [after[prompt] - before[prompt] for prompt in before]
            gains += mine
            prompts += [f"{seed} {prompt}" for prompt in before]
            by_seed.append(sum(mine) / len(mine))
        p_value = sign_flip_p_value(gains, prompts, seed=0)
        result["models"][model] = {
            "gold_gain": sum(gains) / len(gains),
            "by_seed": by_seed,
            "p_value": p_value,
            "n": len(gains),
        }
        print(f"{model}: gold {sum(gains) / len(gains):+.3f} over SFT (by seed {by_seed}), p = {p_value:.4f}")
    (out / "seeds.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def _responses(folder: Path, model: str) -> Path:
    """Where a model's responses to held-out prompts are; the best of several stand beside their policy's own."""
    return (
        folder / "sft" / "evaluation" / f"{BEST}.jsonl"
        if model == BEST
        else (folder / model / "evaluation" / "responses.jsonl")
    )


def _gold(responses: Path) -> dict[str, float]:
    """Mean gold of each prompt's draws."""
    sums: dict[str, list[float]] = {}
    for line in responses.read_text("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            sums.setdefault(row["prompt"], []).append(row["scores"]["gold"])
    return {prompt: sum(scores) / len(scores) for prompt, scores in sums.items()}
