"""What the pipeline random-walks found with some seeds, as benchmarks/results/random-walks.json: optimality after each
algorithm and on the way there, drawn as docs/concepts/random-walks.svg; the tables of that page go to stdout.

    for seed in 0 1 2; do fairlead pipeline random-walks seed=$seed name=random-walks-$seed; done
    python -m benchmarks.random_walks runs/random-walks-0 runs/random-walks-1 runs/random-walks-2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from benchmarks.pipelines import RESULTS, ROOT, about, read_json, read_rows, write_result
from matplotlib import rc_context
from matplotlib.figure import Figure

COMMAND = "for seed in 0 1 2; do fairlead pipeline random-walks seed=$seed name=random-walks-$seed; done"
ALGORITHMS = ("ppo", "rloo", "grpo", "raft", "online_dpo", "dpo")
WANTED = 0.95
SHOWN_EVERY = 16


def curve(run: Path) -> dict[str, float]:
    """Optimality by step, where the run evaluated it on its way."""
    rows = read_rows(run / "metrics.jsonl")
    return {str(row["step"]): round(row["eval/score"], 4) for row in rows if "eval/score" in row}


def cases(folder: Path) -> list[dict[str, Any]]:
    """Of one finished pipeline, each algorithm."""
    found = read_json(folder / "evaluation" / "metrics.json")
    seed = yaml.safe_load((folder / "pipeline.yaml").read_text("utf-8"))["seed"]
    seconds = read_json(folder / "summary.json")["stages"]
    made: list[dict[str, Any]] = []
    for algorithm in ALGORITHMS:
        steps = curve(folder / algorithm)
        made.append(
            {
                "case": algorithm,
                "seed": seed,
                "metric": "optimality",
                "unit": "share of the shortest way's",
                "before": found["pretrain"]["optimality"],
                "ours": found[algorithm]["optimality"],
                "peer": None,
                "passed": next((int(step) for step, value in steps.items() if value >= WANTED), None),
                "seconds": seconds[algorithm]["seconds"],
                "curve": steps,
            }
        )
    return made


# --- as the page shows it --------------------------------------------------------------------------------------------


def of(result: dict[str, Any], algorithm: str) -> list[dict[str, Any]]:
    return [case for case in result["cases"] if case["case"] == algorithm]


def outcomes(result: dict[str, Any]) -> str:
    """The first table: after training, by seed."""
    seeds = [case["seed"] for case in of(result, "ppo")]
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | {WANTED} passed at step |"]
    lines.append("|---" * (len(seeds) + 3) + "|")
    rows = {"before": [case["before"]["mean"] for case in of(result, "ppo")]}
    rows |= {f"`{name}`": [case["ours"]["mean"] for case in of(result, name)] for name in ALGORITHMS}
    for name, values in rows.items():
        passed = [case["passed"] for case in of(result, name.strip("`")) if case["curve"]]
        steps = ", ".join("never" if step is None else str(step) for step in passed)
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in [*values, mean(values)])} | {steps} |")
    return "\n".join(lines)


def by_step(result: dict[str, Any], name: str) -> dict[int, list[float]]:
    """Of one algorithm, the optimality of each seed."""
    curves = [case["curve"] for case in of(result, name)]
    return {int(step): [each[step] for each in curves] for step in curves[0]}


def sampled(result: dict[str, Any]) -> list[str]:
    return [name for name in ALGORITHMS if by_step(result, name)]


def progress(result: dict[str, Any]) -> str:
    """The second table: on the way, mean over the seeds and the lowest and highest of them."""
    names = sampled(result)
    lines = [f"| step | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for step in sorted(by_step(result, names[0])):
        if step % SHOWN_EVERY == 0:
            found = [by_step(result, name)[step] for name in names]
            cells = [f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in found]
            lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], out: Path) -> None:
    """A line for the mean over seeds, a band from the lowest to the highest; the same bytes for the same numbers."""
    with rc_context({"svg.hashsalt": "random-walks", "font.size": 9}):
        figure = Figure(figsize=(7, 3.6), facecolor="white", layout="constrained")
        axes = figure.subplots()
        for name in sampled(result):
            found = sorted(by_step(result, name).items())
            steps, values = [step for step, _ in found], [each for _, each in found]
            (line,) = axes.plot(steps, list(map(mean, values)), label=name, linewidth=1.5)
            axes.fill_between(
                steps, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15, linewidth=0
            )
        for level, told in ((result["floor"], "random walks"), (WANTED, f"{WANTED}")):
            axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(told, (steps[-1], level), va="bottom", ha="right", color="grey")
        axes.set(xlabel="optimizer step", ylabel="mean optimality", ylim=(0.2, 1.0), xlim=(0, steps[-1]))
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.25), frameon=False)
        figure.savefig(out, format="svg", metadata={"Date": None})


def summarise(folders: Sequence[Path]) -> dict[str, Any]:
    return {
        **about(COMMAND, "one thread a run"),
        "floor": round(read_json(folders[0] / "prepared" / "manifest.json")["counts"]["optimality"], 4),
        "ceiling": 1.0,
        "cases": [case for folder in folders for case in cases(folder)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of finished pipelines, one a seed")
    parser.add_argument("--out", type=Path, default=RESULTS / "random-walks.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "concepts" / "random-walks.svg")
    given = parser.parse_args()
    result = summarise(given.folders)
    write_result(result, given.out)
    draw(result, given.svg)
    print(outcomes(result), progress(result), sep="\n\n")


if __name__ == "__main__":
    main()
