"""Calls a user's function: by the name of its module, awaited where it is async, in processes of its own. Imports no
torch, so that such a process begins soon."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, cast

from fairlead.errors import ConfigError, TrainingError

RewardFunction = Callable[..., Any]
"""trlX's signature: ``samples, prompts, outputs, **columns`` -> one number a sample, or a sequence of them."""


def import_function(source: str) -> RewardFunction:
    """Raises ConfigError where `module:function` names none."""
    module, _, name = source.partition(":")
    try:
        function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"no reward {source!r}: {error}", hint="write module:function, importable from here"
        ) from error
    if not callable(function):
        raise ConfigError(f"{source} is a {type(function).__name__}, not a function")
    return cast(RewardFunction, function)


def results(function: RewardFunction, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One result a call; those of an async function run side by side."""
    if not any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        return [function(**call) for call in calls]

    async def together() -> list[Any]:
        return list(await asyncio.gather(*(function(**call) for call in calls)))

    with ThreadPoolExecutor(1) as thread:  # in a notebook this thread has a loop that is running
        return thread.submit(asyncio.run, together()).result()


class Workers:
    """Processes that call a function. They are started anew, since a fork of one that holds threads or a GPU may hang,
    and end with this object."""

    def __init__(self, source: str, number: int) -> None:
        self._source = source
        self._pool = ProcessPoolExecutor(number, get_context("spawn"))
        weakref.finalize(self, self._pool.shutdown, wait=False)

    def __call__(self, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One result a call. Raises TrainingError when a process dies."""
        try:
            return list(self._pool.map(_result_elsewhere, [self._source] * len(calls), calls))
        except BrokenProcessPool as error:
            raise TrainingError(
                f"a process that called the reward {self._source} was killed, perhaps for want of memory",
                hint="give it fewer workers, or workers=0 to see what it does",
            ) from error


def _result_elsewhere(source: str, call: Mapping[str, Any]) -> Any:
    (found,) = results(_imported_once(source), [call])
    return found


@functools.cache
def _imported_once(source: str) -> RewardFunction:
    return import_function(source)
