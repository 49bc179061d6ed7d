"""Reads rows from files and writes them back. Knows formats and encodings; not what rows mean."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, cast

from fairlead.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_FORMATS = (".jsonl", ".ndjson", ".json", ".txt")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One parsed row and where it stands, as ``file:line``, for messages about it."""

    data: dict[str, Any]
    place: str


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


def format_of(path: Path) -> str:
    """The suffix that names the format of a file, whether or not ``.gz`` follows it."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a ``.jsonl``, ``.ndjson``, ``.json`` or ``.txt`` file, gzipped or not.

    Lines end at ``\\n`` alone, so U+0085 and U+2028 inside a string survive; blank lines are no
    rows; a line of a ``.txt`` file is the row ``{"text": line}``. A ``.json`` file holds an array,
    one object (one row), or JSON Lines.

    Raises DataError for a file that is missing, empty, damaged, of another format, or not UTF-8,
    and for a row that is not a JSON object or holds half a surrogate pair.
    """
    path = Path(path)
    require_file(path)
    if format_of(path) not in _FORMATS:
        raise DataError(
            f"{path} has no known format",
            f"its name should end in one of {', '.join(_FORMATS)} (.gz)",
        )
    return _read_rows(path)


def require_file(path: Path) -> None:
    """Raises DataError unless ``path`` is a file."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())[:5]
        raise DataError(
            f"{path} is a folder where a file was expected",
            f"name a file in it: {', '.join(names)}",
        )
    require(path)


def require(path: Path) -> None:
    """Raises DataError when nothing stands at ``path``."""
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1)
        raise DataError(f"{path} does not exist", f"did you mean {near[0]}?" if near else "check the path")


def find_files(path: str | Path, accepts: Callable[[Path], bool], wanted: str) -> list[Path]:
    """The file at ``path``, or the accepted ones of the folder there, at any depth, sorted.

    Raises DataError where there is none; ``wanted`` says in words what was looked for.
    """
    path = Path(path)
    require(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and accepts(file))
    if not files:
        raise DataError(f"{path} holds no {wanted}", "name the folder the files stand in, or one file")
    return files


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """A plain or gzipped file, told apart by content. Every failure to read is a DataError."""
    try:
        with path.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if gzipped else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is cut off or damaged: {error}",
            "fetch it again, and compare its size or checksum",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_rows(path: Path) -> Iterator[Row]:
    is_empty = True
    for row in _json_rows(path) if format_of(path) == ".json" else _line_rows(path):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{path} holds no rows", "was it written to the end?")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    offset = 0
    with open_bytes(path) as file:
        for number, data in enumerate(file, start=1):
            line = _decode(data, path, line=number, offset=offset)
            offset += len(data)
            if line.strip(" \t\r\n"):
                yield number, line.rstrip("\r\n")


def _line_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        place = f"{path}:{number}"
        if format_of(path) == ".txt":
            yield Row({"text": line}, place)
        else:
            yield _row(_parse(line, path, number), line, place)


def _json_rows(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        text = _decode(file.read(), path)
    start = _skip_space(text, 0)
    if text.startswith("[", start):
        yield from _array_rows(path, text, start + 1)
    elif start < len(text):
        try:
            first: object = json.loads(text[start:].split("\n", 1)[0])
        except (ValueError, RecursionError):
            first = None
        if isinstance(first, dict):
            yield from _line_rows(path)
        else:
            line = text.count("\n", 0, start) + 1
            yield _row(_parse(text[start:], path, line), text, f"{path}:{line}")


def _array_rows(path: Path, text: str, position: int) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        if text.startswith("]", position):
            break
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _malformed(error, text[position:], path, line) from error
        yield _row(value, text[position:end], place)
        position = _skip_space(text, end)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            raise DataError(
                f"{place}: expected ',' or ']' after this row, got {clip(text[position:])}",
                "the file may have been cut off",
            )
    if rest := text[position + 1 :].strip():
        raise DataError(f"{path}: text after the end of the array: {clip(rest)}")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _decode(data: bytes, path: Path, *, line: int = 1, offset: int = 0) -> str:
    """Decodes UTF-8 that begins at ``line`` and byte ``offset`` of the file."""
    if offset == 0:
        bom = len(_BOM) if data.startswith(_BOM) else 0
        data, offset = data[bom:], bom
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = f"byte {data[error.start]:#04x} at offset {offset + error.start}"
        likely = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
        raise DataError(
            f"{path}:{line}: {byte} is not UTF-8",
            f"convert the file, for example: iconv -f {likely} -t UTF-8 {path.name} > converted",
        ) from error


def _parse(text: str, path: Path, line: int) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(error, text, path, line) from error


def _malformed(error: Exception, text: str, path: Path, line: int) -> DataError:
    """``text`` is the end of what was parsed, and begins at ``line``."""
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        start = error.pos - len(error.doc) + len(text)
        line += text.count("\n", 0, start)
        rest = text[start:].strip()
        reason = f"{error.msg} at {clip(rest)}" if rest else f"{error.msg}, but it ends"
    return DataError(
        f"{path}:{line}: not JSON: {reason}",
        "mend or remove the row; a last row is often cut off by a full disk",
    )


def _row(value: object, source: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object, got {type(value).__name__} {clip(source)}",
            'a row looks like {"prompt": "...", "response": "..."}',
        )
    if "\\ud" in source or "\\uD" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: half a surrogate pair, {error.object[error.start]!a}, which is no text",
                "a string was cut inside a character; write \\ufffd in place of the escape",
            ) from error
    return Row(cast("dict[str, Any]", value), place)


def clip(value: object, width: int = 60) -> str:
    """``repr(value)``, shortened to fit a message."""
    text = repr(value[: width + 1] if isinstance(value, str) else value)
    return text if len(text) <= width else f"{text[:width]}..."


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
