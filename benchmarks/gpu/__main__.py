"""Checks and measures every stage on one GPU and writes one JSON: ``python -m benchmarks.gpu --out FILE``.

This process imports no torch. Each stage runs in a process of its own, begun while the one before it works, so that its
imports cost no time; the file is written anew after each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Case, lines, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = ROOT / "benchmarks" / "peers" / ".venv" / "bin" / "python"
STAGES = ("checks", "sft", "dpo", "ppo", "decode", "reward", "pretrain", "head", "score")
"""In the order they run: should time run out, the last are missing."""
IN_MODES = ("sft", "dpo", "ppo", "reward", "pretrain")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error"}
LONGEST = {"checks": 200.0}
"""Seconds a stage may take; the others 100."""


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of results")
    parser.add_argument("--size", choices=("tiny", "0.5B", "1B", "8B"), default="1B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=str(STAGES))
    parser.add_argument("--checks", nargs="+", metavar="CHECK", help="these alone of the checks")
    parser.add_argument("--modes", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no stage begins")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timed steps in each case")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer-python", default="auto", help="an interpreter that has TRL; none: no peer")
    return parser


def modes_of(stage: str, size: str, wanted: Sequence[str]) -> list[str]:
    """What a stage is measured in: all weights of 8B are not trained, and policies of PPO have adapters."""
    if stage not in IN_MODES:
        return [""]
    able = ["lora"] if size == "8B" or stage == "ppo" else ["full", "lora"]
    able = able[:1] if stage in ("pretrain", "reward") else able
    return [mode for mode in able if mode in wanted]


# --- processes -----------------------------------------------------------------------------------------------------


class Child:
    """A process that has begun to import, and waits to be told what to do."""

    def __init__(self, work: Path) -> None:
        number = len(list(work.glob("log-*")))
        self._log, self._out = work / f"log-{number}.txt", work / f"out-{number}.jsonl"
        paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.child"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)},
                cwd=work,
                start_new_session=True,
            )

    def ask(self, job: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
        """What it measured; where it did not come to its end, ``failed`` says why."""
        self._out.touch()
        is_late = False
        try:
            self._process.communicate(json.dumps({**job, "out": str(self._out)}).encode(), max(1.0, seconds))
        except subprocess.TimeoutExpired:
            is_late = True
        except BrokenPipeError:
            pass
        finally:
            self.end()
        found = [json.loads(line) for line in self._out.read_text("utf-8").splitlines() if line.endswith("}")]
        if is_late:
            found.append({"failed": f"stopped after {seconds:.0f} s"})
        elif self._process.returncode and not any("failed" in each for each in found):
            found.append({"failed": f"ended with status {self._process.returncode}: {self._last()}"})
        if any("failed" in each for each in found):
            say(self._log.read_text("utf-8", "replace")[-3000:])
        return found

    def end(self) -> None:
        """With the processes it began, which compile."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last(self) -> str:
        said = self._log.read_text("utf-8", "replace").strip().splitlines()
        return said[-1] if said else "it said nothing"


def ask_peer(python: str, job: Mapping[str, Any], work: Path, seconds: float) -> dict[str, Any]:
    order, found = work / "peer-job.json", work / "peer-result.json"
    order.write_text(json.dumps(job))
    found.unlink(missing_ok=True)
    command = [python, str(HERE / "peer.py"), str(order), str(found)]
    try:
        done = subprocess.run(
            command,
            cwd=work,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, seconds),
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {seconds:.0f} s"}
    if done.returncode or not found.is_file():
        say(done.stdout[-3000:])
        return {"failed": (done.stdout.strip().splitlines() or ["it said nothing"])[-1]}
    return json.loads(found.read_text())


def peer_python(wanted: str) -> tuple[str | None, str]:
    """The interpreter of the peer, and why there is none."""
    if wanted == "none":
        return None, "--peer-python none"
    if wanted != "auto":
        return wanted, ""
    if importlib.util.find_spec("trl") is not None:
        return sys.executable, ""
    if PEERS.is_file():
        return str(PEERS), ""
    return None, "trl is not importable, there is no benchmarks/peers/.venv, and --peer-python names none"


# --- the run -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What was asked, and what has come of it."""

    given: argparse.Namespace
    work: Path
    began: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    troubles: list[dict[str, str]] = field(default_factory=list)
    """Stages, cases and peers that failed or were left out, and why."""
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage."""

    @property
    def left(self) -> float:
        return 60 * self.given.minutes - (time.monotonic() - self.began)

    def job(self, stage: str, mode: str = "") -> dict[str, Any]:
        names = ("size", "device", "seconds")
        asked = {name: getattr(self.given, name) for name in names}
        return {"stage": stage, "mode": mode, "work": str(self.work), "limits": self.facts.get("limits"), **asked}

    def trouble(self, what: str, reason: str) -> None:
        self.troubles.append({"what": what, "reason": reason})
        say(f"{what}: {reason}")

    def write(self) -> None:
        commit = ""
        with contextlib.suppress(OSError):
            found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
            commit = found.stdout.strip()
        result = {
            "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}",
            "commit": commit,
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


def planned(given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for stage in STAGES:
        if stage in given.only:
            for mode in modes_of(stage, given.size, given.modes):
                yield stage, mode


def main() -> int:
    given = options().parse_args()
    given.out = given.out.resolve()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    python, why = peer_python(given.peer_python)
    with tempfile.TemporaryDirectory(prefix="fairlead-gpu-", ignore_cleanup_errors=True) as folder:
        run = Run(given, Path(folder))
        if python is None:
            run.trouble("peers", why)
        waiting = Child(run.work)

        def ask(name: str, job: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
            """By the process that waits; another one begins to."""
            nonlocal waiting
            current, waiting = waiting, Child(run.work)
            began = time.monotonic()
            found = current.ask(job, seconds)
            run.took[name] = round(run.took.get(name, 0.0) + time.monotonic() - began, 1)
            return found

        try:
            machine(run, ask)
            for stage, mode in planned(given):
                if run.left <= 0:
                    run.trouble(f"{stage} {mode}".strip(), f"left out: {given.minutes:g} minutes were over")
                elif stage == "checks":
                    check(run, ask)
                else:
                    measure(run, ask, stage, mode, python)
                run.write()
        finally:
            waiting.end()
    return summary(run)


Ask = Callable[[str, Mapping[str, Any], float], list[dict[str, Any]]]


def machine(run: Run, ask: Ask) -> None:
    for each in ask("machine", run.job("machine"), 120.0):
        if "failed" in each:
            run.trouble("machine", each["failed"])
        run.facts |= {key: value for key, value in each.items() if key in ("limits", "hardware", "versions")}
    run.write()
    if "limits" not in run.facts:
        raise SystemExit(f"{run.given.device} cannot be measured: {run.troubles[-1]['reason']}")


def check(run: Run, ask: Ask) -> None:
    """All checks; after one that takes its process with it, the others in a new one."""
    names = run.given.checks or ["masks", "forest", "compiling", "head", "kernels", "memory savers", "roles", "sampler",
                                 "keyed sampling", "precision", "quantised", "stages"]  # fmt: skip
    ends = time.monotonic() + min(LONGEST["checks"], run.left)
    while names and time.monotonic() < ends:
        found = ask("checks", run.job("checks") | {"names": names}, ends - time.monotonic())
        done = [each["done"] for each in found if "done" in each]
        run.checks += [each["check"] for each in found if "check" in each]
        left = [name for name in names if name not in done]
        reasons = [each["failed"] for each in found if "failed" in each]
        if left and not (done and reasons and names.index(left[0]) == len(done) and is_told(run, done[-1], reasons[0])):
            reason = reasons[0] if reasons else "its process ended"
            run.checks.append({"check": left[0], "case": "", "status": "failed", "reason": reason})
            left = left[1:]
        names = left
    for name in names:
        run.checks.append({"check": name, "case": "", "status": "skipped", "reason": "no time was left"})


def is_told(run: Run, name: str, reason: str) -> bool:
    """Whether the last check itself says why its process ended."""
    return any(each["check"] == name and each.get("reason") == reason for each in run.checks)


def measure(run: Run, ask: Ask, stage: str, mode: str, python: str | None) -> None:
    """A stage, and its peer on the same rows, by turns."""
    name = f"{stage} {mode}".strip()
    cases: dict[str, list[Case]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    for _ in range(run.given.repeats):
        for each in ask(name, run.job(stage, mode), min(100.0, run.left + 30)):
            if "failed" in each:
                run.trouble(name, each["failed"])
            if "name" not in each:
                continue
            case = Case(**each)
            cases.setdefault(case.name, []).append(case)
            if python is None or case.job is None or run.left <= 0:
                continue
            began = time.monotonic()
            answer = ask_peer(python, case.job, run.work, min(100.0, run.left + 30))
            run.took["peers"] = round(run.took.get("peers", 0.0) + time.monotonic() - began, 1)
            if "failed" in answer:
                run.trouble(f"{case.name}, the peer", answer["failed"])
            else:
                answers.setdefault(case.name, []).append(answer)
    for case_name, repeats in cases.items():
        found = lines(repeats, answers.get(case_name, []))
        run.cases += found
        say(table(found))


def summary(run: Run) -> int:
    """Says how the checks went; 1 where one failed, or a stage."""
    for each in run.checks:
        figures = f"{each['measured']:.2g} of {each['bound']:.2g}" if "measured" in each else each["reason"]
        if each["status"] != "passed":
            say(f"{each['status']:8} {each['check']}: {each['case']}: {figures}")
    failed = sum(each["status"] == "failed" for each in run.checks)
    passed = sum(each["status"] == "passed" for each in run.checks)
    say(f"{passed} checks passed, {failed} failed, {len(run.checks) - passed - failed} skipped; {run.given.out}")
    return int(failed > 0 or any(each["what"] != "peers" for each in run.troubles))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
