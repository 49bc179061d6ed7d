"""`fairlead sweep`: keeps so many trials running, writes down how each ended, and stops them together."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairlead.data.tokenize import cores
from fairlead.errors import ConfigError, Interrupted, Terminated, TrainingError
from fairlead.report.numbers import duration
from fairlead.sweep.plan import Plan, alone, make_plan, remember
from fairlead.sweep.show import words, write_page
from fairlead.sweep.trial import STOPPED, Trial
from fairlead.tracking import RunDirectory

if TYPE_CHECKING:
    from fairlead.sweep.study import Study, Taken

POLL = 0.2
"""Seconds between two looks at the trials."""
FIRST_FAILURES = 3
"""Where so many trials fail at first, the others would too."""


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def sweep(
    recipe: str,
    space: Path | str,
    settings: Sequence[str] = (),
    *,
    jobs: int = 1,
    out: Path | str | None = None,
    say: Callable[[str], None] = _say,
) -> dict[str, Any]:
    """Train ``recipe`` with values from ``space``, ``jobs`` trials at a time, and return what is written to sweep.json.

    Every trial is a run of its own in ``out/trials``. The same call continues a sweep that was stopped or killed; made
    in several processes, it shares the trials out among them. It returns when all trials have ended. Raises ConfigError
    before anything runs for what does not fit the recipe, RunError where ``out`` holds another sweep, TrainingError
    where trials only fail, Interrupted or Terminated where it was stopped by a signal.
    """
    plan = make_plan(recipe, Path(space), settings, None if out is None else Path(out))
    open_study = _study()
    remember(plan)
    study = open_study(plan)
    try:
        with _signals(say) as asked:
            _work(plan, study, jobs, asked, say)
    finally:
        result = _keep(plan, study)
        write_page(plan.folder, result)
    if asked and not study.is_over:
        error = Terminated if asked[0] == signal.SIGTERM else Interrupted
        raise error(f"{plan.folder}: stopped by {asked[0].name}", hint="the same command continues the sweep")
    return result


def _study() -> Callable[[Plan], Study]:
    try:
        from fairlead.sweep.study import Study
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "optuna":
            raise
        raise ConfigError(
            "a sweep needs optuna, which is not installed", hint="pip install 'fairlead[sweep]'"
        ) from error
    return Study


def _work(plan: Plan, study: Study, jobs: int, asked: Sequence[signal.Signals], say: Callable[[str], None]) -> None:
    """Until all trials have ended, those of other processes too, or a signal asks to stop."""
    running: list[tuple[Taken, Trial]] = []
    failures: list[bool] = []
    told, threads = 0, max(1, cores() // jobs)
    is_doubtful, is_waiting = True, False
    try:
        while True:
            for taken, trial in [*running]:
                has_ended = trial.poll()  # before its metrics are read: the pruner compares others with all of them
                is_doubtful = is_doubtful and trial.is_doubtful(say)
                if not trial.is_pruned and study.is_hopeless(taken, trial.news()):
                    trial.is_pruned = True
                    trial.stop()
                if has_ended:
                    running.remove((taken, trial))
                    with taken.claim:
                        if trial.is_pruned or not (asked and trial.code in STOPPED):
                            failures.append(_end(plan, study, taken, trial, say))
            for _ in asked[told:]:
                told += 1
                for _, trial in running:
                    trial.stop()
            if not asked:
                _refuse_failures(plan, failures)
                while len(running) < jobs and (taken := study.take()):
                    say(f"trial {taken.number}: {words(taken.parameters)}")
                    running.append((taken, Trial(plan, taken.number, taken.parameters, threads)))
                    running[-1][1].is_pruned = taken.is_hopeless
            if not running and (asked or study.is_over):
                return
            if not running and not is_waiting:
                is_waiting = True
                say("waiting for the trials of other processes")
            time.sleep(POLL)
    finally:
        for _, trial in running:
            trial.stop()
        for taken, trial in running:
            trial.wait()
            taken.claim.close()


def _end(plan: Plan, study: Study, taken: Taken, trial: Trial, say: Callable[[str], None]) -> bool:
    """Write down how a trial ended; whether it failed."""
    value, message = None, ""
    if trial.is_pruned:
        state = "pruned"
    elif trial.code:
        state, message = "failed", trial.last_words()
    elif (value := trial.value()) is None:
        state, message = "failed", f"{plan.space.metric} is not finite"
    else:
        state, message = "finished", trial.alarms()
    study.tell(taken, state, value, trial.seconds, message)
    _keep(plan, study)
    result = "" if value is None else f", {plan.space.metric} {value:.4g}"
    say(f"trial {taken.number}: {state}{result}, {duration(trial.seconds)}{'; ' if message else ''}{message}")
    return state == "failed"


def _refuse_failures(plan: Plan, failures: Sequence[bool]) -> None:
    """Raises TrainingError where the first trials have all failed, or too many in a row. Those of an earlier command do
    not count: what was wrong may have been mended."""
    most = plan.space.max_failures
    first, last = failures[:FIRST_FAILURES], failures[-most:]
    for number, some, which in ((FIRST_FAILURES, first, "first"), (most, last, "last")):
        if len(some) == number and all(some):
            trials = f"{which} {number} trials have" if number > 1 else f"{which} trial has"
            raise TrainingError(
                f"{plan.folder}: the {trials} failed",
                hint=f"each said why in {plan.folder}/trials/NUMBER.log; mend the cause, and the same command goes on "
                "with the trials that are left",
            )


def _keep(plan: Plan, study: Study) -> dict[str, Any]:
    """Write sweep.json. One process at a time, so that the last one knows what all have told."""
    with alone(plan.folder):
        rows, space = study.rows(), plan.space
        finished = [row for row in rows if row["state"] == "finished"]
        sign = 1 if space.goal == "max" else -1
        best = max(finished, key=lambda row: sign * row["value"], default=None)
        result = {**plan.as_dict(), "best": best, "trials": rows}
        RunDirectory(plan.folder).write_json("sweep.json", result)
    return result


@contextmanager
def _signals(say: Callable[[str], None]) -> Iterator[list[signal.Signals]]:
    """The signals that have asked to stop, as they come."""
    asked: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, _: Any) -> None:
        asked.append(signal.Signals(number))
        if len(asked) == 1:
            say(f"{asked[0].name}: the trials save and stop; once more stops them at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
