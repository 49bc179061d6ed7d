"""Knows at every moment in which phase of a run a process is, and ends the process at a chosen event of one.

The events are those of Python's profiler: calls, returns and calls of C. They are the same in every process that begins
from the same files, so a moment is found again by its number.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, Self

from fairlead import runner

MARKS = {
    ("training/checkpoint.py", "newest"): "resuming",
    ("training/checkpoint.py", "RunState.load"): "resuming",
    ("rollout/store.py", "RolloutStore.sample"): "sampling",
    ("rollout/samples.py", "score_kept"): "scoring",
    ("rollout/experience.py", "Collector.measure"): "measuring",
    ("rollout/store.py", "_write"): "round write",
    ("rollout/store.py", "RolloutStore.save"): "round write",
    ("training/loop.py", "run"): "training",
    ("training/loop.py", "evaluate"): "evaluating",
    ("algorithms/online.py", "evaluation.<locals>.measure"): "evaluating",
    ("runner.py", "_Samples.after_step"): "evaluating",
    ("tracking/log.py", "MetricsLog.after_step"): "logging",
    ("training/checkpoint.py", "RunState.save"): "checkpoint write",
    ("training/checkpoint.py", "Checkpointer._prune"): "pruning",
    ("runner.py", "_save"): "model save",
}
"""File and function -> the phase it begins; inside another the inner one counts."""
BEFORE, FIRST, LAST = "importing", "starting", "finishing"
"""What is outside of all these: before anything is watched, then until training ends, and from there on."""
STARTING = 400_000
"""Events of the start, at least."""
PHASES = list(dict.fromkeys((BEFORE, FIRST, *MARKS.values(), LAST)))


@dataclass(frozen=True, slots=True)
class Aim:
    """A moment to end a process at: an event of a phase, counted from 1 in each process."""

    phase: str
    event: int
    delay: float | None
    """Seconds after the event, in which the process goes on; none: at the event itself."""


class Watch:
    """A context in which the process is watched. ``page`` is a file that holds the phase after the process is gone;
    ``warn`` tells the parent that the moment has come, where it is the parent that kills."""

    def __init__(self, page: Path, aim: Aim | None, warn: Callable[[], Any]) -> None:
        self._aim, self._warn = aim, warn
        with page.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 1)
        self._known: dict[CodeType, str | None] = {}
        self._inside = [FIRST]
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._page[0] = PHASES.index(FIRST)
        if self._aim is not None and self._aim.phase == FIRST:
            sys.setprofile(self._event)
        else:  # watching doubles the time, half of which lies before this
            self._begin_with(runner, "_train")
        return self

    def _begin_with(self, module: Any, name: str) -> None:
        function = getattr(module, name)

        def watched(*given: Any) -> Any:
            sys.setprofile(self._event)
            return function(*given)

        setattr(module, name, watched)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.setprofile(None)
        self._page.close()

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        begins = None if event.startswith("c_") else self._phase_of(frame.f_code)
        if begins is not None and event == "call":
            self._inside.append(begins)
            self._page[0] = PHASES.index(begins)
        phase = self._inside[-1]
        self.counts[phase] += 1
        aim = self._aim
        if aim is not None and phase == aim.phase and self.counts[phase] == aim.event:
            if aim.delay is None:
                os.kill(os.getpid(), signal.SIGKILL)
            self._warn()
        if begins is not None and event == "return":
            if self._inside.pop() == "training":
                self._inside[0] = LAST
            self._page[0] = PHASES.index(self._inside[-1])

    def _phase_of(self, code: CodeType) -> str | None:
        if code not in self._known:
            name = "/".join(Path(code.co_filename).parts[-2:]).removeprefix("fairlead/")
            self._known[code] = MARKS.get((name, code.co_qualname)) if "fairlead" in code.co_filename else None
        return self._known[code]


def make_page(path: Path) -> None:
    path.write_bytes(bytes([PHASES.index(BEFORE)]))


def phase_in(page: Path) -> str:
    return PHASES[page.read_bytes()[0]]
