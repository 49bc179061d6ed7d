"""One step of each algorithm on 2 and 4 ranks against one process, as benchmarks/results/parity.json: the largest
relative difference of a gradient in fp64 and fp32, and the share of sampled tokens that differ in fp32.

    make parity            # ARGS="--sizes 2 --algorithms sft,ppo" for a part
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from datetime import date
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tests.end_to_end.rows import ONLINE, ROWS
from tests.ranks import on_ranks
from tests.tiny import relative_error
from tests.training.parity import step

from fairlead.types import Ranks

ROOT = Path(__file__).parents[1]
ALGORITHMS = ("sft", "reward", "dpo", "kto", "bco", "ppo", "rloo", "grpo", "raft", "online_dpo")
BOUNDS = {"float64": 1e-12, "float32": 1e-5}
TOKENS = 1e-4
"""Of all sampled tokens, those that may differ in fp32."""
LARGE = {"rollout_size": 64, "rollout_rows": 16, "num_samples": 4, "max_new_tokens": 32}
PROMPTS = [
    {"prompt": f"{row['prompt']} ({n})", "topic": row["prompt"].split()[3]} for n, row in enumerate(2 * ROWS["sft"])
]


def on_all_sizes(
    algorithm: str, sizes: list[int], folder: Path, settings: dict[str, Any], rows: Any = None
) -> list[list[Any]]:
    """What each rank has of the step, for one process first."""

    def work(ranks: Ranks) -> dict[str, Any]:
        return step(algorithm, ranks, folder / f"run-{ranks.size}", settings, rows)

    found = [on_ranks(1, folder / "1", lambda _: work(Ranks()))]
    found += [on_ranks(size, folder / str(size), work) for size in sizes]
    if failed := [each for ranks in found for each in ranks if not isinstance(each, dict)]:
        raise SystemExit(f"{algorithm}: {failed[0]}")
    return found


def differing_tokens(wanted: list[list[int]], got: list[list[int]]) -> tuple[int, int]:
    """Tokens that differ, and all."""
    pairs = [pair for one, other in zip(wanted, got, strict=True) for pair in zip_longest(one, other)]
    return sum(a != b for a, b in pairs), len(pairs)


def cases(algorithm: str, sizes: list[int], folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def add(metric: str, unit: str, value: float, bound: float, size: int) -> None:
        found.append(
            {
                "case": algorithm,
                "ranks": size,
                "metric": metric,
                "unit": unit,
                "ours": value,
                "peer": bound,
                "peer_name": "bound",
                "agree": value <= bound,
            }
        )

    for dtype, bound in BOUNDS.items():
        alone, *several = on_all_sizes(algorithm, sizes, folder / dtype, {"model.dtype": dtype})
        for size, ranks in zip(sizes, several, strict=True):
            worst = max(relative_error(each["gradients"], alone[0]["gradients"]) for each in ranks)
            add(f"gradient in {dtype}", "largest ||difference|| / ||gradient||", worst, bound, size)
    if algorithm in ONLINE:
        more = {f"{algorithm}.{name}": value for name, value in LARGE.items()}
        more |= {"model.dtype": "float32", "train.batch_size": 8, "data.max_length": 64, "data.max_prompt_length": 32}
        alone, *several = on_all_sizes(algorithm, sizes, folder / "tokens", more, PROMPTS)
        for size, ranks in zip(sizes, several, strict=True):
            different, all_tokens = differing_tokens(alone[0]["tokens"], ranks[0]["tokens"])
            add(
                "sampled tokens in float32", f"share that differs of {all_tokens}", different / all_tokens, TOKENS, size
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2,4")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "parity.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    made: list[dict[str, Any]] = []
    for algorithm in given.algorithms.split(","):
        with tempfile.TemporaryDirectory() as folder:
            made += cases(algorithm, [int(size) for size in given.sizes.split(",")], Path(folder))
        for row in made:
            if row["case"] == algorithm:
                figure = f"{row['ours']:.2e}  (bound {row['peer']:.0e})"
                print(f"{algorithm:12} {row['ranks']} ranks  {row['metric']:28} {figure}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": "make parity",
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "hardware": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cases": made,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if not all(row["agree"] for row in made):
        raise SystemExit("a figure is beyond its bound")


if __name__ == "__main__":
    main()
