"""A recipe as it is made from another toolkit's configuration: what was taken, what became of it, what a person must
know. Knows no toolkit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fairlead.config_file import parse_yaml
from fairlead.config_resolve import flatten
from fairlead.errors import ConfigError
from fairlead.pipeline_file import nest

ORDER = ("algorithm", "seed", "run", "model", "data", "optim", "train", "tracking")
"""Of the recipe's sections; the algorithm's own comes last."""
KINDS = ("to be given", "not known", "not carried over", "differs")
NOTHING: tuple[Any, ...] = (None, {}, [])
"""Values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of one key."""

    key: str = ""
    """Ours; empty: nothing is taken over."""
    note: str = ""
    """With a key, how its meaning differs; without, why nothing is taken over, and what there is instead."""
    convert: Callable[[Any], Any] = lambda value: value
    """Raises ValueError for a value that cannot be taken."""
    silent: tuple[Any, ...] = ()
    """Values that need neither a setting nor a word."""


@dataclass(frozen=True, slots=True)
class Note:
    kind: Literal["not carried over", "differs", "not known", "to be given"]
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}: {self.text}"


@dataclass(frozen=True, slots=True)
class Imported:
    text: str
    """The recipe as a file, with the key each setting comes from behind it."""
    recipe: dict[str, Any]
    notes: tuple[Note, ...]

    def as_dict(self) -> dict[str, Any]:
        notes = [{"kind": note.kind, "what": note.what, "text": note.text} for note in self.notes]
        return {"recipe": self.recipe, "notes": notes}


class Draft:
    """``given`` is the configuration with dotted keys; ``left`` what nobody has looked at yet."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        self.given = _dotted(source)
        self.left = dict(self.given)
        self._settings: dict[str, tuple[Any, str]] = {}
        self._notes: list[Note] = []

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as looked at."""
        return self.left.pop(key, default)

    def number(self, key: str, default: Any = None) -> Any:
        """The same of a number; null is as if it were not given. Raises ConfigError for anything else."""
        value = self.seen_number(key)
        self.take(key)
        return default if value is None else value

    def seen_number(self, key: str) -> Any:
        """A number or null, without the key counting as looked at."""
        value = self.given.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ConfigError(f"{key}={value!r} cannot be taken over: a number was expected")
        return value

    def under(self, prefix: str) -> dict[str, Any]:
        """What has not been looked at below a section, by the rest of its keys."""
        return {key.removeprefix(prefix): value for key, value in self.left.items() if key.startswith(prefix)}

    def put(self, key: str, value: Any, origin: str) -> None:
        self._settings[key] = value, origin

    def leave(self, what: str, text: str) -> None:
        self._notes.append(Note("not carried over", self._with_value(what), text))

    def differs(self, what: str, text: str) -> None:
        self._notes.append(Note("differs", self._with_value(what), text))

    def wanted(self, what: str, text: str) -> None:
        self._notes.append(Note("to be given", what, text))

    def apply(self, rules: Mapping[str, Rule], prefix: str = "") -> None:
        """Each key of ``rules`` that stands below ``prefix`` and has not been looked at."""
        for name, rule in rules.items():
            key = prefix + name
            value = self.take(key)
            if value in NOTHING or value in rule.silent:
                continue
            if rule.key:
                self.put(rule.key, self._converted(key, value, rule.convert), key)
            if rule.note:
                (self.differs if rule.key else self.leave)(key, rule.note)

    def _converted(self, key: str, value: Any, convert: Callable[[Any], Any]) -> Any:
        try:
            return convert(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{key}={value!r} cannot be taken over: {error}") from error

    def finish(self, header: str, why_left: Mapping[str, str]) -> Imported:
        """``why_left``: prefix -> why what is below it is not carried over."""
        for key, value in self.left.items():
            reason = next((reason for prefix, reason in why_left.items() if key.startswith(prefix)), None)
            if reason is None:
                self._notes.append(Note("not known", self._with_value(key), "nothing was made of it"))
            elif value not in NOTHING:
                self.leave(key, reason)
        nested = nest(self._settings)
        ordered = {key: nested[key] for key in [*ORDER, *(set(nested) - set(ORDER))] if key in nested}
        lines = "".join(f"# {line}\n" for line in header.splitlines())
        recipe = nest({key: value for key, (value, _) in self._settings.items()})
        notes = sorted(self._notes, key=lambda note: KINDS.index(note.kind))
        return Imported(lines + _yaml(ordered), recipe, tuple(notes))

    def _with_value(self, what: str) -> str:
        return f"{what}={json.dumps(self.given[what], default=str)}" if what in self.given else what


def choice(known: Mapping[Any, Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if value not in known:
            raise ValueError(f"known are {', '.join(map(str, known))}")
        return known[value]

    return convert


def one_range(layers: Any) -> list[int]:
    """Numbers of layers -> the first and the last."""
    numbers = sorted(layers) if isinstance(layers, list) else [layers]
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ValueError("model.adapter.layers is one range, [first, last]")
    return [numbers[0], numbers[-1]]


def _dotted(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that stand dotted in the file are changes of the nested ones."""
    nested = {key: value for key, value in source.items() if "." not in key}
    return flatten(nested) | flatten({key: value for key, value in source.items() if "." in key})


def _yaml(tree: Mapping[str, Any], indent: str = "") -> str:
    lines = ""
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += f"{indent}{key}:\n" + _yaml(value, indent + "  ")
        else:
            found, origin = value
            lines += f"{indent}{key}: {_scalar(found)}  # {origin}\n"
    return lines


def _scalar(value: Any) -> str:
    """As a person would write it where that reads the same."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and parse_yaml(value, value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
