"""Checkpoints: everything a resumed run compares against, written whole or not at all.

A checkpoint is written under a temporary name, fsynced and renamed; its manifest with the checksum of every file is
written last. Only safetensors and JSON: nothing is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fairlead.config import parse_interval
from fairlead.errors import CheckpointError, FairleadError, Interrupted, Terminated
from fairlead.training.optim import Optimizer
from fairlead.training.patience import better
from fairlead.training.stored import Stored, local, write
from fairlead.types import Progress, Ranks

FORMAT_VERSION = 2


class Stateful(Protocol):
    """A part of a run with a JSON-able state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


T = TypeVar("T")


def _explained(load: Callable[[Any, Path], T]) -> Callable[[Any, Path], T]:
    """Whatever a checkpoint of another run, or one made by hand, makes go wrong is an error of the checkpoint."""

    @functools.wraps(load)
    def call(state: Any, folder: Path) -> T:
        try:
            return load(state, folder)
        except FairleadError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{folder} cannot be continued from: {type(error).__name__}: {error}",
                hint="remove it: the checkpoint before it is used, or the run begins anew",
            ) from error

    return call


@dataclass(frozen=True, slots=True)
class RunState:
    """What a checkpoint holds: trained weights, the optimizer, and the parts' states by name."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    parts: Mapping[str, Stateful]
    ranks: Ranks = field(default_factory=Ranks)

    def save(self, folder: Path, step: int) -> None:
        """Write the checkpoint as ``folder``: the leader does, or where weights are sharded each rank its own. Raises
        CheckpointError, leaving nothing behind, when it cannot."""
        if not (self.ranks.is_leader or self.ranks.is_sharded):
            return
        writers = self.ranks if self.ranks.is_sharded else Ranks()
        if writers.from_leader(lambda: folder.exists() and verify(folder) is None):
            return
        temporary = folder.with_name(f".writing-{folder.name}")
        try:
            with writers.together():
                if writers.is_leader:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
                writers.gather(None)  # the folder is there
                told = writers.gather(self._write_tensors(temporary, writers))
            if not writers.is_leader:
                return
            state = {name: part.state_dict() for name, part in self.parts.items()}
            write_text(temporary / "state.json", json.dumps(state) + "\n")
            files = {name: digest for each in told for name, digest in each.items()}
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "threads": torch.get_num_threads(),
                "ranks": self.ranks.size,
                "torch": torch.__version__,
                "files": dict(sorted({**files, "state.json": _digest(temporary / "state.json")}.items())),
            }
            write_text(temporary / "manifest.json", sealed(manifest))
            _fsync(temporary)
            if folder.exists():  # damaged, or torn by an earlier crash
                shutil.rmtree(folder)
            temporary.rename(folder)
            _fsync(folder.parent)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
                raise
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {folder.parent}: {error}",
                hint="make room (or set run.directory elsewhere) and run the same command again: it continues from "
                "the checkpoint before, which is intact",
            ) from error

    def _write_tensors(self, folder: Path, ranks: Ranks) -> dict[str, str]:
        """The files that this rank has written, each with its checksum."""
        held = {"model": self.parameters, "optimizer": self.optimizer.tensors()}
        made = [write(folder, stem, tensors, ranks) for stem, tensors in held.items()]
        for path in made:
            if path is not None:
                _fsync(path)
        return {path.name: _digest(path) for path in made if path is not None}

    @_explained
    def load(self, folder: Path) -> str:
        """Put the weights, the optimizer and every part back. The checkpoint has been verified. Returns what a person
        should know of it, or nothing."""
        manifest = read_manifest(folder)
        if manifest["threads"] != torch.get_num_threads():
            raise CheckpointError(
                f"{folder} was trained with {manifest['threads']} CPU threads, this process has "
                f"{torch.get_num_threads()}: the continued run would differ in its last bits",
                hint=f"set threads={manifest['threads']}",
            )
        weights = Stored(folder, "model")
        if weights.names != self.parameters.keys():
            odd = sorted(weights.names ^ self.parameters.keys())[:3]
            raise CheckpointError(f"{folder} holds other parameters than this model: {', '.join(odd)} ...")
        load_weights(folder, self.parameters, self.ranks)
        states = Stored(folder, "optimizer")
        self.optimizer.load_tensors(
            {key: states.read(key, self.parameters[key.rpartition("|")[0]], self.ranks) for key in sorted(states.names)}
        )
        state = json.loads((folder / "state.json").read_text("utf-8"))
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        before, now = manifest.get("ranks", 1), self.ranks.size
        return (
            f"so far on {before} rank{'s' * (before > 1)}, from here on {now}: the continued run differs from an "
            "uninterrupted one in its last bits"
        ) * (before != now)


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        raise CheckpointError(manifest)
    return manifest


def sealed(manifest: Mapping[str, Any]) -> str:
    """A manifest as text, with a checksum of its own."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1) + "\n"


def _manifest(folder: Path) -> dict[str, Any] | str:
    """The manifest, or why there is none. A foreign format version raises."""
    try:
        text = (folder / "manifest.json").read_bytes().decode("utf-8")
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or "format_version" not in manifest:
            raise ValueError("manifest.json names no format version")
        is_sealed = "sha256" in manifest or manifest["format_version"] == FORMAT_VERSION
        if is_sealed and text != sealed({name: value for name, value in manifest.items() if name != "sha256"}):
            raise ValueError("manifest.json does not match its checksum")
    except (OSError, ValueError) as error:
        return f"{folder} is not a whole checkpoint: {error}"
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {manifest['format_version']}, this Fairlead reads {FORMAT_VERSION}",
            hint="continue the run with the version of Fairlead that wrote it, or start again under another run.name",
        )
    return manifest


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or none. A foreign format version raises."""
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        return manifest
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            return f"{path} does not match its checksum"
    return None


def newest(checkpoints: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is named and passed over."""
    folders = by_step(checkpoints)
    while folders:
        folder = folders.pop()
        problem = verify(folder)
        if problem is None:
            return folder
        say(f"{problem}; {'the checkpoint before it is used' if folders else 'the run begins anew'}")
    return None


def by_step(checkpoints: Path) -> list[Path]:
    """The checkpoints from the oldest to the newest; their names grow longer after a million steps."""
    return sorted(checkpoints.glob("step-*"), key=lambda folder: (len(folder.name), folder.name))


@torch.no_grad()
def load_weights(folder: Path, parameters: Mapping[str, nn.Parameter], ranks: Ranks | None = None) -> None:
    """The trained weights alone: for the best checkpoint at the end of a run."""
    weights, ranks = Stored(folder, "model"), ranks or Ranks()
    for name, parameter in parameters.items():
        local(parameter).copy_(weights.read(name, parameter, ranks))


class Checkpointer:
    """An observer that saves: by time or steps, at a new best, when asked to stop, and at the end. Stands last.

    ``best`` names the metric to watch, in the way of `better`.
    """

    def __init__(self, checkpoints: Path, state: RunState, *, every: str | int, keep: int, best: str | None) -> None:
        self._folder, self._state, self._keep = checkpoints, state, keep
        self._unit, self._interval = parse_interval(every)
        self._last_time = time.monotonic()
        self._best_metric = best
        self.best_step: int | None = None
        self.best_value: float | None = None
        self.stop_reason: str | None = None
        """Set by a signal handler: save at the next boundary and stop."""

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def after_step(self, progress: Progress) -> None:
        improved = self._improved(progress)
        last = progress.step == progress.num_steps
        is_due = {
            "never": False,
            "steps": progress.step % max(1, int(self._interval)) == 0,
            "seconds": time.monotonic() - self._last_time >= self._interval,
        }[self._unit]
        told = self._state.ranks.gather((is_due, self.stop_reason))  # clocks and signals are each rank's own
        due, stop = told[0][0], next((reason for _, reason in told if reason), None)
        if last or due or improved or stop:
            self._state.save(self.path(progress.step), progress.step)
            self._last_time = time.monotonic()
            if self._state.ranks.is_leader:
                self._prune()
        if stop and not last:
            kind = Terminated if stop == "SIGTERM" else Interrupted
            raise kind(
                f"stopped by {stop} after step {progress.step} of {progress.num_steps}; all is saved",
                hint="the same command continues the run",
            )

    def close(self) -> None:
        self._prune()  # a kill may have come between the last checkpoint and this

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_value": self.best_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best_step, self.best_value = state["best_step"], state["best_value"]

    def _improved(self, progress: Progress) -> bool:
        metric = self._best_metric or ""
        value = progress.metrics.get(metric.removeprefix("-"))
        if value is None or value != value:
            return False
        if self.best_value is not None and not better(metric, value, self.best_value):
            return False
        self.best_step, self.best_value = progress.step, value
        return True

    def _prune(self) -> None:
        best = None if self.best_step is None else self.path(self.best_step)
        for folder in by_step(self._folder)[: -self._keep]:
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write and fsync one file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
