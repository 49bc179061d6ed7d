"""Runs the calls of a pass in processes, each once, and remembers what they returned. Knows nothing of what they do."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fairlead.data.sources import atomic_write
from fairlead.errors import DataError

Call = tuple[Any, ...]
"""A function, the target it writes, and its other arguments; it returns what JSON can hold."""
RunPass = Callable[[str, Sequence[Call]], list[dict[str, Any]]]


@contextmanager
def processes(number: int, folder: Path) -> Iterator[RunPass]:
    """A function that runs the calls of a named pass and returns their results in order.

    What a call returned stands beside its target (``.json``), that of a pass in ``folder``: neither runs again in a
    later process. The first error in order is raised. Raises DataError when a process is killed.
    """
    with ExitStack() as stack:
        progress = stack.enter_context(_progress())
        pool: ProcessPoolExecutor | None = None

        def run(name: str, calls: Sequence[Call]) -> list[dict[str, Any]]:
            nonlocal pool
            if (note := folder / f"{name}.json").exists():
                return json.loads(note.read_bytes())
            waiting = [call for call in calls if not _note(call).exists()]
            bar = progress.add_task(name, total=len(calls), completed=len(calls) - len(waiting))
            if number > 1 and (pool or len(waiting) > 1):
                pool = pool or stack.enter_context(_pool(number))
                futures = [pool.submit(_run, call) for call in waiting]
                try:
                    for future in futures:
                        future.result()
                        progress.advance(bar)
                except BrokenProcessPool as error:
                    raise DataError(
                        f"a process was killed while {name}",
                        "was memory short? run again, on fewer cores: what is finished is kept",
                    ) from error
            else:
                for call in waiting:
                    _run(call)
                    progress.advance(bar)
            results = [json.loads(_note(call).read_bytes()) for call in calls]
            _write(note, results)
            return results

        yield run


@contextmanager
def _pool(number: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes: those forked from one with threads may hang."""
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a new process: one thread, Ctrl-C is left to the parent, and the end of the parent is its own."""
    import pyarrow

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(call: Call) -> None:
    function, target, *arguments = call
    _write(_note(call), function(target, *arguments))


def _note(call: Call) -> Path:
    return call[1].with_suffix(".json")


def _write(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value).encode())


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not sys.stderr.isatty())
