"""Reads JSON: lines, an array, one object, or LMFlow's object of instances. Not what the fields mean."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, cast

from fairlead.data.sources.files import format_of
from fairlead.data.sources.rows import Row, clip
from fairlead.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_STRICT = json.JSONDecoder()
_LENIENT = json.JSONDecoder(strict=False)
"""Takes control characters that stand raw in a string."""


def json_rows(file: io.BufferedReader, name: str, notes: Counter[str]) -> Iterator[Row]:
    """Rows of JSON Lines, which stream; of an array or of one object, which stand in memory whole.

    Lines end at ``\\n`` alone, so U+0085 and U+2028 inside a string survive; blank lines are no rows. The object
    ``{"type": ..., "instances": [...]}``, or with instances alone, is a row an instance. NUL characters are kept, and
    noted.

    Raises DataError for what is not UTF-8 or not JSON, and for a row that is no object or holds half a surrogate pair.
    """
    head = b""
    for line in file:
        head += line
        if line.strip(b" \t\r\n" + _BOM):
            break
    if _begins_lines(head, format_of(PurePath(name)).lower() in (".jsonl", ".ndjson")):
        yield from _line_rows(io.BytesIO(head), file, name, notes)
    else:
        yield from _whole_rows(_decode(head + file.read(), name), name, notes)


def _begins_lines(head: bytes, is_named_lines: bool) -> bool:
    """Whether the first line is a row. A file named as JSON Lines is believed, unless it is an array."""
    text = head.removeprefix(_BOM).lstrip(b" \t\r\n")
    if text.startswith(b"[") or is_named_lines:
        return not text.startswith(b"[")
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _line_rows(head: io.BytesIO, file: io.BufferedReader, name: str, notes: Counter[str]) -> Iterator[Row]:
    number, offset = 0, 0
    for part in (head, file):
        for data in part:
            number += 1
            line = _decode(data, name, line=number, offset=offset)
            offset += len(data)
            if line.strip(" \t\r\n"):
                line = line.rstrip("\r\n")
                value, _ = _parse(line, 0, name, number, notes, is_whole=True)
                yield from _rows(value, line, f"{name}:{number}", notes)


def _whole_rows(text: str, name: str, notes: Counter[str]) -> Iterator[Row]:
    start = _skip_space(text, 0)
    if text.startswith("[", start):
        yield from _array_rows(name, text, start + 1, notes)
    elif start < len(text):
        line = text.count("\n", 0, start) + 1
        value, _ = _parse(text[start:], 0, name, line, notes, is_whole=True)
        yield from _rows(value, text, f"{name}:{line}", notes)


def _array_rows(name: str, text: str, position: int, notes: Counter[str]) -> Iterator[Row]:
    line, counted = 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            break
        value, end = _parse(text, position, name, line, notes)
        yield from _rows(value, text[position:end], f"{name}:{line}", notes)
        position = _skip_space(text, end)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            raise DataError(
                f"{name}:{line}: expected ',' or ']' after this row, got {clip(text[position : position + 80])}",
                "the file may have been cut off",
            )
    if rest := text[position + 1 :].strip():
        raise DataError(f"{name}: text after the end of the array: {clip(rest)}")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _decode(data: bytes, name: str, *, line: int = 1, offset: int = 0) -> str:
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
            f"{name}:{line}: {byte} is not UTF-8",
            f"convert the file, for example: iconv -f {likely} -t UTF-8 {PurePath(name).name} > converted",
        ) from error


def _parse(
    text: str, start: int, name: str, line: int, notes: Counter[str], *, is_whole: bool = False
) -> tuple[object, int]:
    """The value that begins at ``start``, which stands at ``line``, and where it ends."""
    try:
        return (_STRICT.decode(text), len(text)) if is_whole else _STRICT.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        if "control character" not in str(error):
            raise _malformed(error, text, start, name, line) from error
        try:
            value = (_LENIENT.decode(text), len(text)) if is_whole else _LENIENT.raw_decode(text, start)
        except (ValueError, RecursionError):
            raise _malformed(error, text, start, name, line) from error
        notes["rows with raw control characters in JSON strings, kept"] += 1
        return value


def _malformed(error: Exception, text: str, start: int, name: str, line: int) -> DataError:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        line += text.count("\n", start, error.pos)
        rest = text[error.pos : error.pos + 80].strip()
        reason = f"{error.msg} at {clip(rest)}" if rest else f"{error.msg}, but it ends"
    return DataError(
        f"{name}:{line}: not JSON: {reason}",
        "mend or remove the row; a last row is often cut off by a full disk",
    )


def _rows(value: object, source: str, place: str, notes: Counter[str]) -> Iterator[Row]:
    """The row that ``value`` is, or the rows of its instances."""
    row = _object(value, source, place)
    if "\\ud" in source or "\\uD" in source:
        _refuse_half_characters(row, place)
    if ("\\u0000" in source or "\0" in source) and _holds_nul(row):
        notes["rows with NUL characters, kept"] += 1
    kind, instances = row.get("type"), row.get("instances")
    if isinstance(instances, list) and (isinstance(kind, str) or row.keys() == {"instances"}):
        for number, instance in enumerate(cast(list[object], instances), start=1):
            where = f"{place} instance {number}"
            yield Row(_object(instance, instance, where), where, kind if isinstance(kind, str) else None)
    else:
        yield Row(row, place)


def _object(value: object, shown: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object, got {type(value).__name__} {clip(shown)}",
            'a row looks like {"prompt": "...", "response": "..."}',
        )
    return cast("dict[str, Any]", value)


def _refuse_half_characters(row: dict[str, Any], place: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: half a surrogate pair, {error.object[error.start]!a}, which is no text",
            "a string was cut inside a character; write \\ufffd in place of the escape",
        ) from error


def _holds_nul(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_nul, value)) or any(map(_holds_nul, value.values()))
    return any(map(_holds_nul, value)) if isinstance(value, list) else isinstance(value, str) and "\0" in value
