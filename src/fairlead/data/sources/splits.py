"""Which part of a source is meant: its training or its held-out split. Knows names only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from fairlead.errors import DataError

_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test", "heldout": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


def split_named(name: str) -> str | None:
    """train, test or validation, where a word of the name says so; a file's own name goes before its folders'."""
    for part in reversed(PurePosixPath(name).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return None


def choose_split(names: Sequence[str], source: str, *, heldout: bool, prefer: Iterable[str] = ()) -> list[str]:
    """The names that belong to the split wanted; of these, those with the first word of ``prefer`` that any holds.

    For training: those named train, else those that name no split, else the only split there is. Held out: those named
    test, else validation, else everything where no name speaks of splits. Raises DataError where the choice is open.
    """
    parts: dict[str | None, list[str]] = {}
    for name in names:
        parts.setdefault(split_named(name), []).append(name)
    wanted = ("test", "validation") if heldout else ("train", None)
    chosen = next((parts[split] for split in wanted if split in parts), None)
    if chosen is None and len(parts) == 1 and (not heldout or None in parts):
        (chosen,) = parts.values()
    if chosen is None:
        raise DataError(
            f"{source} has no split for {'evaluation' if heldout else 'training'}: it has "
            f"{', '.join(str(split) for split in parts)}",
            "name the files themselves" if not heldout else "name a file, or set data.eval_fraction",
        )
    for word in prefer:
        if preferred := [name for name in chosen if word in re.split(r"[^a-z]+", name.lower())]:
            return preferred
    return chosen
