"""A recipe and a space, held against each other before anything runs, and the folder that remembers them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from fairlead.algorithms import find
from fairlead.config_file import find_file, parse_override, read_mapping, shipped
from fairlead.config_resolve import ResolvedRecipe, flatten, set_value
from fairlead.errors import ConfigError, RunError
from fairlead.pipeline_file import require_inputs
from fairlead.runner import resolve
from fairlead.sweep.space import Space, read_space
from fairlead.tracking import RunDirectory

FORMAT_VERSION = 1
FREE = ("trials", "max_failures")
"""What may be changed between two commands."""


@dataclass(frozen=True, slots=True)
class Plan:
    recipe: str
    """As it was given: a file or a shipped name."""
    settings: tuple[str, ...]
    resolved: ResolvedRecipe
    """The recipe with the settings, and without parameters."""
    space: Space
    folder: Path

    @property
    def base(self) -> Path:
        """The recipe's file with the settings, as it was when the sweep began: what every trial changes."""
        return self.folder / "base.yaml"

    def run(self, number: int) -> RunDirectory:
        return RunDirectory(self.folder / "trials" / f"{number:03d}")

    def as_dict(self) -> dict[str, Any]:
        space = self.space.as_dict()
        del space["trials"]
        return {"recipe": self.recipe, "folder": str(self.folder), "planned": self.num_trials, **space}

    @property
    def num_trials(self) -> int:
        return self.space.num_trials


def make_plan(recipe: str, space: Path, settings: Sequence[str] = (), out: Path | None = None) -> Plan:
    """Raises ConfigError for a pipeline, a key that the recipe has not, a value that it does not take; DataError for a
    file that is missing."""
    _refuse_pipeline(recipe)
    resolved, found = resolve(recipe, settings), read_space(space)
    run = resolved.recipe.run
    folder = out or Path(run.directory) / f"{run.name or find(resolved.recipe.algorithm).name}-sweep"
    plan = Plan(recipe, tuple(settings), resolved, found, folder)
    _try_values(plan, str(space))
    return plan


def _refuse_pipeline(recipe: str) -> None:
    path = Path(recipe)
    if "stages" in read_mapping(path)[0] if path.is_file() else recipe in shipped("pipeline"):
        raise ConfigError(
            f"{recipe} is a pipeline, and a sweep trains one recipe",
            hint="run the pipeline, then sweep the recipe of its stage with model.path and data.path of its results",
        )


def _try_values(plan: Plan, place: str) -> None:
    """Resolve the recipe with every choice and both ends of each parameter."""
    space, given = plan.space.space, dict(map(parse_override, plan.settings))
    for key in space:
        if key.partition(".")[0] == "run":
            raise ConfigError(f"{place}: {key}: a sweep names its runs itself", hint="--out FOLDER places a sweep")
        if key in given:
            raise ConfigError(f"{place}: {key} is also on the command line", hint="a value is fixed or searched")
    first = {key: parameter.samples[0] for key, parameter in space.items()}
    for key, parameter in space.items():
        for value in parameter.samples:
            try:
                resolved = resolve(plan.recipe, given | first | {key: value})
            except ConfigError as error:
                message = error.message.replace("(command line)", f"({place})")
                raise ConfigError(f"with {key}={json.dumps(value)}: {message}", error.hint) from error
            _refuse_incomplete(resolved, plan.folder)


def _refuse_incomplete(resolved: ResolvedRecipe, folder: Path) -> None:
    recipe = resolved.recipe
    for key, value in (("data.path", recipe.data.path), ("model.path", recipe.model.path or recipe.model.scratch)):
        if not value:
            raise ConfigError(f"{key} is not given", hint=f"add {key}=... to the command")
    require_inputs(resolved.as_dict(), folder)


# --- the folder ----------------------------------------------------------------------------------------------------


def hold(path: Path, *, wait: bool = False) -> IO[str] | None:
    """An open file that no other process holds, or none where one does. It is let go when it is closed, and however its
    process ends."""
    try:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
    except OSError as error:
        raise RunError(f"cannot lock {path}: {error.strerror}", "a sweep needs a folder with locks: --out") from error
    return file


def alone(folder: Path) -> IO[str]:
    """What only one process of a sweep does at a time."""
    file = hold(folder / ".lock", wait=True)
    assert file is not None
    return file


def remember(plan: Plan) -> None:
    """Write the plan into its folder. Raises RunError where that holds another one, or something else."""
    directory = RunDirectory(plan.folder)
    try:
        (plan.folder / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {plan.folder}: {error.strerror}", "choose another --out") from error
    now = {"recipe": plan.resolved.as_dict(), "space": plan.space.as_dict(), "keys in order": list(plan.space.space)}
    del now["recipe"]["run"]
    with alone(plan.folder):
        if (plan.folder / "plan.json").is_file():
            _compare(directory.read_json("plan.json"), json.loads(json.dumps(now)), plan.folder)
            return
        strange = {each.name for each in plan.folder.iterdir() if each.name[0] != "."} - {"base.yaml", "trials"}
        if strange:
            raise RunError(f"{plan.folder} holds files that are no sweep: {min(strange)}", "choose another --out")
        base, _ = read_mapping(find_file(plan.recipe))
        for key, value in map(parse_override, plan.settings):
            set_value(base, key, value)
        directory.write_text("base.yaml", yaml.safe_dump(base, sort_keys=False, allow_unicode=True))
        directory.write_json("plan.json", {"format_version": FORMAT_VERSION, **now})


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    old, new = (flatten({name: each.get(name) for name in now}) for each in (before, now))
    free = {f"space.{key}" for key in FREE}
    changed = [key for key in dict.fromkeys([*old, *new]) if key not in free and old.get(key) != new.get(key)]
    if changed:
        told = "\n".join(f"  {key}: {_told(old, key)} before, {_told(new, key)} now" for key in changed[:8])
        more = f"\n  and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise RunError(
            f"{folder} holds a sweep of another recipe or space:\n{told}{more}",
            f"choose another --out, or remove {folder}; {' and '.join(FREE)} may be changed",
        )


def _told(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "not there"
