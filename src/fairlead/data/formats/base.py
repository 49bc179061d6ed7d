"""What a format is, and how its fields are read. Knows neither files nor what a record is wanted for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fairlead.data.sources import Row, clip
from fairlead.errors import DataError
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Ranking, Record, Text

RecordType = type[Text] | type[Demonstration] | type[Preference] | type[Ranking] | type[Labelled] | type[Prompt]
Notes = Counter[str]
Parsed = Record | list[Record] | str
Parser = Callable[[Row, Notes], Parsed]
Data = Mapping[str, Any]

ALPACA = ("input", "context", "history")
BESIDES = ("system", "system_prompt", "tools")
"""What a prompt is made of besides its own field."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write records as rows. ``fields`` must all be there; ``a|b`` is met by either."""

    name: str
    about: str
    record: RecordType
    """What a whole row is; a row may hold less (a conversation that ends in a question is a Prompt)."""
    fields: tuple[str, ...]
    parser: Parser
    shape: Callable[[Data], bool] | None = None
    """What besides the names of the fields tells the format apart."""
    prompt: tuple[str, ...] = ()
    """Which of ``fields`` make the prompt; the first of them where nothing is said."""

    def has_shape(self, data: Data) -> bool:
        """Whether a row that has the fields is of this format."""
        return self.shape is None or self.shape(data)

    def columns(self, data: Data) -> dict[str, Any]:
        """The row's fields that do not make the prompt: what a reward is handed with it."""
        used = {first(data, names) for names in self.prompt or self.fields[:1]}
        used |= {*BESIDES} | {*(ALPACA if "instruction" in used else ())}
        return {name: value for name, value in data.items() if name not in used}

    def parse(self, row: Row, notes: Notes | None = None) -> Parsed:
        """The record, the records of a row that holds several, or (str) why it holds none. ``notes`` counts the rows in
        which something was repaired. Raises DataError for a value of the wrong type, naming file and line."""
        found = Notes()
        if any(value is None for value in row.data.values()):
            row = replace(row, data={name: value for name, value in row.data.items() if value is not None})
        parsed = self.parser(row, found)
        if notes is not None:
            notes.update(found.keys())
        return parsed


def first(data: Data, names: str) -> str:
    """The first of ``a|b|c`` that the row has; the last one where it has none."""
    options = names.split("|")
    return next((name for name in options if data.get(name) is not None), options[-1])


def string(row: Row, names: str, *, default: str | None = None) -> str:
    name = first(row.data, names)
    value = row.data.get(name, default)
    if not isinstance(value, str):
        raise wrong(row, name, "text", value)
    return value


def strings(row: Row, name: str) -> list[str]:
    value = row.data.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(row, name, "a list of texts", value)
    return value


def number(row: Row, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{row.place}: {name} must be a number, got {value!r}")
    return float(value)


def truth(value: object) -> bool | None:
    """What a label says: 1, true, pos, positive, or their opposites; none where it says neither."""
    words = {"1": True, "true": True, "pos": True, "positive": True}
    words |= {"0": False, "false": False, "neg": False, "negative": False}
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return words.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None


def is_list_of(value: object, *kinds: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kinds) for item in value)


def wrong(row: Row, name: str, wanted: str, value: object) -> DataError:
    return DataError(f"{row.place}: {name} must be {wanted}, got {type(value).__name__} {clip(value)}")
