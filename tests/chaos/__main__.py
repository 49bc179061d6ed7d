"""Kills runs of every algorithm, hundreds of times, and says whether each ended with the bytes of an uninterrupted one.

    make chaos                                            200 kills of each algorithm, 20 of them in fresh processes
    make chaos ARGS="ppo rloo --kills 20 --minutes 2"     some algorithms, fewer kills, at most two minutes of each

Processes are forked after the imports, which takes a tenth of a second instead of some, but for every tenth. Writes
benchmarks/results/chaos.json; what an earlier call found of other algorithms stays there. The exit code is 1 where
anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.chaos.kills import Tally, base_model, chaos
from tests.chaos.runs import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "chaos.json"


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.chaos")
    parser.add_argument("algorithms", nargs="*", default=ALGORITHMS, metavar="ALGORITHM", help=", ".join(ALGORITHMS))
    parser.add_argument("--kills", type=int, default=200, help="of each algorithm")
    parser.add_argument("--minutes", type=float, default=30.0, help="at most, of each algorithm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if odd := set(given.algorithms) - set(ALGORITHMS):
        parser.error(f"no runs of {', '.join(sorted(odd))}; there are: {', '.join(ALGORITHMS)}")
    found: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        base = base_model(folder)
        for algorithm in given.algorithms:
            fresh = given.kills // 10
            runs = chaos(
                algorithm,
                folder / algorithm,
                base,
                forked=given.kills - fresh,
                fresh=fresh,
                seconds=60 * given.minutes,
                seed=given.seed,
            )
            found.append(Tally(algorithm))
            for found[-1] in runs:
                print(_line(found[-1]), end="\r", file=sys.stderr)
            print(_line(found[-1]), file=sys.stderr)
            _write(given.out, found[-1], seed=given.seed)
    return int(any(tally.mismatches or tally.kills < given.kills for tally in found))


def _line(tally: Tally) -> str:
    return (
        f"{tally.algorithm}: {tally.kills} kills of {tally.runs} runs, {tally.restarts} restarts, "
        f"{len(tally.mismatches)} files differ, {tally.seconds:.0f} s"
    )


def _write(out: Path, tally: Tally, *, seed: int) -> None:
    """Beside what the file says of other algorithms."""
    before: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))["cases"] if out.is_file() else []
    own = {"case": tally.algorithm, **tally.as_dict(), "seed": seed, "commit": _commit()}
    own["agree"] = not own["mismatches"]
    cases = [own, *(case for case in before if case["case"] != tally.algorithm)]
    result = {
        "command": f"make chaos ARGS={shlex.quote(' '.join(sys.argv[1:]))}" if sys.argv[1:] else "make chaos",
        "commit": _commit(),
        "date": date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "cases": sorted(cases, key=lambda case: ALGORITHMS.index(case["case"])),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
