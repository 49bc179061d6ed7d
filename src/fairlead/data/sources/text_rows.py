"""Reads plain text of any encoding, line by line or whole. Knows nothing of what it says."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from fairlead.data.sources.rows import Row
from fairlead.errors import DataError

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def text_rows(file: io.BufferedReader, name: str, notes: Counter[str], **fields: object) -> Iterator[Row]:
    """``{"text": line}`` and ``fields`` for every line that is not blank."""
    for number, line in enumerate(decoded_lines(file, name, notes), start=1):
        if line.strip(" \t\r\n"):
            yield Row({"text": line.rstrip("\r\n"), **fields}, f"{name}:{number}")


def decoded_lines(file: io.BufferedReader, name: str, notes: Counter[str]) -> Iterator[str]:
    """Lines with their ends, parted at ``\\n`` alone: UTF-16 if marked, else each the first of UTF-8, Windows-1252 and
    Latin-1 that fits, so that files of mixed encodings are read too. NUL characters are dropped, and noted."""
    if file.peek(2).startswith(_UTF16):
        wrapper = io.TextIOWrapper(file, "utf-16", newline="\n")
        try:
            yield from (without_nul(line, notes) for line in wrapper)
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is marked as UTF-16 and is not, or is cut off: {error.reason}") from error
        finally:
            wrapper.detach()  # the file is not ours to close
        return
    for number, data in enumerate(file):
        text, encoding = _decode_bytes(data.removeprefix(_BOM) if number == 0 else data)
        if encoding != "utf-8":
            notes[f"lines decoded as {encoding}"] += 1
        yield without_nul(text, notes)


def decode(data: bytes) -> tuple[str, str]:
    """Text and its encoding: UTF-16 if marked, else UTF-8, or else line by line as `decoded_lines`, and of the lines'
    encodings the last of UTF-8, Windows-1252, Latin-1."""
    if data.startswith(_UTF16):
        with suppress(UnicodeDecodeError):
            return data.decode("utf-16"), "utf-16"
    data = data.removeprefix(_BOM)
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        lines, encodings = zip(*map(_decode_bytes, data.split(b"\n")), strict=True)
        return "\n".join(lines), "latin-1" if "latin-1" in encodings else "cp1252"


def without_nul(text: str, notes: Counter[str]) -> str:
    if "\0" in text:
        notes["NUL characters dropped"] += text.count("\0")
        return text.replace("\0", "")
    return text


def _decode_bytes(data: bytes) -> tuple[str, str]:
    for encoding in ("utf-8", "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"
