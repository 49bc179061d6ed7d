"""The line on stderr that says how far a run is and how it fares.

Knows the names of metrics only as it is given them.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.spinner import Spinner

    from fairlead.types import Progress

_RATE_STEPS = 50
_SHOWN, _CUT = 4, 160
"""Rows and characters of a table of samples."""


def print_samples(rows: Sequence[Mapping[str, Any]], *, stream: TextIO | None = None) -> None:
    """A table of prompts and the responses drawn to them at a step, long texts cut."""
    from rich.console import Console as Terminal
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"samples at step {rows[0]['step']}", title_justify="left")
    for heading in ("prompt", "response"):
        table.add_column(heading, overflow="fold")
    for row in rows[:_SHOWN]:
        end = "" if row["finished"] else " ..."
        table.add_row(Text(str(row["prompt"])[-_CUT:]), Text(str(row["response"])[:_CUT] + end))
    Terminal(file=stream or sys.stderr).print(table)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Console:
    """An ``Observer``: a live line in a terminal, elsewhere a plain line every so many seconds.

    ``headline`` names the metrics to show, each as last reported; rates are those of the last 50
    steps. ``quiet`` prints nothing.
    """

    def __init__(
        self,
        title: str,
        headline: Sequence[str],
        *,
        quiet: bool = False,
        interval_seconds: float = 30.0,
        stream: TextIO | None = None,
    ) -> None:
        self._title = title
        self._headline = headline
        self._quiet = quiet
        self._interval = interval_seconds
        self._stream = stream or sys.stderr
        self._live: tuple[Live, Spinner] | None = None
        self._window = deque([(0, 0, 0.0)], maxlen=_RATE_STEPS + 1)
        self._values: dict[str, float] = {}
        self._line = self._printed = ""
        self._printed_at = float("-inf")

    def after_step(self, progress: Progress) -> None:
        if self._quiet:
            return
        self._values |= {name: progress.metrics[name] for name in self._headline if name in progress.metrics}
        self._window.append((progress.step, progress.tokens, progress.seconds))
        self._line = self._describe(progress)
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._show()
        elif time.monotonic() - self._printed_at >= self._interval:
            self._print()

    def close(self) -> None:
        if self._live is not None:
            self._live[0].stop()
            self._live = None
        if self._line != self._printed:
            self._print()

    def _describe(self, now: Progress) -> str:
        step, tokens, seconds = self._window[0]
        elapsed = max(now.seconds - seconds, 1e-9)
        steps_per_second = (now.step - step) / elapsed
        rates = [
            f"{steps_per_second:.3g} steps/s",
            f"{(now.tokens - tokens) / elapsed:,.0f} tokens/s",
            f"{_clock(now.seconds)} elapsed",
            f"{_clock((now.num_steps - now.step) / max(steps_per_second, 1e-9))} left",
        ]
        parts = [
            f"{self._title}  {now.step}/{now.num_steps}",
            *(rates if now.step > step else ()),
            *(f"{name} {self._values[name]:.4g}" for name in self._headline if name in self._values),
        ]
        return "  ".join(parts)

    def _print(self) -> None:
        print(self._line, file=self._stream, flush=True)
        self._printed, self._printed_at = self._line, time.monotonic()

    def _show(self) -> None:
        if self._live is None:
            import rich.console
            from rich.live import Live
            from rich.spinner import Spinner

            spinner = Spinner("dots")
            terminal = rich.console.Console(file=self._stream, force_terminal=True)
            live = Live(
                spinner,
                console=terminal,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
            )
            self._live = live, spinner
            live.start()
        self._live[1].update(text=self._line)
