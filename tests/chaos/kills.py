"""Runs killed at keyed moments and started again by the same command, until each has ended; then compared byte by byte
with one that was never interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.chaos.left import differing, left_behind
from tests.chaos.runs import furnish, recipe
from tests.chaos.watch import BEFORE, FIRST, STARTING, Aim, Watch, make_page, phase_in
from transformers.utils import logging

import fairlead

PATIENCE = 300.0
"""Seconds after which a process counts as hanging."""
MOST_IN_A_ROW = 6
"""Kills of one run."""
TIMED = 3
"""One kill in so many falls a moment after its event, wherever the process is then: inside a write, or a product."""
LONGEST_DELAY = 0.02


class ChaosError(Exception):
    """A process that ended otherwise than by a kill or well."""


@dataclass(slots=True)
class Tally:
    algorithm: str
    kills: int = 0
    forked: int = 0
    fresh: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    """Where the kills fell."""
    in_a_row: int = 0
    """Kills of a process that had been started after a kill and had left no new checkpoint."""
    restarts: int = 0
    runs: int = 0
    mismatches: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "phases": dict(sorted(self.phases.items())), "seconds": round(self.seconds, 1)}


def once(algorithm: str, place: Path, aim: Aim | None, warn: Connection) -> None:
    """In a process of its own: the run. The first in a place, and one that is to be killed, are watched."""
    with (place / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(place)
    logging.disable_progress_bar()  # forks share its lock with their parent, and one that is killed may hold it
    given: Any = ({"algorithm": algorithm}, recipe(algorithm))
    try:
        if aim is None and Path("runs").exists():
            fairlead.train(*given)
        else:
            with Watch(place / "phase", aim, lambda: warn.send(None)) as watch:
                fairlead.train(*given)
            Path("events.json").write_text(json.dumps(watch.counts))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # a forked process owns nothing of what its parent would clean up


def start(algorithm: str, place: Path, aim: Aim | None, *, fresh: bool = False) -> str | None:
    """Start the run; the phase it was killed in, or none where it ended well. Raises ChaosError for any other end."""
    make_page(place / "phase")
    context: Any = multiprocessing.get_context("spawn" if fresh else "fork")
    told, warn = context.Pipe(duplex=False)
    process = context.Process(target=once, args=(algorithm, place, aim, warn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from Python 3.12 on
        process.start()
    warn.close()
    if told in wait([process.sentinel, told], PATIENCE) and aim is not None and aim.delay is not None:
        with suppress(EOFError):  # it has ended before
            told.recv()
            time.sleep(aim.delay)
            process.kill()
    process.join(PATIENCE)
    told.close()
    if process.exitcode == -9:
        return phase_in(place / "phase")
    if process.exitcode != 0:
        process.kill()
        said = (place / "log.txt").read_text().strip()[-2000:]
        raise ChaosError(f"{algorithm} in {place} ended with {process.exitcode}:\n{said}")
    return None


def base_model(folder: Path) -> Path:
    """A model on disk, for the runs that train adapters. It is trained here: what this process has imported by then,
    its forks have."""
    place = folder / "for-base"
    furnish(place, "pretrain", place)
    given = recipe("pretrain") | {"run.directory": str(place), "data.path": str(place / "rows.jsonl")}
    return fairlead.train({"algorithm": "pretrain"}, given | {"data.cache": "none"}).path / "model"


def chaos(
    algorithm: str, folder: Path, base: Path, *, forked: int, fresh: int, seconds: float = 1e9, seed: int = 0
) -> Iterator[Tally]:
    """Kill runs of ``algorithm`` so many times, or until the time is up. Yields the count after every run."""
    began, tally = time.monotonic(), Tally(algorithm)
    furnish(folder / "whole", algorithm, base)
    start(algorithm, folder / "whole", None)
    whole = left_behind(folder / "whole" / "runs" / algorithm)
    watched: dict[str, int] = json.loads((folder / "whole" / "events.json").read_text())
    events = {**watched, FIRST: STARTING}
    kills = Counter(dict.fromkeys(events, 0))
    while tally.kills < forked + fresh and time.monotonic() - began < seconds:
        place = folder / f"run-{tally.runs:03d}"
        furnish(place, algorithm, base)
        draw = random.Random(f"{seed} {algorithm} run {tally.runs}")
        planned, ended = draw.randint(1, MOST_IN_A_ROW), False
        try:
            while planned and not ended and tally.kills < forked + fresh:
                is_fresh = (tally.fresh < fresh and tally.kills % 10 == 9) or tally.forked >= forked
                ended = _kill_once(tally, place, aim_at(kills, events, draw), kills, fresh=is_fresh)
                planned -= 1
            if not ended:
                tally.restarts += 1
                start(algorithm, place, None)
            found = differing(whole, left_behind(place / "runs" / algorithm))
        except ChaosError as error:
            print(error, file=sys.stderr)
            found = ["ended with an error"]
        tally.mismatches += [f"{place.name}: {each}" for each in found]
        tally.runs += 1
        if not found:
            shutil.rmtree(place)
        tally.seconds = time.monotonic() - began
        yield tally


def aim_at(kills: Counter[str], events: dict[str, int], draw: random.Random) -> Aim:
    """A moment in the phase that was aimed at the least."""
    least = min(kills.values())
    phase = draw.choice([name for name in events if kills[name] == least])
    delay = draw.uniform(0, LONGEST_DELAY) if draw.randrange(TIMED) == 0 else None
    return Aim(phase, draw.randint(1, events[phase]), delay)


def _kill_once(tally: Tally, place: Path, aim: Aim, kills: Counter[str], *, fresh: bool) -> bool:
    """Start the run with a moment to kill it at; whether it ended before that came."""
    run = place / "runs" / tally.algorithm
    before = _checkpoints(run)
    was_begun = (place / "log.txt").exists()
    tally.restarts += was_begun
    phase = start(tally.algorithm, place, aim, fresh=fresh)
    if phase is None:
        return True
    assert phase != BEFORE
    kills[aim.phase] += 1
    tally.kills += 1
    tally.fresh += fresh
    tally.forked += not fresh
    tally.phases[phase] += 1
    tally.in_a_row += was_begun and _checkpoints(run) == before
    return _is_finished(run)


def _checkpoints(run: Path) -> set[str]:
    return {path.parent.name for path in run.glob("checkpoints/step-*/manifest.json")}


def _is_finished(run: Path) -> bool:
    """Killed when all was done: to start it again would be refused."""
    summary = run / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["status"] == "finished"
