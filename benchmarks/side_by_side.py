"""Runs both sides of a benchmark beside TRL in fresh processes by turns, and compares what they measured. What they are
given is made in `given`.

Their losses at every step decide whether a comparison counts. Run as a script it is our side of one run:
`side_by_side.py JOB RESULT`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE / "peers" / ".venv" / "bin" / "python"
AGREEMENT = {True: "agree", False: "DIFFER", None: ""}
"""None: what agrees with nothing by design, a baseline."""
TOLERANCE = 1e-4
"""Both sides' losses may differ by this share of the peer's, at every step."""


# --- one run of one side -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """One setting of the peer beside our run on the same rows."""

    peer_name: str
    ours: dict[str, Any]
    """Our recipe."""
    peer: dict[str, Any]
    """The job that peers/train.py reads."""
    units: list[int]
    """Of each step: tokens or pairs."""
    warmup: int
    """Steps that are not timed."""


Result = dict[str, Any]
"""What one run of one side measured: `seconds` at the end of each step, `losses`, `peak` MB of the whole process,
`prepared` seconds to tokenise and, on our side of DPO, for the reference, `whole` seconds from the call, with imports
done, to the end of the last step, and `versions`; ours also what it logged, `lines`."""


def run(command: Sequence[str | Path], job: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> Result:
    """A side's result; its messages are shown only when it fails. `variables` of the environment are its own."""
    with tempfile.TemporaryDirectory() as folder:
        order, found = Path(folder) / "job.json", Path(folder) / "result.json"
        order.write_text(json.dumps(job))
        environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}
        process = subprocess.run(
            [*map(str, command), str(order), str(found)],
            env=os.environ | environment | dict(variables or {}),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            raise SystemExit(f"{process.stdout[-4000:]}\n{' '.join(map(str, command))} failed")
        return json.loads(found.read_text())


def run_ours(recipe: dict[str, Any]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return run([sys.executable, HERE / "side_by_side.py"], recipe | {"run": {"directory": folder, "name": "run"}})


def run_peer(script: str, job: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> Result:
    if not PEER_PYTHON.exists():
        raise SystemExit("the peers' environment is missing: make peers")
    return run([PEER_PYTHON, HERE / "peers" / script], job, variables)


def ours(recipe: dict[str, Any]) -> Result:
    """Our side of one run: the real stage with all that it writes, its source timed."""
    import fairlead
    from fairlead.algorithms import find

    for name in ("fairlead.runner", "peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    algorithm, prepared = find(recipe["algorithm"]), list[float]()

    def source(stage: Any) -> Any:
        start = time.perf_counter()
        made = algorithm.source(stage)
        prepared.append(time.perf_counter() - start)
        return made

    globals()["TIMED"] = replace(algorithm, source=source)
    began = time.time()
    finished = fairlead.train(recipe | {"algorithm": "__main__:TIMED"})
    log = finished.path / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "seconds": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "peak": peak_memory(),
        "prepared": prepared[0],
        "whole": log.stat().st_mtime - began,
        "lines": lines,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def peak_memory() -> float:
    """VmHWM of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


# --- comparing -----------------------------------------------------------------------------------------------------


def interleave(case: str, ways: Sequence[Way], repeats: int) -> list[list[tuple[Result, Result]]]:
    """Runs by turns, (ours, the peer's) for each way and repeat. Ways with the same rows share our run."""
    found: list[list[tuple[Result, Result]]] = [[] for _ in ways]
    for number in range(1, repeats + 1):
        known: dict[str, Result] = {}
        for way, runs in zip(ways, found, strict=True):
            key = json.dumps(way.ours)
            if key not in known:
                known[key] = run_ours(way.ours)
            runs.append((known[key], run_peer("train.py", way.peer)))
            mine, theirs = runs[-1]
            say(
                f"{case}, {way.peer_name}, {number}/{repeats}: {rate(way, mine):,.2f} and {rate(way, theirs):,.2f} /s, "
                f"{mine['peak']:,.0f} and {theirs['peak']:,.0f} MB, losses differ by {difference(runs):.1e}"
            )
    return found


def rate(way: Way, result: Result) -> float:
    """Units a second over the timed steps."""
    seconds = result["seconds"]
    return sum(way.units[way.warmup :]) / (seconds[-1] - seconds[way.warmup - 1])


def peak(_: Way, result: Result) -> float:
    return result["peak"]


def difference(runs: Sequence[tuple[Result, Result]]) -> float:
    """The largest of any step of any repeat, as a share of the peer's loss."""
    return max(
        abs(one - other) / abs(other)
        for mine, theirs in runs
        for one, other in zip(mine["losses"], theirs["losses"], strict=True)
    )


Measure = Callable[[Way, Result], float]
Metrics = Mapping[tuple[str, str], tuple[Measure, Measure]]
"""(name, unit) -> how it is had on our side and on the peer's."""
PEAK: Metrics = {("peak memory of the process", "MB"): (peak, peak)}


def results(
    case: str, ways: Sequence[Way], found: Sequence[Sequence[tuple[Result, Result]]], metrics: Metrics
) -> list[dict[str, Any]]:
    """A line for each metric and setting of the peer. The first metric is a speed, and says which setting is best."""
    speed = next(iter(metrics.values()))[1]
    speeds = [statistics.median(speed(way, each[1]) for each in runs) for way, runs in zip(ways, found, strict=True)]
    return [
        {
            "case": case,
            "metric": metric,
            "unit": unit,
            **compared([mine(way, each[0]) for each in runs], [theirs(way, each[1]) for each in runs]),
            "peer_name": way.peer_name,
            "best_of_peer": own == max(speeds),
            "repeats": len(runs),
            "agree": difference(runs) <= TOLERANCE,
            "losses_differ_by": float(f"{difference(runs):.1e}"),
        }
        for way, runs, own in zip(ways, found, speeds, strict=True)
        for (metric, unit), (mine, theirs) in metrics.items()
    ]


def compared(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(mine, others, strict=True)]
    return {
        "ours": round(statistics.median(mine), 2),
        "peer": round(statistics.median(others), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }


def versions(found: Sequence[Sequence[tuple[Result, Result]]]) -> dict[str, str]:
    mine, theirs = found[0][0]
    return mine["versions"] | theirs["versions"]


# --- the command ---------------------------------------------------------------------------------------------------


def options(
    about: str | None,
    name: str,
    *,
    sizes: Sequence[str] = ("S", "M"),
    repeats: int = 3,
    folders: Sequence[str] = ("hh-rlhf", "text"),
) -> argparse.ArgumentParser:
    """`sizes` of models to choose from, and the `folders` of data that are needed; either may be none."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sizes:
        parser.add_argument("--sizes", nargs="+", choices=list(sizes), default=list(sizes))
    parser.add_argument("--repeats", type=int, default=repeats)
    if folders:
        default = os.environ.get("FAIRLEAD_DATA")
        parser.add_argument("--data", default=default, help=f"folder that holds {', '.join(folders)}")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    return parser


def data_folder(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> Path:
    if not settings.data:
        parser.error("name the folder of the data sets by --data or FAIRLEAD_DATA")
    return Path(settings.data)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for models and rows, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="fairlead-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_results(
    out: Path,
    name: str,
    cases: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
    remark: str,
    **more: Any,
) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    result = {
        "command": f"make bench-{name} ARGS={' '.join(sys.argv[1:])!r}",
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
        "versions": dict(versions),
        "remark": remark,
        **more,
        "cases": list(cases),
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    for each in cases:
        best = "*" if each.get("best_of_peer", True) else " "
        numbers = f"{each['ours']:10.3f} {each['peer']:10.3f} {each['ratio']:7.3f}"
        spread = f"[{each['ratio_low']:.3f} {each['ratio_high']:.3f}] {AGREEMENT[each['agree']]}"
        say(f"{best} {each['case']:14} {each['metric']:30} {numbers} {spread}  {each['peer_name']}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(ours(json.loads(Path(sys.argv[1]).read_text()))))
