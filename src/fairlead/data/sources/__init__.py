"""Bytes to rows: every format of file, encoding, compression and folder. Knows no fields and no records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairlead.data.sources.containers import container_of
from fairlead.data.sources.files import find_files, format_of, open_bytes, require, require_file
from fairlead.data.sources.folders import container_rows
from fairlead.data.sources.hub import could_be_hub_id, hub_rows, is_saved, saved_rows
from fairlead.data.sources.readers import reader_of
from fairlead.data.sources.rows import Counts, Row, clip
from fairlead.data.sources.text_rows import decode, without_nul
from fairlead.data.sources.write import atomic_write, write_jsonl, write_parquet
from fairlead.errors import DataError

__all__ = [
    "Counts",
    "Row",
    "atomic_write",
    "clip",
    "decode",
    "find_files",
    "format_of",
    "open_bytes",
    "read_rows",
    "read_source",
    "require",
    "require_file",
    "without_nul",
    "write_jsonl",
    "write_parquet",
]


def read_source(
    name: str, *, prefer: Sequence[str] = (), heldout: bool = False, notes: Counter[str] | None = None
) -> Iterator[Row]:
    """The rows of a file, of a folder or archive of files of one format, of a folder saved by `datasets`, or of a data
    set of the hub (``owner/name`` or ``owner/name:configuration``): what exists locally goes first.

    Of a source that has splits, those for training are read, or with ``heldout`` test, else validation; of several,
    those whose name holds the first word of ``prefer`` that any holds. ``notes`` counts what was repaired or left
    aside. All but JSON arrays and objects stream. Raises DataError for everything that cannot be read.
    """
    notes = Counter() if notes is None else notes
    path = Path(name)
    if not path.exists() and could_be_hub_id(name):
        return hub_rows(name, notes, heldout=heldout, prefer=prefer)
    require(path)
    if path.is_dir() and is_saved(path):
        return saved_rows(path, notes, heldout=heldout, prefer=prefer)
    if (container := container_of(path)) is not None:
        return container_rows(container, name, notes, heldout=heldout, prefer=prefer)
    return read_rows(path, notes)


def read_rows(path: str | Path, notes: Counter[str] | None = None) -> Iterator[Row]:
    """The rows of one file, packed or not: JSON, text, CSV, parquet, Arrow (docs/reference/data-sources.md).

    Raises DataError for a file that is missing, empty, damaged or of another format, at once; for its rows as they are
    reached.
    """
    path = Path(path)
    require_file(path)
    with open_bytes(path) as file:
        reader_of(file, str(path))
    return _read_rows(path, Counter() if notes is None else notes)


def _read_rows(path: Path, notes: Counter[str]) -> Iterator[Row]:
    is_empty = True
    with open_bytes(path) as file:
        for row in reader_of(file, str(path)).read(file, str(path), notes):
            is_empty = False
            yield row
    if is_empty:
        raise DataError(f"{path} holds no rows", "was it written to the end?")
