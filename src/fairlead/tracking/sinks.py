"""Copies of the metrics for trackers, whose packages are imported only when asked for.

A resumed run goes on in the run it had in the tracker. No metric leaves the machine unless one of
``WANDB_API_KEY``, ``WANDB_MODE``, ``TRACKIO_SPACE_ID`` and ``TRACKIO_SERVER_URL`` says so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from fairlead.errors import ConfigError, FairleadError
from fairlead.tracking.run_directory import RunDirectory

if TYPE_CHECKING:
    from fairlead.types import Sink


class _TensorBoard:
    """Event files in the run directory, under ``tensorboard``."""

    def __init__(self, run: RunDirectory, project: str, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an interrupted process logged after the checkpoint this one continues from.
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=_last_step(run) + 1)
        text = json.dumps(settings, indent=2, default=str)
        self._writer.add_text("settings", f"```json\n{text}\n```")
        self._writer.flush()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Weights & Biases: offline, for ``wandb sync`` later, unless a mode or a key is set."""

    def __init__(self, run: RunDirectory, project: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY"))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        if mode == "online" and not has_key and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "WANDB_MODE is online, but no key is known",
                "run `wandb login`, or unset WANDB_MODE",
            )
        earlier = sorted((run.path / "wandb").glob("*run-*-*"))
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(run.path),
            config=dict(settings),
            mode=mode,
            id=earlier[-1].name.partition("run-")[2].partition("-")[2] if earlier else None,
            resume="allow" if earlier and mode == "online" else None,
            settings=wandb.Settings(console="off", silent=mode == "offline"),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Trackio's local store, where ``trackio show`` finds all projects."""

    def __init__(self, run: RunDirectory, project: str, name: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._finish = trackio.finish
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=project,
                name=name,
                config=dict(settings),
                resume="allow" if _last_step(run) else "never",
                embed=False,
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._finish()  # Run.finish() would be called once more at exit, with words on stdout


_SINKS: dict[str, Callable[[RunDirectory, str, str, Mapping[str, Any]], Sink]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}


def open_sink(kind: str, run: RunDirectory, *, project: str, name: str, settings: Mapping[str, Any]) -> Sink:
    """Starts the tracker ``kind``; ``settings`` are shown there beside the metrics.

    Open it after ``run.truncate_after``: the lines left tell where a resumed run goes on. Raises
    ``ConfigError`` for an unknown kind, a missing package, or a tracker that does not start.
    """
    if kind not in _SINKS:
        near = get_close_matches(kind, _SINKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_SINKS)}"
        raise ConfigError(f"there is no tracker {kind!r}", hint)
    try:
        return _SINKS[kind](run, project, name, settings)
    except FairleadError:
        raise
    except ImportError as error:
        raise ConfigError(f"the tracker {kind!r} is not installed: {error}", 'pip install "fairlead[track]"') from error
    except Exception as error:
        raise ConfigError(f"the tracker {kind!r} did not start: {error}", "mend it, or leave it out") from error


def _last_step(run: RunDirectory) -> int:
    return max((row["step"] for row in run.read_jsonl("metrics.jsonl")), default=0)
