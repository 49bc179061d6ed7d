"""Checks and measures every stage on one GPU and writes one JSON: ``python -m benchmarks.gpu --out FILE``.

This process imports no torch. Each stage runs in a process of its own, which imports while the one before it works; the
file is written anew after each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.plan import BESIDE, CHECKS, SIZES, STAGES, planned
from benchmarks.gpu.processes import HERE, ROOT, Waiting, say
from benchmarks.gpu.results import Case, lines, table

PEERS = ROOT / "benchmarks" / "peers" / ".venv" / "bin" / "python"
LONGEST = {"checks": 200.0, "machine": 150.0}
"""Seconds a stage may take; the others 100, like a peer."""
LATE = 30.0
"""Seconds over the time a stage that has begun may take."""


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of results")
    parser.add_argument("--size", choices=SIZES, default="1B", help="of the random Llama; 1B")
    parser.add_argument("--device", default="cuda")
    for name, known in (("only", STAGES), ("checks", CHECKS)):
        says = f"these alone of: {', '.join(known)}"
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=list(known), metavar="NAME", help=says)
    parser.add_argument("--modes", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no stage begins; 8")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timed steps in each case; 6")
    parser.add_argument("--repeats", type=int, default=1, help="of each stage, by turns with its peer; 1")
    parser.add_argument("--peer-python", default="auto", help="an interpreter that has TRL; none: no peer")
    return parser


def peer_python(wanted: str) -> tuple[str | None, str]:
    """The interpreter of the peer; where there is none, why."""
    if wanted == "none":
        return None, "--peer-python none"
    if wanted != "auto":
        return wanted, ""
    if importlib.util.find_spec("trl") is not None:
        return sys.executable, ""
    if PEERS.is_file():
        return str(PEERS), ""
    return None, "trl is not importable, there is no benchmarks/peers/.venv, and --peer-python names none"


@dataclass
class Run:
    """What was asked, and what has come of it."""

    given: argparse.Namespace
    work: Path
    peer: str | None
    waiting: Waiting
    began: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    troubles: list[dict[str, str]] = field(default_factory=list)
    """What failed or was left out, and why."""
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage, and of all peers."""

    @property
    def left(self) -> float:
        return 60 * self.given.minutes - (time.monotonic() - self.began)

    def ask(self, stage: str, mode: str = "", **more: Any) -> list[dict[str, Any]]:
        """By the process that waits; another one begins to."""
        current, self.waiting = self.waiting, processes.ours(self.work)
        asked = {name: getattr(self.given, name) for name in ("size", "device", "seconds")} | more
        job = {"stage": stage, "mode": mode, "work": str(self.work), "limits": self.facts.get("limits"), **asked}
        with self._clock(f"{stage} {mode}".strip()):
            return current.ask(job, min(LONGEST.get(stage, 100.0), self.left + LATE))

    def ask_peer(self, beside: Waiting, job: Mapping[str, Any]) -> dict[str, Any]:
        with self._clock("peers"):
            found = beside.ask(job, min(100.0, self.left + LATE))
        return found[-1] if found else {"failed": "it said nothing"}

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.took[name] = round(self.took.get(name, 0.0) + time.monotonic() - began, 1)

    def trouble(self, what: str, reason: str) -> None:
        self.troubles.append({"what": what, "reason": reason})
        say(f"{what}: {reason}")

    def write(self) -> None:
        result = {
            "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}",
            "commit": commit(),
            "date": date.today().isoformat(),
            "hardware": self.facts.get("hardware"),
            "versions": self.facts.get("versions"),
            "size": self.given.size,
            "limits": self.facts.get("limits"),
            "checks": self.checks,
            "cases": self.cases,
            "troubles": self.troubles,
            "seconds": self.took,
        }
        temporary = self.given.out.with_name(f".{self.given.out.name}")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.given.out)


def commit() -> str:
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
        return found.stdout.strip()
    return ""


def main() -> int:
    given = options().parse_args()
    given.out = given.out.resolve()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    python, why = peer_python(given.peer_python)
    with tempfile.TemporaryDirectory(prefix="fairlead-gpu-", ignore_cleanup_errors=True) as folder:
        run = Run(given, Path(folder), python, processes.ours(Path(folder)))
        if python is None:
            run.trouble("peers", why)
        try:
            machine(run)
            for stage, mode in planned(given.only, given.size, given.modes):
                name = f"{stage} {mode}".strip()
                try:
                    if run.left <= 0:
                        run.trouble(name, f"left out: {given.minutes:g} minutes were over")
                    elif stage == "checks":
                        check(run)
                    else:
                        measure(run, stage, mode)
                except Exception as error:  # the other stages go on
                    run.trouble(name, f"{type(error).__name__}: {error}")
                run.write()
        finally:
            run.waiting.end()
    return summary(run)


def machine(run: Run) -> None:
    """What the device can do, and the base on disk."""
    for each in run.ask("machine"):
        if "failed" in each:
            run.trouble("machine", each["failed"])
        run.facts |= {key: value for key, value in each.items() if key in ("limits", "hardware", "versions")}
    run.write()
    if "limits" not in run.facts:
        raise SystemExit(f"{run.given.device} cannot be measured: {run.troubles[-1]['reason']}")


def check(run: Run) -> None:
    """All checks; after one that takes its process with it, the others in a new one."""
    names = list(run.given.checks)
    while names:
        found = run.ask("checks", names=names) if run.left > 0 else [{"failed": "no time was left"}]
        run.checks += [each["check"] for each in found if "check" in each]
        began, done = ([each[key] for each in found if key in each] for key in ("begins", "done"))
        reason = next((each["failed"] for each in found if "failed" in each), "its process ended")
        broken = [name for name in began if name not in done] if began else names
        run.checks += [{"check": name, "case": "", "status": "failed", "reason": reason} for name in broken]
        names = [name for name in names if name not in (*done, *broken)]


def measure(run: Run, stage: str, mode: str) -> None:
    """A stage, and its peer on the same rows, by turns."""
    name, found, answers = f"{stage} {mode}".strip(), dict[str, list[Case]](), dict[str, list[dict[str, Any]]]()
    for number in range(run.given.repeats):
        if number and run.left <= 0:
            break
        beside = processes.peer(run.work, run.peer) if run.peer is not None and stage in BESIDE else None
        try:
            for each in run.ask(stage, mode):
                if "failed" in each:
                    run.trouble(name, each["failed"])
                if "name" not in each:
                    continue
                case = Case(**each)
                found.setdefault(case.name, []).append(case)
                if beside is None or case.job is None:
                    continue
                answer = run.ask_peer(beside, case.job)
                if "failed" in answer:
                    run.trouble(f"{case.name}, the peer", answer["failed"])
                else:
                    answers.setdefault(case.name, []).append(answer)
        finally:
            if beside is not None:
                beside.end()
    for case_name, repeats in found.items():
        made = lines(repeats, answers.get(case_name, []))
        run.cases += made
        say(table(made))


def summary(run: Run) -> int:
    """Says how the checks went; 1 where one failed, or anything but the peers is missing."""
    for each in run.checks:
        figures = f"{each['measured']:.2g}, bound {each['bound']:.2g}" if "measured" in each else each["reason"]
        if each["status"] != "passed":
            say(f"{each['status']:8} {each['check']}: {each['case']}: {figures}")
    counts = Counter(each["status"] for each in run.checks)
    told = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped"))
    say(f"checks: {told}; {run.given.out}")
    return int(counts["failed"] > 0 or any("peer" not in each["what"] for each in run.troubles))


if __name__ == "__main__":
    sys.exit(main())
