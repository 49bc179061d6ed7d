"""What reading yields: rows with their places, and counts of what became of them. Knows no file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it stands (``file:line``, ``file:row N``, ``archive:member``), for messages about it."""

    data: dict[str, Any]
    place: str
    kind: str | None = None
    """The ``type`` that an LMFlow file states for its instances; none elsewhere."""


@dataclass(slots=True)
class Counts:
    """What became of all that was read: ``read = kept + sum(dropped.values())``."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    notes: Counter[str] = field(default_factory=Counter[str])
    """What is worth knowing of the kept."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(sorted((+self.dropped).items())),
            "notes": dict(sorted((+self.notes).items())),
        }


def clip(value: object, width: int = 60) -> str:
    """``repr(value)``, shortened to fit a message."""
    text = repr(value[: width + 1] if isinstance(value, str) else value)
    return text if len(text) <= width else f"{text[:width]}..."
