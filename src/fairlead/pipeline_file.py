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

VERBS = ("prepare", "train", "merge", "cross_validate", "evaluate", "report", "generate", "score", "select")
WRITES_FILE = ("generate", "score", "select")
"""Verbs whose result is one file and not a folder."""
MAKES_FOLDER = ("prepare", "merge")
"""Verbs that make their folder whole or not at all, and know one that they have made."""
SEEDLESS = ("merge", "report", "score")
OWN_KEYS = ("name", "directory", "seed", "stages")
ROUND_VALUES = ("previous", "round")
"""What a repeated stage may refer to besides: the last stage of the time before, and the number of the time."""
INPUTS = (
    *("path", "eval_path", "text", "tokenizer", "reward", "watch", "prompts", "pairs", "demonstrations", "scores"),
    "merge",
    *WRITES_FILE,
)
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
    home: Path
    """The pipeline's folder."""
    round: int | None = None
    """Of a stage that is repeated: which time this is, from 0."""

    @property
    def folder(self) -> Path:
        return self.home / self.name

    @property
    def result(self) -> Path:
        """What `${name}` stands for: the folder, or the file beside it."""
        return self.folder.with_suffix(".jsonl") if self.verb in WRITES_FILE else self.folder


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

    def located(*names: str) -> str:
        line = lines.get("stages." + ".stages.".join(map(str, names)))
        told = f"stage {'/'.join(map(str, names))!r}"
        return f"{place}, {told}" if line is None else f"{place}:{line}, {told}"

    _check(specs, raw, located)
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
    scope = _Scope({key: value for key, value in raw.items() if key != "stages"}, {}, tuple(specs))
    for stage_name, spec in specs.items():
        if "repeat" in spec:
            stages += _repeated(stage_name, spec, scope, folder, located)
        else:
            stages.append(_stage(stage_name, spec, scope, folder, located(stage_name)))
        scope.earlier[stage_name] = stages[-1]
    return Pipeline(name, folder, tuple(stages), raw)


def _check(specs: Mapping[Any, Any], raw: Mapping[str, Any], located: Callable[..., str]) -> None:
    """Raises ConfigError for names and specifications of stages that are none, those repeated included."""
    for name, spec in specs.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (*raw, *OWN_KEYS, *ROUND_VALUES):
            raise ConfigError(
                f"{located(name)}: not the name of a stage",
                hint="letters, digits, - and _, and no section of the file bears the same name",
            )
        if not isinstance(spec, dict):
            raise ConfigError(f"{located(name)}: a mapping was expected, got {spec!r}")
        if "repeat" in spec:
            inner = spec.get("stages")
            if {*spec, "each"} != {"repeat", "start", "stages", "each"} or not isinstance(inner, dict) or not inner:
                raise ConfigError(
                    f"{located(name)}: repeat, start and stages were expected, got {', '.join(map(str, spec))}",
                    hint="{repeat: 3, start: ${sft}, stages: {...}}; ${previous} is the last stage of the time before",
                )
            _check_each(spec.get("each", {}), (*raw, *specs, *inner, *ROUND_VALUES), located(name))
            if any("repeat" in each for each in inner.values() if isinstance(each, dict)):
                raise ConfigError(f"{located(name)}: a repeat inside a repeat", hint="put its stages one after another")
            _check(inner, raw, lambda *names, name=name: located(name, *names))


def _check_each(each: Any, taken: Sequence[Any], place: str) -> None:
    """Raises ConfigError for values of rounds that are none."""
    if not isinstance(each, dict) or not all(isinstance(values, list) and values for values in each.values()):
        raise ConfigError(f"{place}: each must name lists of values, got {each!r}", hint="each: {rate: [1e-4, 5e-5]}")
    if clash := [name for name in each if name in taken]:
        raise ConfigError(f"{place}: each names {clash[0]!r}, which is something else here", hint="choose another name")


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
        _override_stage(stages, key, rest, value)
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


def _override_stage(stages: dict[str, Any], key: str, rest: Sequence[str], value: Any) -> None:
    name, *setting = rest
    if name not in stages:
        raise ConfigError(f"{key}: there is no stage {name!r}", hint=suggest(name, stages))
    if not setting:
        raise ConfigError(f"{key} names a whole stage", hint=f"write {key}.SETTING=value")
    spec = stages[name]
    if "repeat" in spec and setting[0] == "stages" and len(setting) > 1:
        _override_stage(spec["stages"], key, setting[1:], value)
        return
    spec.pop(".".join(setting), None)  # what stands last wins, over a nested spelling too
    spec[".".join(setting)] = value


@dataclass(frozen=True, slots=True)
class _Scope:
    """What a stage may refer to."""

    values: dict[str, Any]
    """Those of the file."""
    earlier: dict[str, Stage]
    """By the names they have here."""
    all: tuple[str, ...]
    """Names of stages, also of those that are not done before it."""


def _repeated(
    name: str, spec: Mapping[str, Any], scope: _Scope, home: Path, located: Callable[..., str]
) -> list[Stage]:
    """The stages of every time, `NAME/000/STAGE`, each from the last one of the time before. Of the values that
    `each` lists, a time takes its own; the last one serves those that follow, too."""
    times = _replace(spec["repeat"], _lookup(scope, {}, located(name)))
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise ConfigError(f"{located(name)}: repeat must be a whole number from 1, got {times!r}")
    stages: list[Stage] = []
    for number in range(times):
        own = {key: listed[min(number, len(listed) - 1)] for key, listed in spec.get("each", {}).items()}
        values = {**scope.values, **own, "round": number, **({} if stages else {"previous": spec["start"]})}
        previous = {"previous": stages[-1]} if stages else {}
        inner = _Scope(values, scope.earlier | previous, (*scope.all, *spec["stages"]))
        for stage_name, own in spec["stages"].items():
            full, place = f"{name}/{number:03d}/{stage_name}", located(name, stage_name)
            stages.append(_stage(full, own, inner, home, place, number))
            inner.earlier[stage_name] = stages[-1]
    return stages


def _stage(
    name: str, given: Mapping[str, Any], scope: _Scope, home: Path, place: str, number: int | None = None
) -> Stage:
    spec = dict(given)
    verbs, first = [verb for verb in VERBS if verb in spec], str(next(iter(spec), ""))
    if not verbs:
        raise ConfigError(f"{place} has no verb; its first key is {first!r}", hint=suggest(first, VERBS))
    if len(verbs) > 1:
        raise ConfigError(f"{place} has two verbs: {' and '.join(verbs[:2])}", hint="one stage does one thing")
    verb, upstream = verbs[0], dict[str, None]()
    lookup = _lookup(scope, upstream, place)
    subject = _replace(spec.pop(verb), lookup)
    settings: dict[str, Any] = {}
    for key, value in flatten(spec).items():
        settings[key] = _replace(value, lookup)
        if settings[key] is None and value is not None and key.split(".")[-1] in _NEEDED:
            raise _null(place, value[2:-1])
    settings = flatten(settings)
    if verb in ("evaluate", "report"):
        subject = _runs(verb, subject, settings, scope, place)
        own = settings.get("reference") if verb == "evaluate" else None
        upstream |= dict.fromkeys([*subject, *([own] if own else [])])
    if verb == "report":  # it shows what the evaluations found
        upstream |= {stage.name: None for stage in scope.earlier.values() if stage.verb == "evaluate"}
    seed = scope.values.get("seed")
    if verb not in SEEDLESS and seed is not None and not (isinstance(subject, Mapping) and "seed" in subject):
        settings.setdefault("seed", seed)
    if verb in ("generate", "select") and number is not None:
        settings.setdefault("round", number)
    if verb == "train" and any(key.split(".")[0] == "run" for key in settings):
        raise ConfigError(
            f"{place}: the run bears the stage's name", hint="name=... and directory=... place a pipeline"
        )
    return Stage(name, verb, subject, settings, tuple(upstream), home, number)


def _runs(verb: str, subject: Any, settings: dict[str, Any], scope: _Scope, place: str) -> list[str]:
    """The full names of the runs that are evaluated or reported; that of the one they are set against is put into the
    settings."""
    asked: list[Any] = subject if isinstance(subject, list) and subject else [subject]
    runs = {name: stage.name for name, stage in scope.earlier.items() if stage.verb == "train"}
    for run in asked:
        if run not in list(runs):
            raise ConfigError(f"{place}: {run!r} is no earlier train stage", hint=suggest(str(run), runs))
    key, known = ("reference", list(runs)) if verb == "evaluate" else ("before", asked)
    got = settings.get(key)
    if got not in (None, *known):
        raise ConfigError(f"{place}: {key}={got!r} is none of the runs", hint=suggest(str(got), known))
    if got is not None:
        settings[key] = runs[got] if verb == "evaluate" else runs[got].rpartition("/")[2]
    return [runs[run] for run in asked]


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


def _lookup(scope: _Scope, upstream: dict[str, None], place: str) -> Callable[[str, bool], Any]:
    """What a reference stands for: a stage's result, which is noted in ``upstream``, or a value of the file."""
    values = scope.values

    def find(name: str, whole: bool, trail: tuple[str, ...] = ()) -> Any:
        if (stage := scope.earlier.get(name)) is not None:
            upstream[stage.name] = None
            return str(stage.result)
        if name in scope.all:
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
                    hint=suggest(name, [*scope.earlier, *flatten(values)]),
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
