"""Runs that go on from a step: the run itself, with what came after it removed, or a fork with other settings."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fairlead.assemble import Given
from fairlead.config_file import parse_override, read_mapping
from fairlead.config_resolve import ResolvedRecipe, flatten
from fairlead.errors import CheckpointError, ConfigError, DataError, ModelError, RunError
from fairlead.manifest import fingerprints, now
from fairlead.runner import RunResult, resolve, run_stage
from fairlead.tracking import RunDirectory, tree_sha256
from fairlead.training.checkpoint import by_step, verify

_WEIGHTS = "the checkpoint holds the weights of this model"
_RECORDS = "the checkpoint says how far the run is in these records"
_OPTIMIZER = "the checkpoint holds the states of this optimizer"
KEPT = {
    "algorithm": "the checkpoint holds the state of this algorithm",
    "seed": "the order of the records and every draw hang on it",
    "threads": "the run goes on with the CPU threads it began with",
    **{
        f"model.{key}": _WEIGHTS
        for key in ("path", "scratch", "tokenizer", "add_tokens", "adapter", "quantize", "num_layers_unfrozen")
    },
    "model.roles": _WEIGHTS,
    "model.dtype": _WEIGHTS,
    "data": _RECORDS,
    "train.batch_size": _RECORDS,
    "train.micro_batch_tokens": "forward passes keep their size, which changes no result",
    "train.best_metric": "the best checkpoint so far was chosen by it",
    "optim.name": _OPTIMIZER,
    "optim.state_dtype": _OPTIMIZER,
}
"""Settings that a checkpoint's state depends on, with the reason why a fork cannot change them."""
FREE = ("data.workers", "data.cache", "data.eval_path")


def resume(path: Path, settings: Sequence[str] = ()) -> RunResult:
    """Continue a run from its last checkpoint, or from that of the step in ``at=STEP``: what came after it is removed.
    Raises ConfigError for any other setting, RunError for a step without a checkpoint."""
    directory = RunDirectory.open(path)
    recipe, _ = read_mapping(directory.recipe)
    given = dict(map(parse_override, settings))
    step = given.pop("at", None)
    if given:
        raise ConfigError(
            f"resume changes no settings, got {', '.join(given)}",
            hint=f"fairlead fork {path} at=STEP {' '.join(f'{key}=...' for key in given)}",
        )
    if step is not None:
        _go_back(directory, _whole_number(step))
    return run_stage(_only_given(resolve(recipe), directory), folder=path)


def fork(path: Path, settings: Sequence[str]) -> RunResult:
    """Begin a new run from the checkpoint of ``at=STEP`` of another, with changed settings; or continue it.

    It stands beside its parent as ``NAME-at-STEP`` where ``run.name`` and ``run.directory`` do not say otherwise, and
    its manifest names the parent with the checkpoint's hash. Raises ConfigError for settings that the checkpoint's
    state depends on, RunError for a step without a checkpoint.
    """
    parent = RunDirectory.open(path)
    changed = dict(map(parse_override, settings))
    if "at" not in changed:
        raise ConfigError("fork needs the step to begin from", hint=_there_are(parent))
    step = _whole_number(changed.pop("at"))
    source = {"run": str(parent.path), "step": step, "checkpoint": tree_sha256(_checkpoint(parent, step))}
    before, _ = read_mapping(parent.recipe)
    place = {"run.directory": str(parent.path.parent), "run.name": f"{parent.path.resolve().name}-at-{step}"}
    resolved = _only_given(resolve(before, place | changed), parent, changed)
    _refuse_meaningless(before, resolved, step)
    run = resolved.recipe.run
    made = RunDirectory(Path(run.directory) / str(run.name))
    is_new = not made.path.exists()
    if is_new:
        _copy(parent, made, step, resolved, source)
        _say(f"{made.path}: forked from {parent.path} after step {step}")
    elif not made.manifest.is_file() or made.read_json("manifest.json").get("parent") != source:
        raise RunError(f"{made.path} exists, and is no fork of this step of {parent.path}", "choose another run.name")
    try:
        return run_stage(resolved)
    except (ConfigError, DataError, ModelError, CheckpointError, RunError):
        if is_new and [_step_of(folder) for folder in by_step(made.checkpoints)] == [step]:
            shutil.rmtree(made.path)  # it could not begin: the corrected command bears its name
        raise


def _only_given(resolved: ResolvedRecipe, before: RunDirectory, changed: Iterable[str] = ()) -> ResolvedRecipe:
    """Without warnings of settings that no one gave: a run's recipe.yaml holds them all."""
    told = before.read_json("manifest.json")["notes"] if before.manifest.is_file() else ()
    kept = (each for each in resolved.warnings if each in told or each.partition(" ")[0] in changed)
    return replace(resolved, warnings=tuple(kept))


def _go_back(directory: RunDirectory, step: int) -> None:
    """Remove what a run did after a step. A kill meanwhile leaves a run that can be continued."""
    with directory.lock():
        folder = _checkpoint(directory, step)
        results = (directory.summary, directory.model, directory.evaluation, directory.report)
        later = [each for each in by_step(directory.checkpoints) if _step_of(each) > step]
        gone = [each for each in results if each.exists()]
        gone += later[::-1]  # the newest first, rounds after them: what is left is always a whole run up to some step
        gone += [each for each in _rounds(directory) if int(each.name) >= _next_round(folder)]
        names = ", ".join(str(each.relative_to(directory.path)) for each in gone)
        _say(f"{directory.path} goes back to step {step}; removed: {names or 'nothing'}")
        for each in gone:
            if each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink()


def _copy(parent: RunDirectory, made: RunDirectory, step: int, resolved: ResolvedRecipe, source: Any) -> None:
    """The parent up to a step, under the fork's name whole or not at all."""
    folder, manifest = _checkpoint(parent, step), parent.read_json("manifest.json")
    temporary = RunDirectory(made.path.with_name(f".forking-{made.path.name}"))
    shutil.rmtree(temporary.path, ignore_errors=True)
    try:
        shutil.copytree(folder, temporary.checkpoints / folder.name)
        for each in _rounds(parent):
            if int(each.name) < _next_round(folder):
                shutil.copytree(each, temporary.rounds / each.name)
        for log in parent.path.glob("*.jsonl"):
            shutil.copy(log, temporary.path)
        temporary.truncate_after(step)
        temporary.write_text("recipe.yaml", resolved.as_yaml())
        begun = {"name": made.path.name, "created": now(), "parent": source, "inputs": _inputs(manifest, resolved)}
        temporary.write_json("manifest.json", manifest | begun | {"notes": []})
        if problem := verify(temporary.checkpoints / folder.name):
            raise RunError(f"{folder} changed while it was copied: {problem}", "run the same command again")
        temporary.path.rename(made.path)
    except OSError as error:
        raise RunError(f"{made.path} could not be written: {error}", "make room, or choose another name") from error
    finally:
        shutil.rmtree(temporary.path, ignore_errors=True)


def _inputs(manifest: Mapping[str, Any], resolved: ResolvedRecipe) -> dict[str, Any]:
    """What the fork reads: of the same place as its parent the parent's hash, to be compared with."""
    before, found = manifest["inputs"], fingerprints(resolved.recipe, Given())
    same = {name for name, each in found.items() if before.get(name, {}).get("path") == each["path"]}
    return {name: before[name] if name in same else each for name, each in found.items()}


def _refuse_meaningless(before: Mapping[str, Any], resolved: ResolvedRecipe, step: int) -> None:
    old, new = flatten(before), flatten(resolved.as_dict())
    for key in sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        rules = [rule for rule in KEPT if key == rule or key.startswith(f"{rule}.")]
        if rules and key not in FREE:
            raise ConfigError(
                f"{key} cannot be changed in a fork: {KEPT[rules[0]]}",
                hint="a new run may begin from the model of another: model.path=RUN",
            )
    steps = resolved.recipe.train.steps
    if steps is not None and steps < step:
        raise ConfigError(f"train.steps={steps} is before step {step}, where the fork begins", hint="raise train.steps")


def _checkpoint(directory: RunDirectory, step: int) -> Path:
    """The whole checkpoint of a step. Raises RunError naming those there are."""
    for folder in by_step(directory.checkpoints):
        if _step_of(folder) == step:
            if problem := verify(folder):
                raise RunError(problem, hint=_there_are(directory))
            return folder
    raise RunError(f"{directory.path} has no checkpoint of step {step}", hint=_there_are(directory))


def _there_are(directory: RunDirectory) -> str:
    steps = ", ".join(str(_step_of(folder)) for folder in by_step(directory.checkpoints))
    return f"there are checkpoints of steps: {steps or 'none'}; train.keep_checkpoints says how many are kept"


def _next_round(folder: Path) -> int:
    """The first round that a checkpoint does not know; of a run without rounds zero."""
    source = json.loads((folder / "state.json").read_text("utf-8"))["source"]
    return source.get("round", 0) + bool(source.get("position"))


def _rounds(directory: RunDirectory) -> Iterator[Path]:
    return (path for path in sorted(directory.rounds.glob("*")) if path.name.isdigit())


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"at={value}: the number of a step was expected", hint="for example at=100")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr)
