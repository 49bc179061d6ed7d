"""The settings of a verb that works on files: its own by their names, and what of a recipe has a meaning for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairlead.config import Recipe, Section
from fairlead.config_file import parse_override, suggest
from fairlead.config_resolve import load_recipe
from fairlead.errors import ConfigError

Settings = Sequence[str] | Mapping[str, Any]
"""`key=value` texts, or values by dotted key."""


def asked(
    verb: str, settings: Settings, own: type[Section], others: Sequence[str] = (), start: Mapping[str, Any] = {}
) -> Recipe:
    """A recipe of ``start`` and the settings, those of ``own`` as its ``settings``. Raises ConfigError for a key that
    is neither one of ``own`` nor in ``others``."""
    pairs = settings.items() if isinstance(settings, Mapping) else map(parse_override, settings)
    overrides: dict[str, Any] = {}
    for key, value in pairs:
        is_own = key.split(".")[0] in own.model_fields
        if not is_own and not any(key == each or key.startswith(f"{each}.") for each in others):
            raise ConfigError(f"{key} is no setting of {verb}", hint=suggest(key, [*own.model_fields, *others]))
        overrides[f"{verb}.{key}" if is_own else key] = value
    return load_recipe({"algorithm": verb, **start}, overrides, settings_of=lambda _: (verb, own)).recipe


def require_jsonl(out: str | Path | None) -> None:
    """Raises ConfigError for what is not the name of a file of JSON Lines."""
    if out is not None and (Path(out).is_dir() or Path(out).suffix not in (".jsonl", ".ndjson")):
        what = "is a folder" if Path(out).is_dir() else "is not the name of a file of JSON Lines"
        raise ConfigError(f"{out} {what}", hint="rows are written as JSON Lines: give FILE.jsonl")
