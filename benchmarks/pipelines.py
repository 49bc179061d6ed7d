"""What scripts share that turn finished pipelines into figures: reading, and what a result says of its making."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def about(command: str, threads: str) -> Row:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {
        "command": command,
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {threads}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def write_result(result: Row, out: Path) -> None:
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


def sampled_tokens(run: Path) -> int:
    """Of all responses that a run sampled to learn from; those of its evaluations are not counted."""
    return sum(row["length"] for file in sorted(run.glob("rounds/*/samples.jsonl")) for row in read_rows(file))
