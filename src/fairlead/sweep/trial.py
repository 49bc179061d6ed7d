"""One trial: a run of its own in a process of its own, its value, and why it failed."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

from fairlead.config_file import suggest
from fairlead.errors import ConfigError
from fairlead.sweep.plan import Plan, hold
from fairlead.tracking import RunDirectory

STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""How a process ends that was asked to stop."""
_LONGEST = 300


class Trial:
    """The process that trains a trial's run, begun by the first ``poll``."""

    def __init__(self, plan: Plan, number: int, parameters: Mapping[str, Any], threads: int) -> None:
        self.run = plan.run(number)
        self.log = self.run.path.with_suffix(".log")
        self.is_pruned = False
        self._plan, self._parameters, self._threads = plan, parameters, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._log_begins = self._size = 0

    @property
    def code(self) -> int:
        """Exit code of the process, 0 where none was needed."""
        return (self._process and self._process.returncode) or 0

    @property
    def seconds(self) -> float:
        """Of training; of a run that left no summary, since it was taken up here."""
        summary = self.run.read_json("summary.json") if self.run.summary.is_file() else {}
        return round(summary.get("seconds", time.monotonic() - self._began), 3)

    def poll(self) -> bool:
        """Whether it has ended. A run that a killed sweep left behind at work is waited for, then continued; one that
        is finished is left as it is."""
        if self._process is None:
            if self.is_pruned or _is_finished(self.run):
                return True
            if _is_at_work(self.run):
                return False
            self._process = self._start()
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask for a save at the next step's end; asked twice, it stops at once."""
        if self._process is not None:
            self._process.terminate()

    def wait(self) -> None:
        if self._process is not None:
            self._process.wait()

    def readings(self) -> list[tuple[int, float | None]]:
        """(step, value) of the metric so far; none where a value was not finite."""
        name = self._plan.space.metric
        return [(row["step"], row[name]) for row in self.run.read_jsonl("metrics.jsonl") if name in row]

    def news(self) -> list[tuple[int, float]]:
        """Finite readings for a pruner, all of them where any is new."""
        size = self.run.metrics.stat().st_size if self.run.metrics.is_file() else 0
        if self._plan.space.pruner == "none" or size == self._size:
            return []
        self._size = size
        return [(step, value) for step, value in self.readings() if value is not None]

    def is_doubtful(self, say: Callable[[str], None]) -> bool:
        """Whether it cannot be known yet that the run logs the metric. Says when a step was logged without: it may be
        misspelt, and the run still takes hours."""
        rows = self.run.read_jsonl("metrics.jsonl") if self.run.metrics.is_file() else []
        if not any(row["step"] for row in rows):
            return True
        if not self.readings():
            say(f"warning: {self.run.metrics} has no metric {self._plan.space.metric!r} yet; {self._suggestion(rows)}")
        return False

    def value(self) -> float | None:
        """As the space reads it; none where that is not finite. Raises ConfigError where the run has no such metric."""
        space, values = self._plan.space, [value for _, value in self.readings()]
        if not values:
            known = self._suggestion(self.run.read_jsonl("metrics.jsonl"))
            raise ConfigError(
                f"{self.run.metrics} has no metric {space.metric!r}",
                hint=f"{known}; a sweep by another metric needs another --out",
            )
        if space.read == "best":
            pick = max if space.goal == "max" else min
            return pick((value for value in values if value is not None), default=None)
        part = values[-1:] if space.read == "last" else values[-math.ceil(len(values) / 4) :]
        return None if None in part else fmean(value for value in part if value is not None)

    def _suggestion(self, rows: Iterable[Mapping[str, Any]]) -> str:
        names = {name: None for row in rows for name in row if name not in ("step", "seconds", "tokens")}
        return suggest(self._plan.space.metric, names)

    def alarms(self) -> str:
        """What a reader of the value must know of a run that ended well."""
        names = dict.fromkeys(str(row["alarm"]) for row in self.run.read_jsonl("alarms.jsonl"))
        return f"alarm: {', '.join(names)}" if names else ""

    def last_words(self) -> str:
        """Why its process ended."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"killed by {name}" + ", perhaps for want of memory" * (name == "SIGKILL")
        with self.log.open("rb") as log:
            log.seek(self._log_begins)
            text = log.read().decode("utf-8", "replace")
        _, *errors = re.split(r"^error: ", text, flags=re.MULTILINE)
        last = (errors or text.strip().splitlines() or [f"ended with exit code {self.code}"])[-1]
        message = " ".join(last.split())
        return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}..."

    def _start(self) -> subprocess.Popen[bytes]:
        """In a session of its own: what a terminal sends to the sweep must not reach it twice."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(self._threads)}
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            return subprocess.Popen(
                command(self._plan, self.run, self._parameters),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**threads, **os.environ},
                start_new_session=True,
            )


def command(plan: Plan, run: RunDirectory, parameters: Mapping[str, Any]) -> list[str]:
    """What trains a trial, or continues it: as anybody could type it."""
    fairlead = [sys.executable, "-m", "fairlead"]
    if run.recipe.is_file():
        return [*fairlead, "resume", str(run.path)]
    own = {**parameters, "run.directory": str(run.path.parent), "run.name": run.path.name}
    return [*fairlead, "train", str(plan.base), *(f"{key}={json.dumps(value)}" for key, value in own.items())]


def _is_finished(run: RunDirectory) -> bool:
    return run.model.is_dir() and run.summary.is_file() and run.read_json("summary.json").get("status") == "finished"


def _is_at_work(run: RunDirectory) -> bool:
    lock = run.path / ".lock"
    held = hold(lock) if lock.is_file() else None
    if held is None:
        return lock.is_file()
    held.close()
    return False
