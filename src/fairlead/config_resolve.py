"""A recipe resolved: its YAML file, `key=value` overrides, errors that name the nearest key, and where each value came
from. Imports no torch.

Precedence: defaults < recipe file < overrides. The class that validates the algorithm's own section is handed in by the
caller: this room knows no algorithm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from fairlead.config import Recipe
from fairlead.config_file import find_file, parse_override, read_mapping, suggest
from fairlead.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    recipe: Recipe
    section: str
    """Name of the algorithm's own section."""
    origins: Mapping[str, str]
    """Dotted key -> default, FILE:LINE or the command line."""
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**self.recipe.model_dump(mode="json"), self.section: self.recipe.settings.model_dump(mode="json")}

    def as_yaml(self) -> str:
        """As it stands in a run's recipe.yaml."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    settings_of: Callable[[str], tuple[str, type[BaseModel]]],
) -> ResolvedRecipe:
    """Resolve a recipe file (or shipped name, or mapping) and overrides into a validated recipe.

    ``settings_of`` maps the algorithm's name to the name of its section and the class that validates it.
    Raises ConfigError with file, line, key and the nearest known key.
    """
    if isinstance(source, Mapping):
        raw, lines, place = dict(source), dict[str, int](), "the given settings"
    else:
        path = find_file(str(source))
        raw, lines = read_mapping(path)
        place = str(path)
    merged = _copy(raw)
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [parse_override(o) for o in overrides]
    for key, value in pairs:
        set_value(merged, key, value)

    given = {key for key, _ in _flatten(raw)} & {key for key, _ in _flatten(merged)}
    overridden = {key for pair_key, value in pairs for key, _ in _flatten_one(pair_key, value)}

    def origin(key: str) -> str:
        if any(name == key or name.startswith(f"{key}.") for name in overridden):
            return "command line"
        if any(name == key or name.startswith(f"{key}.") for name in given):
            return located(key, place, lines)
        return "default"

    if not isinstance(merged.get("algorithm"), str):
        raise ConfigError(f"{place}: the recipe names no algorithm", hint="add a line such as `algorithm: sft`")
    section, settings_class = settings_of(merged["algorithm"])
    own = merged.pop(section, None)
    problems: list[str] = []
    settings = validate(settings_class, {} if own is None else own, f"{section}.", origin, problems)
    top_level = [*(name for name in Recipe.model_fields if name != "settings"), section]
    recipe = validate(Recipe, merged, "", origin, problems, top_level)
    if problems or recipe is None or settings is None:
        raise ConfigError("\n".join(problems))
    recipe = recipe.model_copy(update={"settings": settings})
    resolved = ResolvedRecipe(recipe, section, {}, ())
    origins = {key: origin(key) for key, _ in _flatten(resolved.as_dict())}
    return ResolvedRecipe(recipe, section, origins, tuple(_without_effect(recipe, origins)))


def located(key: str, place: str, lines: Mapping[str, int]) -> str:
    """FILE:LINE of a dotted key, or of the section it stands in."""
    parts = key.split(".")
    line = next((lines[k] for i in range(len(parts), 0, -1) if (k := ".".join(parts[:i])) in lines), None)
    return place if line is None else f"{place}:{line}"


def validate(
    model: type[BaseModel],
    raw: Any,
    prefix: str,
    origin: Callable[[str], str],
    problems: list[str],
    top_level: Sequence[str] | None = None,
) -> Any:
    """The settings as ``model``; none where they are wrong, which is then told in ``problems``, key by key."""
    if top_level is not None and "settings" in raw:
        problems.append("settings: not a key of the file; write the algorithm's settings under its own name")
        return None
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            parts = _key_of(item["loc"], raw, missing=item["type"] == "missing")
            key = (prefix + ".".join(parts)).rstrip(".")
            place = origin(re.sub(r"(\.\d+)+$", "", key))
            place = "" if place == "default" else f" ({place})"
            if item["type"] == "extra_forbidden":
                known = _keys_at(model, parts[:-1]) if top_level is None or len(parts) > 1 else list(top_level)
                problems.append(f"unknown key {key!r}{place}; {suggest(parts[-1], known)}")
            else:
                got = "" if item["type"] == "missing" else f", got {_short(item['input'])}"
                message = "a section of settings was expected" if item["type"] == "model_type" else item["msg"]
                message = message.removeprefix("Value error, ")
                problems.append(f"{key or 'recipe'}{place}: {message[0].lower()}{message[1:]}{got}")
        return None


def _key_of(location: Sequence[str | int], raw: Any, *, missing: bool) -> list[str]:
    """The user's keys in pydantic's location, which also names the tried members of unions and validators."""
    keys: list[str] = []
    for number, part in enumerate(location, start=1):
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(raw, Mapping):
            items = cast(Mapping[Any, Any], raw).items()
        elif isinstance(raw, list | tuple):
            items = enumerate(cast(Sequence[Any], raw))
        inside = {str(name): value for name, value in items}
        if str(part) in inside:
            raw = inside[str(part)]
        elif not (missing and number == len(location)):
            continue
        keys.append(str(part))
    return keys


def _keys_at(model: type[BaseModel], parts: Sequence[str]) -> list[str]:
    for part in parts:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        inner = [
            a
            for a in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in cast(dict[str, Any], value).items()} if isinstance(value, dict) else value


def set_value(target: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in nested settings. Raises ConfigError where a section of it is a value."""
    *parents, last = dotted.split(".")
    for parent in parents:
        child = target.get(parent)
        if child is None:
            child = target[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent!r} is a value ({_short(child)}), not a section")
        target = cast(dict[str, Any], child)
    target[last] = value


def _flatten_one(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [(f"{key}.{k}" if k else key, v) for k, v in _flatten(cast(Mapping[str, Any], value))]
    return [(key, value)]


def _flatten(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [pair for key, child in value.items() for pair in _flatten_one(str(key), child)]


def flatten(value: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as `section.key -> value`."""
    return dict(_flatten(value))


# --- settings that have no effect here -----------------------------------------------------------------------------


def _without_effect(recipe: Recipe, origins: Mapping[str, str]) -> list[str]:
    """Settings the user gave that nothing reads in this combination."""

    def given(key: str) -> bool:
        return any(origin != "default" for name, origin in origins.items() if name == key or name.startswith(f"{key}."))

    rules = [
        ("train.epochs", recipe.train.steps is not None, "train.steps wins"),
        ("optim.warmup_ratio", recipe.optim.warmup_steps is not None, "optim.warmup_steps wins"),
        (
            "data.eval_fraction",
            bool(recipe.data.eval_fraction) and recipe.data.eval_path is not None,
            "data.eval_path wins",
        ),
        ("optim.min_learning_rate_ratio", recipe.optim.schedule == "constant", "the schedule is constant"),
        ("train.patience", recipe.train.eval_every is None, "nothing is evaluated on the way; set train.eval_every"),
        ("optim.betas", recipe.optim.name == "sgd", "sgd has none"),
        ("optim.eps", recipe.optim.name == "sgd", "sgd has none"),
    ]
    return [f"{key} has no effect: {why}" for key, holds, why in rules if holds and given(key)]
