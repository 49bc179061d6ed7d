"""Averages what the steps report, writes ``metrics.jsonl`` and hands each line to the trackers.

The log's state belongs into the checkpoint, so that a run continued between two lines writes the
lines of a run that was never interrupted; only the fields that tell time and memory differ.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fairlead.errors import RunError
from fairlead.tracking.run_directory import RunDirectory

if TYPE_CHECKING:  # fairlead.types imports torch, which a reader of run directories has no use for
    from fairlead.types import Progress, Sink


class MetricsLog:
    """An ``Observer``. Writes a line every ``log_every`` steps and at the last step.

    A metric's value is the mean over the steps since the last line, leaving out those where
    nothing was counted (nan). Metrics named ``eval/...`` are not averaged: they are written with
    the step that brought them, on its line where it has one. Nothing that goes wrong here stops a
    run: it is told once on stderr.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        log_every: int = 10,
        sinks: Sequence[Sink] = (),
        device: str = "cpu",
    ) -> None:
        self._run = run
        self._log_every = log_every
        self._sinks = sinks
        self._device = device
        self._sums: dict[str, tuple[float, int]] = {}
        self._tokens, self._seconds = 0, 0.0
        self._unwritten: list[dict[str, float]] = []
        self._warned: set[str] = set()

    def after_step(self, progress: Progress) -> None:
        held_out = {name: value for name, value in progress.metrics.items() if name.startswith("eval/")}
        for name, value in progress.metrics.items():
            if name not in held_out:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total, count) if math.isnan(value) else (total + value, count + 1)
        if progress.step % self._log_every == 0 or progress.step == progress.num_steps:
            self._write(progress, self._take_means() | self._performance(progress) | held_out)
        elif held_out:
            self._write(progress, held_out)

    def close(self) -> None:
        self._flush()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._warn(type(sink).__name__, error)

    def add_sinks(self, sinks: Sequence[Sink]) -> None:
        """Trackers open where the run continues, which is known only once the log's state is back."""
        self._sinks = (*self._sinks, *sinks)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": dict(self._sums),
            "tokens": self._tokens,
            "seconds": self._seconds,
            "unwritten": [*self._unwritten],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self._tokens, self._seconds = state["tokens"], state["seconds"]
        self._unwritten = [*state["unwritten"]]

    def _take_means(self) -> dict[str, float]:
        means = {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def _performance(self, progress: Progress) -> dict[str, float]:
        tokens, seconds = progress.tokens - self._tokens, progress.seconds - self._seconds
        self._tokens, self._seconds = progress.tokens, progress.seconds
        return {
            "performance/tokens_per_second": tokens / seconds if seconds > 0 else math.nan,
            "performance/peak_memory_gb": _peak_memory_gb(self._device),
        }

    def _write(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        row = {
            "step": progress.step,
            "seconds": progress.seconds,
            "tokens": progress.tokens,
            **metrics,
        }
        self._unwritten.append(row)
        self._flush()
        finite = {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}
        for sink in self._sinks:
            try:
                sink.log(finite, progress.step)
            except Exception as error:
                self._warn(type(sink).__name__, error)

    def _flush(self) -> None:
        if not self._unwritten:
            return
        try:
            self._run.append("metrics.jsonl", self._unwritten)
            self._unwritten.clear()
        except RunError as error:  # the lines wait for the disk
            self._warn("metrics.jsonl", error)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            print(f"warning: {what} misses metrics, training goes on: {error}", file=sys.stderr)


def _peak_memory_gb(device: str) -> float:
    """Peak since the process began, in 10^9 bytes: tensors on a CUDA device, or resident memory."""
    if device.startswith("cuda") and (torch := sys.modules.get("torch")) is not None:
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
