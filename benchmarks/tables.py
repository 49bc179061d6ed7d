"""The tables of the documentation from the figures that are committed.

python benchmarks/tables.py quality
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Result = Mapping[str, Any]


def quality(result: Result) -> str:
    """Accuracy on held-out pairs: ours, TRL's and the baselines', a row a case."""
    lines = ["| case | ours | TRL | length only | TF-IDF |", "|---|---|---|---|---|"]
    cases = dict.fromkeys(line["case"] for line in result["cases"])
    for case in cases:
        by = {line["peer_name"]: line for line in result["cases"] if line["case"] == case}
        own = interval(next(iter(by.values())), "ours")
        others = [interval(by[name], "peer") if name in by else "" for name in ("TRL", "length only", "TF-IDF")]
        lines.append(f"| {case} | {own} | {' | '.join(others)} |")
    return "\n".join(lines)


def interval(line: Result, side: str) -> str:
    return f"{line[side]:.3f} [{line[f'{side}_low']:.3f}, {line[f'{side}_high']:.3f}]"


TABLES: dict[str, Callable[[Result], str]] = {"quality": quality}

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        print(TABLES[name](json.loads((RESULTS / f"{name}.json").read_text("utf-8"))))
