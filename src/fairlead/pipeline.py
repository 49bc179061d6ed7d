"""Runs the stages of a pipeline in order, each reading the results of earlier ones, and leaves out what is done.

A stage is done when its ``.stage.json`` says so, its inputs hash to what they were and its result is still there. What
is hashed are the resolved settings, the content of files they name, and the results of the stages they refer to: no
paths, so a pipeline may be moved. Knows the verbs, not what a recipe trains.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from fairlead.errors import FairleadError, Interrupted, RunError
from fairlead.pipeline_file import INPUTS, MAKES_FOLDER, Pipeline, Stage, read_pipeline, require_inputs
from fairlead.pipeline_verbs import VERBS, page, read_json
from fairlead.tracking import RunDirectory, file_sha256, tree_sha256

MARKER = ".stage.json"
"""In the folder of each stage: from what it was made, and with what result."""
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Task:
    stage: Stage
    settings: dict[str, Any]
    """Every setting with its value."""
    call: Callable[[], Any]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def plan(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    folder: Path | None = None,
) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, verb and resolved settings of each stage, in order; runs nothing. Raises as ``run_pipeline`` does."""
    tasks = map(_task, read_pipeline(source, overrides, folder).stages)
    return [(task.stage.name, task.stage.verb, task.settings) for task in tasks]


def run_pipeline(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    folder: Path | None = None,
    say: Callable[[str], None] = _say,
) -> dict[str, Any]:
    """Run what is not yet done of a pipeline (a file, a shipped name or a mapping) and return its summary.

    Everything is validated before anything runs. Started again after a failure or a kill, it continues. Raises a
    FairleadError, the stage's name in front, that says what to do.
    """
    pipeline = read_pipeline(source, overrides, folder)
    tasks = [_task(stage) for stage in pipeline.stages]
    directory = RunDirectory(pipeline.folder)
    if directory.recipe.exists():
        raise RunError(f"{directory.path} holds a run, not a pipeline", "choose another name=... or directory=...")
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {directory.path}: {error.strerror}", "choose another directory=...") from error
    with directory.lock():
        for leftover in (*directory.path.glob(".*.removing"), *directory.path.glob("*/*/.*.removing")):
            shutil.rmtree(leftover, ignore_errors=True)
        directory.write_text("pipeline.yaml", yaml.safe_dump(pipeline.content, sort_keys=False, allow_unicode=True))
        return _run(pipeline, tasks, directory, say)


def _run(
    pipeline: Pipeline, tasks: Sequence[_Task], directory: RunDirectory, say: Callable[[str], None]
) -> dict[str, Any]:
    markers: dict[str, dict[str, Any]] = {}
    summary: dict[str, Any] = {"pipeline": pipeline.name, "status": None, "seconds": 0.0, "stages": {}}
    try:
        for number, task in enumerate(tasks, start=1):
            stage = task.stage
            prefix = f"[{number}/{len(tasks)}] {stage.name}: "
            with _named(stage):
                status, marker = _do(task, markers, lambda text, prefix=prefix: say(prefix + text))
            markers[stage.name] = marker
            summary["stages"][stage.name] = {"verb": stage.verb, "status": status, "seconds": marker["seconds"]}
            summary["seconds"] = round(summary["seconds"] + marker["seconds"], 3)
            if stage.verb == "evaluate":
                place = "" if stage.round is None else f"{stage.name.rpartition('/')[0]}/"
                for run, metrics in read_json(stage.folder / "metrics.json").items():
                    summary.setdefault("models", {}).setdefault(place + run, {"metrics": {}})["metrics"] |= metrics
            if stage.verb == "cross_validate":
                summary.setdefault("crossval", {})[stage.name] = read_json(stage.folder / "crossval.json")
    except BaseException as error:
        summary["status"] = "interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed"
        with suppress(RunError):  # what went wrong first is what counts
            directory.write_json("summary.json", summary)
        raise
    summary["status"] = "finished"
    directory.write_json("summary.json", summary)
    return summary


def _do(
    task: _Task, markers: Mapping[str, Mapping[str, Any]], say: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """Do a stage, or see that it is done. Returns ran, continued or skipped, and its marker."""
    stage, run = task.stage, RunDirectory(task.stage.folder)
    inputs, before = _digest(task, markers), read_json(stage.folder / MARKER)
    unchanged = before.get("inputs") == inputs
    if unchanged and before["output"] and before["output"] == _output(stage):
        say("unchanged, skipped")
        return "skipped", before
    continues = unchanged and not before["output"] and _can_continue(task)
    if not continues:
        _discard(stage, made_here=bool(before) and not stage.folder.is_symlink())
    begun = [*run.path.glob("**/checkpoints/step-*"), *run.path.parent.glob(f".{stage.result.name}.*/")]
    status = "continued" if continues and begun else "ran"
    why = "continuing, " if status == "continued" else "changed, again: " if before and not unchanged else ""
    say(f"{why}{stage.verb} {_title(stage.subject)}")
    marker = {"format_version": FORMAT_VERSION, "verb": stage.verb, "inputs": inputs, "output": None}
    if stage.verb not in MAKES_FOLDER:
        run.write_json(MARKER, marker)
    started = time.monotonic()
    with _by_itself():
        task.call()
    seconds = round(time.monotonic() - started, 3)
    marker |= {
        "output": _output(stage),
        "seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    assert marker["output"], f"{stage.verb} left no result"
    run.write_json(MARKER, marker)
    say(f"{seconds:.{0 if seconds >= 10 else 1}f} s")
    return status, marker


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """The stage's name in front of what went wrong."""
    try:
        yield
    except FairleadError as error:
        error.message = f"stage {stage.name}: {error.message}"
        raise


# --- what a stage will do ------------------------------------------------------------------------------------------


def _task(stage: Stage) -> _Task:
    """A stage with its settings resolved. Raises ConfigError for what its verb does not take or lacks, DataError for a
    file that is missing."""
    with _named(stage):
        settings, call = VERBS[stage.verb](stage)
        require_inputs(settings, stage.home)
        return _Task(stage, settings, call)


@contextmanager
def _by_itself() -> Iterator[None]:
    """Leaves no trace in the process, so that a stage does not depend on whether those before it were skipped."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        gc.collect()  # modules form cycles: the weights would stay beside those of the next stage


# --- whether it is done ----------------------------------------------------------------------------------------------


def _digest(task: _Task, markers: Mapping[str, Mapping[str, Any]]) -> str:
    """Hash of all that a stage's result depends on. A report depends on what its runs logged, too."""
    stage, is_report = task.stage, task.stage.verb == "report"
    # Where a run stands and who watches it do not change its result.
    settings = {key: value for key, value in task.settings.items() if key not in ("run", "tracking")}
    folders = {str(stage.home / name): f"${{{name}}}" for name in stage.upstream}
    content = {
        "verb": stage.verb,
        "settings": _identity(settings, "", folders),
        "upstream": {name: markers[name] if is_report else markers[name]["output"] for name in stage.upstream},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _identity(value: Any, key: str, folders: Mapping[str, str]) -> Any:
    """Settings with references for the folders of stages, and hashes of content for the paths of inputs."""
    if isinstance(value, Mapping):
        return {name: _identity(item, key if key in INPUTS else name, folders) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(item, key, folders) for item in value]
    if not isinstance(value, str):
        return value
    for folder, reference in folders.items():
        value = re.sub(rf"{re.escape(folder)}(?=/|$|\.jsonl$)", reference, value)
    if key not in (*INPUTS, "algorithm", "clean", "discard") and "/" not in value:
        return value
    path = Path(value)
    if re.fullmatch(r"[\w.]+:\w+", value) and not path.exists():
        path = _source(value.partition(":")[0]) or path
    try:
        if path.is_dir():
            return tree_sha256(path / "model" if (path / "model").is_dir() else path)
        return file_sha256(path) if path.is_file() else value
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from error


def _source(module: str) -> Path | None:
    """The file of a Python module, where it has one."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _output(stage: Stage) -> str | None:
    """Hash of a stage's result; none where it is not there."""
    folder = stage.folder
    if stage.verb == "train":
        return tree_sha256(folder / "model") if (folder / "model").is_dir() else None
    files = {
        "prepare": sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")]),
        "merge": sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]),
        "cross_validate": [folder / "crossval.json"],
        "evaluate": [folder / "metrics.json"],
        "report": [page(stage)],
    }.get(stage.verb, [stage.result])
    found = [*files]
    if stage.verb == "evaluate":  # reports read what it left with the runs, where a later evaluation may replace it
        found += [stage.home / run / "evaluation" / "metrics.json" for run in stage.subject]
    if not files or not all(file.is_file() for file in found):
        return None
    hashes = "".join(f"{file.name}\0{file_sha256(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _can_continue(task: _Task) -> bool:
    """Whether an unfinished run takes its own files up again: it compares the recipe and its inputs, paths and all."""
    run, settings = RunDirectory(task.stage.folder), task.settings
    if task.stage.verb == "cross_validate":
        recipe = read_json(run.path / "plan.json").get("recipe", {})
        return all(settings[key] == value for key, value in recipe.items())
    if task.stage.verb != "train" or not run.recipe.exists():
        return True
    from fairlead.assemble import Given
    from fairlead.manifest import fingerprints
    from fairlead.runner import resolve

    inputs = read_json(run.manifest).get("inputs")
    same_recipe = yaml.safe_load(run.recipe.read_text("utf-8")) == settings
    return same_recipe and inputs in (None, fingerprints(resolve(settings).recipe, Given()))


def _discard(stage: Stage, *, made_here: bool) -> None:
    """Take an outdated stage's folder away; a kill meanwhile leaves none or the whole of it under its name."""
    folder = stage.folder
    if not made_here:
        present = [] if not folder.is_dir() else [path for path in folder.iterdir() if not path.name.startswith(".")]
        # Such a folder without a marker is a kill's leftover or a stranger, which the verb tells apart.
        if stage.verb not in MAKES_FOLDER and (present or (folder.exists() and not folder.is_dir())):
            raise RunError(f"{folder} was not made by this pipeline", "move it away, or choose another name=...")
        if stage.result.is_file():
            raise RunError(f"{stage.result} was not made by this pipeline", "move it away, or choose another name=...")
        return
    trash = folder.with_name(f".{folder.name}.removing")
    try:
        if stage.result != folder:
            stage.result.unlink(missing_ok=True)
        with RunDirectory(folder).lock():
            folder.rename(trash)
        shutil.rmtree(trash)
    except OSError as error:
        raise RunError(f"cannot remove {folder}: {error.strerror}", "remove it and run again") from error


def _title(subject: Any) -> str:
    if isinstance(subject, Mapping):
        return str(subject.get("algorithm"))
    return ", ".join(subject) if isinstance(subject, list) else str(subject)
