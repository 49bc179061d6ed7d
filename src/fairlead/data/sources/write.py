"""Writes rows so that a file appears whole or not at all. Knows formats; not what rows mean."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fairlead.errors import DataError

if TYPE_CHECKING:
    import pyarrow

ROWS_IN_GROUP = 8192
"""Rows of a parquet row group: what a reader holds in memory."""


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}",
            "free some space and run again; nothing was left behind" if is_full else None,
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as JSON Lines, atomically, and returns their number. Equal rows give equal bytes.

    Raises DataError when the disk is full or a row is not text that UTF-8 can hold.
    """
    path = Path(path)
    number = 0
    with atomic_write(path) as file:
        for number, row in enumerate(rows, start=1):
            try:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}: row {number} cannot be written as JSON: {error}") from error
    return number


def write_parquet(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]] | Iterable[pyarrow.Table],
    schema: pyarrow.Schema | None = None,
) -> int:
    """Writes rows, or tables of them, as parquet (zstd), atomically, and returns their number.

    Equal rows give equal bytes, however they are parted into tables (one version of pyarrow given). With ``schema``, or
    as tables of one schema, they stream; mappings without it stand in memory until their columns are known.

    Raises DataError when the disk is full, and for values of one column that are of different types.
    """
    import pyarrow
    import pyarrow.parquet as pq

    path = Path(path)
    number = 0
    try:
        tables = _tables(rows, schema)
        first = next(tables)
        with atomic_write(path) as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
            for group in _groups(chain([first], tables)):
                writer.write_table(group)
                number += group.num_rows
    except (pyarrow.ArrowException, UnicodeEncodeError) as error:
        raise DataError(f"{path}: the rows cannot be written as parquet: {error}") from error
    return number


def _tables(rows: Iterable[Any], schema: pyarrow.Schema | None) -> Iterator[pyarrow.Table]:
    """At least one table, all of one schema."""
    import pyarrow

    items: Iterator[Any] = iter(rows)
    first: Any = next(items, None)
    if isinstance(first, pyarrow.Table):
        schema = (schema or first.schema).remove_metadata()
        yield from (table.replace_schema_metadata().cast(schema) for table in chain([first], items))
        return
    items = items if first is None else chain([first], items)
    if schema is None:
        listed = list(items)
        columns = list(dict.fromkeys(name for row in listed for name in row))  # pyarrow looks at the first row only
        arrays = [pyarrow.array([row.get(name) for row in listed]) for name in columns]
        yield pyarrow.Table.from_arrays(arrays, names=columns)
        return
    yield schema.empty_table()
    while chunk := list(islice(items, ROWS_IN_GROUP)):
        yield pyarrow.Table.from_pylist(chunk, schema=schema)


def _groups(tables: Iterable[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    """The rows in tables of ``ROWS_IN_GROUP``, the last one shorter, so that bytes depend on rows alone."""
    import pyarrow

    held, number = list[Any](), 0
    for table in tables:
        held.append(table)
        number += table.num_rows
        if number >= ROWS_IN_GROUP:
            whole = pyarrow.concat_tables(held)
            ends = range(ROWS_IN_GROUP, whole.num_rows + 1, ROWS_IN_GROUP)
            yield from (whole.slice(end - ROWS_IN_GROUP, ROWS_IN_GROUP).combine_chunks() for end in ends)
            held, number = [whole.slice(ends[-1])], number - ends[-1]
    if number:
        yield pyarrow.concat_tables(held).combine_chunks()
