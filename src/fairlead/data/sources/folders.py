"""Reads the files of a folder or an archive as one source. Knows layouts; not what the rows mean."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from fairlead.data.sources.containers import Container
from fairlead.data.sources.files import format_of, reading
from fairlead.data.sources.readers import ARCHIVES, READERS, reader_of
from fairlead.data.sources.rows import Row
from fairlead.data.sources.splits import choose_split, split_named
from fairlead.data.sources.text_rows import decode, without_nul
from fairlead.errors import DataError

_ABOUT = re.compile(r"(\w+[-_])?(licen[cs]e|readme|copying|notice|changelog)\b", re.IGNORECASE)
_REVIEW = re.compile(r"(?:.*/)?(pos|neg|unsup)/[^/]+\.txt")
_RATING = re.compile(r"\d+_(\d+)")
_LABELS = {"pos": 1, "neg": 0}


def container_rows(
    container: Container, source: str, notes: Counter[str], *, heldout: bool, prefer: Iterable[str]
) -> Iterator[Row]:
    """The rows of every data file of the split wanted (`choose_split`), file after file.

    Where .txt files stand in folders named pos, neg and unsup, each is one row, and other files are left aside.
    Raises DataError where there is no data file, and where their formats differ.
    """
    names = list(filter(_REVIEW.fullmatch, container.names)) or list(filter(_is_data, container.names))
    if not names:
        archives = [name for name in container.names if name.endswith((*ARCHIVES, ".tar.gz"))]
        raise DataError(
            f"{source} holds no data files",
            f"name a file: {', '.join((archives or container.names)[:5]) or 'it is empty'}",
        )
    chosen = choose_split(names, source, heldout=heldout, prefer=prefer)
    aside = {"no data": len(container.names) - len(names), "another split": len(names) - len(chosen)}
    notes.update({f"files left aside: {reason}": number for reason, number in aside.items() if number})
    formats = {READERS[format_of(PurePosixPath(name)).lower()].format: name for name in reversed(chosen)}
    if len(formats) > 1:
        found = "; ".join(f"{kind}: {name}" for kind, name in sorted(formats.items()))
        raise DataError(f"{source} mixes formats ({found})", "name the files of one of them")
    is_empty = True
    for name, file in container.open(set(chosen)):
        place = container.place(name)
        with reading(place):
            is_review = _REVIEW.fullmatch(name) is not None
            rows = [_review(file, name, place, notes)] if is_review else reader_of(file, name).read(file, place, notes)
            for row in rows:
                is_empty = False
                yield row
    if is_empty:
        raise DataError(f"{source} holds no rows", "were its files written to the end?")


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    return format_of(path).lower() in READERS and not _ABOUT.match(path.name)


def _review(file: io.BufferedReader, name: str, place: str, notes: Counter[str]) -> Row:
    """One text of the Large Movie Review Dataset, ``split/label/id_rating.txt``, or of a folder like it."""
    path = PurePosixPath(name)
    text, encoding = decode(file.read())
    if encoding != "utf-8":
        notes[f"files decoded as {encoding}"] += 1
    label = _LABELS.get(path.parent.name)
    row: dict[str, object] = {"text": without_nul(text, notes), "label": label}
    if label is not None and (rating := _RATING.fullmatch(path.stem)):
        row["rating"] = int(rating[1])
    if split := split_named(name):
        row["split"] = split
    return Row({**row, "path": name}, place)
