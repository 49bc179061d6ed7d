"""The table of file formats: which reader takes which file. Knows their names; not how they are read."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePath
from typing import NamedTuple

from fairlead.data.sources.files import format_of
from fairlead.data.sources.json_rows import json_rows
from fairlead.data.sources.rows import Row
from fairlead.data.sources.tables import arrow_rows, csv_rows, parquet_rows
from fairlead.data.sources.text_rows import text_rows
from fairlead.errors import DataError

Read = Callable[[io.BufferedReader, str, Counter[str]], Iterator[Row]]


class Reader(NamedTuple):
    format: str
    """Files of one format may stand in one source."""
    read: Read
    """Takes an unpacked file at its start, what messages call it, and the notes to add to."""


_JSON = Reader("JSON", json_rows)
_CSV = Reader("CSV", csv_rows)
_PARQUET = Reader("parquet", parquet_rows)
_ARROW = Reader("Arrow", arrow_rows)

READERS = {
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".json": _JSON,
    ".txt": Reader("text", text_rows),
    ".csv": _CSV,
    ".tsv": _CSV,
    ".parquet": _PARQUET,
    ".arrow": _ARROW,
    ".feather": _ARROW,
    ".pos": Reader("labelled lines", partial(text_rows, label=1)),
    ".neg": Reader("labelled lines", partial(text_rows, label=0)),
}
ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".zip")


def reader_of(file: io.BufferedReader, name: str) -> Reader:
    """By content where a format marks its files, else by name, else by the brace or bracket that JSON begins with."""
    head = file.peek(64)
    if head.startswith(b"PAR1"):
        return _PARQUET
    if head.startswith(b"ARROW1"):
        return _ARROW
    if (reader := READERS.get(format_of(PurePath(name)).lower())) is not None:
        return reader
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
        return _JSON
    raise DataError(f"{name} has no known format", f"its name should end in one of {', '.join(READERS)} (.gz)")
