"""The file of a pipeline: its values, its stages, and what refers to what. Runs nothing and imports no torch; what a
stage's settings mean, the stage's verb knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairlead.config_file import find_file, parse_override, read_mapping, suggest
from fairlead.config_resolve import flatten
from fairlead.data.sources import format_of, require
from fairlead.errors import ConfigError

VERBS = ("prepare", "train", "cross_validate", "evaluate", "report")
OWN_KEYS = ("name", "directory", "seed", "stages")
INPUTS = ("path", "eval_path", "text", "tokenizer", "reward", "watch", "prompts", "pairs", "demonstrations", "scores")
"""Settings that name files, folders or functions: the last part of their key, or a part before it."""
_FORMATS = (".jsonl", ".ndjson", ".json", ".txt", ".xml")
_NO_FILES = ("function", "rule", "url")
"""Keys of a reward that is no file: what else it says is none either."""
_NEEDED = ("path", "reward", "prompts")
"""Settings that cannot be null where they refer to a value: the last part of their key."""
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    verb: str
    subject: Any
    """What the verb is done to: a kind of data, a recipe, names of runs."""
    settings: dict[str, Any]
    """The other keys, dotted; references are replaced."""
    upstream: tuple[str, ...]
    """The earlier stages whose results it reads."""
    folder: Path


@dataclass(frozen=True, slots=True)
class Pipeline:
    name: str
    folder: Path
    stages: tuple[Stage, ...]
    content: dict[str, Any]
    """The file with the overrides in place."""


def read_pipeline(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    folder: Path | None = None,
) -> Pipeline:
    """A pipeline from a file, a shipped name or a mapping. Raises ConfigError for what cannot be understood: a key, a
    verb, a reference; ``folder`` wins over ``directory/name``."""
    if isinstance(source, Mapping):
        raw, lines, place, default = _plain(source), dict[str, int](), "the given pipeline", "pipeline"
    else:
        path = find_file(str(source), "pipeline")
        (raw, lines), place, default = read_mapping(path), str(path), path.stem
    specs = raw.get("stages")
    if not isinstance(specs, dict) or not specs:
        raise ConfigError(f"{place}: a pipeline needs stages", hint="stages: {sft: {train: sft, data.path: ...}}")

    def located(name: str) -> str:
        line = lines.get(f"stages.{name}")
        return f"{place}, stage {name!r}" if line is None else f"{place}:{line}, stage {name!r}"

    for name, spec in specs.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (*raw, *OWN_KEYS):
            raise ConfigError(
                f"{located(name)}: not the name of a stage",
                hint="letters, digits, - and _, and no section of the file bears the same name",
            )
        if not isinstance(spec, dict):
            raise ConfigError(f"{located(name)}: a mapping was expected, got {spec!r}")
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides)
    for key, value in pairs:
        _override(raw, key, _plain(value))

    name, seed = str(raw.get("name", default)), raw.get("seed")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{place}: name={name!r} cannot be a folder's name", hint="use letters, digits, - and _")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ConfigError(f"{place}: seed must be a whole number from 0, got {seed!r}")
    folder = Path(folder or Path(str(raw.get("directory", "runs"))) / name)
    stages: list[Stage] = []
    for stage_name in specs:
        stages.append(_stage(stage_name, raw, folder, stages, located(stage_name)))
    return Pipeline(name, folder, tuple(stages), raw)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; of two that contradict each other the later one wins."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        target = nested
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        target[last] = value
    return nested


def require_inputs(settings: Mapping[str, Any], folder: Path) -> None:
    """Raises DataError for a file that the settings name and that is missing, unless a stage may still make it in
    ``folder``; a hub id is not asked for."""
    for key, text in _texts(settings, ""):
        is_local = text.startswith((".", "/")) or format_of(Path(text)) in _FORMATS
        if key in INPUTS and is_local and not Path(text).is_relative_to(folder):
            require(Path(text))


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string in settings, with the key it stands under."""
    if isinstance(value, Mapping) and (key not in INPUTS or value.keys().isdisjoint(_NO_FILES)):
        for name, item in value.items():
            yield from _texts(item, key if key in INPUTS else name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def _plain(value: Any) -> Any:
    """A copy as YAML would hold it: what Python hands in may be paths and tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a value of the file, or a setting of one of its stages."""
    stages, (first, *rest) = raw["stages"], key.split(".")
    if first == "stages" and rest:
        if rest[0] not in stages:
            raise ConfigError(f"{key}: there is no stage {rest[0]!r}", hint=suggest(rest[0], stages))
        if len(rest) == 1:
            raise ConfigError(f"{key} names a whole stage", hint=f"write {key}.SETTING=value")
        spec, setting = stages[rest[0]], ".".join(rest[1:])
        spec.pop(setting, None)  # what stands last wins, over a nested spelling too
        spec[setting] = value
        return
    *parents, last = first, *rest
    target: Any = raw
    for parent in parents:
        target = target.get(parent) if isinstance(target, dict) else None
    if key == "stages" or not isinstance(target, dict) or (last not in target and key not in OWN_KEYS):
        sections = {name: section for name, section in raw.items() if name != "stages"}
        hint = f"write stages.{key}=value" if first in stages else suggest(key, [*OWN_KEYS[:3], *flatten(sections)])
        raise ConfigError(f"the pipeline has no value {key!r}", hint=hint)
    target[last] = value


def _stage(name: str, raw: dict[str, Any], folder: Path, earlier: Sequence[Stage], place: str) -> Stage:
    spec = dict(raw["stages"][name])
    verbs, first = [verb for verb in VERBS if verb in spec], str(next(iter(spec), ""))
    if not verbs:
        raise ConfigError(f"{place} has no verb; its first key is {first!r}", hint=suggest(first, VERBS))
    if len(verbs) > 1:
        raise ConfigError(f"{place} has two verbs: {' and '.join(verbs[:2])}", hint="one stage does one thing")
    verb, upstream = verbs[0], dict[str, None]()
    lookup = _lookup(raw, folder, [stage.name for stage in earlier], upstream, place)
    subject = _replace(spec.pop(verb), lookup)
    settings: dict[str, Any] = {}
    for key, value in flatten(spec).items():
        settings[key] = _replace(value, lookup)
        if settings[key] is None and value is not None and key.split(".")[-1] in _NEEDED:
            raise _null(place, value[2:-1])
    settings = flatten(settings)
    if verb in ("evaluate", "report"):
        subject = subject if isinstance(subject, list) and subject else [subject]
        runs = [stage.name for stage in earlier if stage.verb == "train"]
        for run in subject:
            if run not in runs:
                raise ConfigError(f"{place}: {run!r} is no earlier train stage", hint=suggest(str(run), runs))
        key, known = ("reference", runs) if verb == "evaluate" else ("before", subject)
        if settings.get(key) not in (None, *known):
            got = settings[key]
            raise ConfigError(f"{place}: {key}={got!r} is none of the runs", hint=suggest(str(got), [*map(str, known)]))
        upstream |= dict.fromkeys(run for run in [*subject, settings.get(key)] if run is not None)
    if verb == "report":  # it shows what the evaluations found
        upstream |= {stage.name: None for stage in earlier if stage.verb == "evaluate"}
    elif raw.get("seed") is not None and not (isinstance(subject, Mapping) and "seed" in subject):
        settings.setdefault("seed", raw["seed"])
    if verb == "train" and any(key.split(".")[0] == "run" for key in settings):
        raise ConfigError(
            f"{place}: the run bears the stage's name", hint="name=... and directory=... place a pipeline"
        )
    return Stage(name, verb, subject, settings, tuple(upstream), folder / name)


def _replace(value: Any, lookup: Callable[[str, bool], Any]) -> Any:
    """``value`` with its references replaced; one that is the whole string keeps the type of what it refers to."""
    if isinstance(value, Mapping):
        return {key: _replace(item, lookup) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item, lookup) for item in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    return lookup(whole[1], True) if whole else _REFERENCE.sub(lambda match: str(lookup(match[1], False)), value)


def _lookup(
    raw: dict[str, Any], folder: Path, earlier: Sequence[str], upstream: dict[str, None], place: str
) -> Callable[[str, bool], Any]:
    """What a reference stands for: a stage's folder, which is noted in ``upstream``, or a value of the file."""
    stages = list(raw["stages"])
    values = {key: value for key, value in raw.items() if key != "stages"}

    def find(name: str, whole: bool, trail: tuple[str, ...] = ()) -> Any:
        if name in earlier:
            upstream[name] = None
            return str(folder / name)
        if name in stages:
            raise ConfigError(
                f"{place} refers to {name!r}, which is not done before it", hint="a stage stands below those it needs"
            )
        if name in trail:
            raise ConfigError(f"{place}: {' -> '.join([*trail, name])} refers to itself")
        found: Any = values
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise ConfigError(
                    f"{place} refers to {name!r}, which is nothing in this file",
                    hint=suggest(name, [*earlier, *flatten(values)]),
                )
            found = found[part]
        found = _replace(found, lambda inner, is_whole: find(inner, is_whole, (*trail, name)))
        if not whole and found is None:
            raise _null(place, name)
        if not whole and isinstance(found, dict | list):
            raise ConfigError(f"{place}: {name} is no single value and cannot stand inside a text")
        return found

    return find


def _null(place: str, name: str) -> ConfigError:
    return ConfigError(f"{place} needs {name}, which is not given", hint=f"add {name}=FILE to the command")
