"""Reads tables: CSV and its kin, parquet, arrow. Knows cells and columns; not what they mean."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, cast

from fairlead.data.sources.rows import Row, clip
from fairlead.data.sources.text_rows import decoded_lines
from fairlead.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_DELIMITERS = ",\t;|"
_ROWS_AT_ONCE = 1024
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def csv_rows(file: io.BufferedReader, name: str, notes: Counter[str]) -> Iterator[Row]:
    """Rows of a table whose first line names its columns; every value is text, of any encoding.

    The delimiter is that of comma, tab, semicolon and bar which parts the first line into most columns. Quoted values
    may hold it, and line ends; a row's place is its first line.

    Raises DataError for a row with more or fewer values than columns, for a quote that is not closed, and for columns
    of one name.
    """
    csv.field_size_limit(sys.maxsize)  # of the process; the default refuses values above 128 kB
    lines = decoded_lines(file, name, notes)
    blank, first = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))
    delimiter = max(_DELIMITERS, key=lambda mark: _parts(first, mark))
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = blank + 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}:{line}: not CSV: {error}",
                "a value with a quote, a line end or the delimiter stands in quotes, its own quotes doubled",
            ) from error
        if values is None:
            return
        if not columns:
            columns = _columns(values, name)
        elif values:
            if len(values) != len(columns):
                raise DataError(
                    f"{name}:{line}: {len(values)} values for {len(columns)} columns: {clip(values)}",
                    f"the columns are {clip(columns)}, parted by {delimiter!r}; quote values that hold it",
                )
            yield Row(dict(zip(columns, values, strict=True)), f"{name}:{line}")
        line = blank + reader.line_num + 1


def _parts(line: str, mark: str) -> int:
    """Into how many the mark parts it; none where it is no line of a table, which its reader will say."""
    try:
        return len(next(csv.reader([line], delimiter=mark), []))
    except csv.Error:
        return 0


def _columns(names: list[str], place: str) -> list[str]:
    """A column without name, such as the index that pandas writes, is named by its position."""
    columns = [name.strip() or f"column {number}" for number, name in enumerate(names, start=1)]
    if twice := [name for name, number in Counter(columns).items() if number > 1]:
        raise DataError(f"{place}: two columns are named {clip(twice[0])}", "the first line names the columns")
    return columns


def parquet_rows(file: io.BufferedReader, name: str, notes: Counter[str]) -> Iterator[Row]:
    """Rows of a parquet file, one row group after the other."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(_seekable(file), pre_buffer=False) as table:  # buffered, memory grows with the file
            yield from _batch_rows(table.iter_batches(_ROWS_AT_ONCE, use_threads=False), name)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(name, "parquet", error) from error


def arrow_rows(file: io.BufferedReader, name: str, notes: Counter[str]) -> Iterator[Row]:
    """Rows of an Arrow file (also Feather), or of a stream as `datasets` writes it, batch by batch."""
    import pyarrow

    source = _seekable(file)
    try:
        if file.peek(6).startswith(b"ARROW1"):
            with pyarrow.ipc.open_file(source) as reader:
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
                yield from _batch_rows(batches, name)
        else:
            source.seek(-len(_END_OF_STREAM), io.SEEK_END)
            if source.read() != _END_OF_STREAM:  # a cut between two batches is no error to Arrow
                raise pyarrow.ArrowInvalid("it lacks the end of the stream")
            source.seek(0)
            with pyarrow.ipc.open_stream(source) as reader:
                yield from _batch_rows(reader, name)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(name, "Arrow", error) from error


def _seekable(file: io.BufferedReader) -> io.BufferedIOBase:
    """The file itself, or its content in memory where it was unpacked."""
    return file if isinstance(file.raw, io.FileIO) else io.BytesIO(file.read())


def _batch_rows(batches: Iterable[pyarrow.RecordBatch], name: str) -> Iterator[Row]:
    rows = chain.from_iterable(cast("Iterable[dict[str, object]]", batch.to_pylist()) for batch in batches)
    for number, row in enumerate(rows, start=1):
        yield Row(row, f"{name}:row {number}")


def _damaged(name: str, kind: str, error: Exception) -> DataError:
    return DataError(
        f"{name} is no {kind} file, or is cut off or damaged: {error}",
        "fetch it again, and compare its size or checksum",
    )
