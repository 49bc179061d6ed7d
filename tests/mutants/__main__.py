"""Seeds the defects of the lists one at a time into a copy of the package, and runs the tests near it: which one fails?

python -m tests.mutants --out benchmarks/results/mutants.json [--only FILE_OR_NAME ...] [--rest] [--jobs 2]

Each run is a fork of this process, which has imported the libraries already. At the end the tests that caught something
run on the package as it is, and must pass. With --only, and with --rest (what has no result yet), others are kept.
"""

from __future__ import annotations

import argparse
import compileall
import gc
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tests.mutants.defects import PACKAGE, Defect, defects, tier

TIER_SECONDS = 60
LIMIT_SECONDS = 3 * TIER_SECONDS
"""Of a core; what a defect makes run longer is stopped."""
LIBRARIES = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "safetensors.torch",
    "sklearn",
    "pytest",
    "hypothesis",
)
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--assert=plain")
ROOT = PACKAGE.parents[1]


@dataclass(slots=True)
class Run:
    """What pytest said: its exit status, the first test that failed, and the seconds of a core."""

    status: int
    failed: str = ""
    seconds: float = 0.0
    output: str = ""


class Watch:
    """A plugin of pytest that keeps the names of what failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


Task = tuple[Sequence[str], Defect | None]
"""Test files, and what is wrong in the package meanwhile."""


def runs(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Run]]:
    """Each task's number with what came of it, in the order in which they end."""
    with tempfile.TemporaryDirectory() as scratch:
        left, running = list(enumerate(tasks)), dict[int, tuple[int, Path]]()
        while left or running:
            while left and len(running) < jobs:
                number, (tests, defect) = left.pop(0)
                folder = Path(scratch) / str(number)
                running[_started(folder, tests, defect)] = number, folder
            child, status = os.wait()
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what its tests have left running
            number, folder = running.pop(child)
            said = folder / "said.json"
            found = json.loads(said.read_text("utf-8")) if said.exists() else {}
            found["output"] = (folder / "output").read_text("utf-8", "replace")
            shutil.rmtree(folder)
            yield number, Run(os.waitstatus_to_exitcode(status), **found)


def _started(folder: Path, tests: Sequence[str], defect: Defect | None) -> int:
    """A fork that runs the tests, up to the first failure, on a copy of the package with the defect in it."""
    package = folder / "src" / "fairlead"
    shutil.copytree(PACKAGE, package)  # with what is compiled
    if defect is not None:
        path = package / defect.file
        path.write_text(defect.applied(path.read_text("utf-8")), "utf-8")
    child = os.fork()
    if not child:
        _test(folder, tests)
    return child


def _test(folder: Path, tests: Sequence[str]) -> None:
    """Never returns."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["PYTHONPATH"] = f"{folder / 'src'}:{ROOT}"
    sys.path.insert(0, str(folder / "src"))
    watch, status = Watch(), 99
    try:
        import pytest

        status = int(pytest.main([*OPTIONS, *tests], plugins=[watch]))
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        said = {"failed": next(iter(watch.failed), ""), "seconds": sum(u.ru_utime + u.ru_stime for u in used)}
        (folder / "said.json").write_text(json.dumps(said), "utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def refuse_false_alarms(rows: Iterable[dict[str, Any]]) -> None:
    """The tests that caught something pass on the package as it is. Exits where one does not."""
    tests = sorted({row["by"] for row in rows if "::" in row["by"]})
    for _, found in runs([(tests, None)], 1):
        if found.status:
            sys.exit(f"{found.failed} fails on the package as it is:\n{found.output}")


def judged(defect: Defect, found: Run) -> dict[str, Any]:
    is_caught = found.status != 0
    print(f"{'caught  ' if is_caught else 'SURVIVES'} {defect.name}  {found.failed}", file=sys.stderr, flush=True)
    return {
        "name": defect.name,
        "file": defect.file,
        "drawn": defect.drawn,
        "peers": defect.peers,
        "equivalent": defect.equivalent,
        "caught": is_caught,
        "by": found.failed or (f"the run ended with status {found.status}" if is_caught else ""),
        "seconds": round(found.seconds, 1),
    }


def chosen(only: Sequence[str], known: Collection[str]) -> Iterator[Defect]:
    """Those asked for; else those that are not ``known``."""
    for defect in defects():
        if any(word in (defect.name, defect.file) for word in only) if only else defect.name not in known:
            yield defect


def result(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """With the score: what was caught of what is no equivalent."""
    real = [row for row in rows if not row["equivalent"]]
    caught = sum(row["caught"] for row in real)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "command": "make mutants",
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()},
        "defects": len(rows),
        "not_run": len(defects()) - len(rows),
        "equivalent": len(rows) - len(real),
        "caught": caught,
        "score": caught / len(real),
        "cases": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "mutants.json")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rest", action="store_true", help="only what has no result yet")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.chdir(ROOT)
    for name in LIBRARIES:
        __import__(name)
    gc.freeze()  # what is imported is never looked through again, by no fork
    compileall.compile_dir(PACKAGE, quiet=1)
    rows = {row["name"]: row for row in json.loads(given.out.read_text("utf-8"))["cases"]} if given.out.exists() else {}
    wanted = list(chosen(given.only, rows if given.rest else ()))
    rows = rows if given.only or given.rest else {}
    for number, found in runs([(tier(defect.file), defect) for defect in wanted], given.jobs):
        rows[wanted[number].name] = judged(wanted[number], found)
        _save(given.out, rows)
    refuse_false_alarms(rows[defect.name] for defect in wanted)
    if long := [row for row in rows.values() if not row["caught"] and (row["seconds"] or 0) > TIER_SECONDS]:
        sys.exit(f"the tests of {long[0]['file']} take {long[0]['seconds']} s, a tier at most {TIER_SECONDS}")


def _save(out: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    found = result([rows[defect.name] for defect in defects() if defect.name in rows])
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
