"""Reads the rows of a dump's table: fast where they look as Stack Exchange writes them, by lxml where they do not.

Knows XML and its faults; not what the attributes mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (lxml ships no types)

from fairlead.data.sources import Counts
from fairlead.errors import DataError

from .dump import ROW, Stretch

Attributes = dict[str, str]

_BLOCK = 4 << 20
_HEAD = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>)?(?:\s|<!--.*?-->)*<(\w+)\s*(/>|>\s*</\1\s*>|>)\s*", re.DOTALL
)
_END = re.compile(rb"\s*/>\s*")
_ROW_END = re.compile(rb'"\s*/>')
_NAME = re.compile(rb" ([A-Za-z_][\w.-]*)=")
_CONTROL = bytes(range(32))
_FORBIDDEN = bytes(set(_CONTROL) - set(b"\t\n\r"))
_RARE = re.compile(r"&(?!(?:lt|gt|amp|quot|apos|#xA|#xD|#x9|#10|#13|#9);)")
_REFERENCE = re.compile(rb"&#(?:x([0-9A-Fa-f]{1,8})|([0-9]{1,10}));")
_names: dict[bytes, str] = {}


@dataclass(frozen=True, slots=True)
class _Piece:
    """What stands from one ``<row `` (left out) to the next, or before the first row."""

    offset: int
    data: bytes
    is_head: bool


def read_table(stretch: Stretch, root: str, counts: Counts, on_error: Literal["stop", "skip"]) -> Iterator[Attributes]:
    """The attributes of every row of the stretch; of ``counts``, ``read`` and ``dropped`` where XML is broken.

    Raises DataError naming the line of broken XML, unless ``on_error`` is skip: then it is counted and left out up to
    the start of the next row. A file that does not begin as this table is an error either way.
    """
    name = f"{stretch.path.parent.name}/{stretch.path.name}"
    closing = re.compile(rb"</%s\s*>\s*\Z" % root.encode())
    is_closed = False
    for piece in _pieces(stretch):
        if piece.is_head:
            head = _HEAD.fullmatch(piece.data)
            if not head or head[1].decode() != root:
                raise _no_dump(stretch, piece.offset, f"it does not begin with <{root}>")
            is_closed = head[2] != b">"
            continue
        end = closing.search(piece.data, len(piece.data) - 64 if len(piece.data) > 64 else 0)
        is_closed = end is not None
        data = piece.data[: end.start()] if end else piece.data
        try:
            rows = _parse(data, counts)
        except etree.XMLSyntaxError as error:
            if on_error == "stop":
                raise _no_dump(stretch, piece.offset, error.msg or "broken", error.lineno or 1) from error
            counts.read += 1
            counts.dropped["broken XML"] += 1
            counts.notes[f"broken XML in {name}"] += 1
            rows = _first_row(data, counts)
        counts.read += len(rows)
        yield from rows
    if stretch.is_last and not is_closed:
        if on_error == "stop":
            raise _no_dump(stretch, stretch.end, f"it ends without </{root}>")
        counts.notes[f"{name} is cut off"] += 1


def _pieces(stretch: Stretch) -> Iterator[_Piece]:
    with stretch.path.open("rb") as file:
        file.seek(stretch.start)
        offset, left, held, is_head = stretch.start, stretch.end - stretch.start, list[bytes](), stretch.start == 0
        if not is_head:
            left -= len(file.read(len(ROW)))
        tail = b""
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            left -= len(block)
            *whole, last = (tail + block).split(ROW)
            for data in whole:
                data = b"".join((*held, data)) if held else data
                held.clear()
                yield _Piece(offset, data, is_head)
                offset += len(data) + len(ROW) * (not is_head)
                is_head = False
            keep = len(ROW) - 1  # a start of row may be cut here
            held.append(last[:-keep])
            tail = last[-keep:]
        yield _Piece(offset, b"".join((*held, tail)), is_head)


def _parse(data: bytes, counts: Counts) -> list[Attributes]:
    """One row, as a rule; ``data`` begins after ``<row ``. Raises XMLSyntaxError."""
    values = data.split(b'"')
    is_plain = _END.fullmatch(values.pop()) and b"<" not in data and len(values) % 2 == 0 and values
    content = data[: data.rfind(b'"')]
    if is_plain and len(content.translate(None, _CONTROL)) == len(content):  # XML reads a bare line end as a space
        values[0] = b" " + values[0]
        names = values[::2]
        if len(set(names)) == len(names):
            try:
                return [{_name(name): _text(value) for name, value in zip(names, values[1::2], strict=True)}]
            except ValueError:
                pass
    return _parse_exactly(data, counts)


def _first_row(data: bytes, counts: Counts) -> list[Attributes]:
    """The row that is whole, where it is what follows it that is broken."""
    if end := _ROW_END.search(data):
        with suppress(etree.XMLSyntaxError):
            return _parse(data[: end.end()], counts)
    return []


def _name(token: bytes) -> str:
    name = _names.get(token)
    if name is None:
        if not (match := _NAME.fullmatch(token)):
            raise ValueError
        name = _names[token] = match[1].decode()
    return name


def _text(value: bytes) -> str:
    text = value.decode()
    if "&" in text:
        if _RARE.search(text):
            raise ValueError
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&#xA;", "\n")
        if "&#" in text:
            for reference, character in (("#xD", "\r"), ("#x9", "\t"), ("#10", "\n"), ("#13", "\r"), ("#9", "\t")):
                text = text.replace(f"&{reference};", character)
        text = text.replace("&apos;", "'").replace("&amp;", "&")  # the last, lest its result be replaced again
    return text


def _parse_exactly(data: bytes, counts: Counts) -> list[Attributes]:
    table = b"<rows>" + ROW + data + b"</rows>"
    try:
        return _rows_of(table)
    except etree.XMLSyntaxError:
        repaired = _REFERENCE.sub(_legal, table.translate(None, _FORBIDDEN))
        if repaired == table:
            raise
    rows = _rows_of(repaired)
    counts.notes["row with characters that XML forbids, which were removed"] += 1
    return rows


def _rows_of(table: bytes) -> list[Attributes]:
    parser = etree.XMLParser(resolve_entities=False, huge_tree=True, no_network=True)
    return [dict(row.attrib) for row in etree.fromstring(table, parser) if row.tag == "row"]


def _legal(reference: re.Match[bytes]) -> bytes:
    """The reference, unless it is to no character of XML 1.0 (production 2)."""
    code = int(reference[1], 16) if reference[1] else int(reference[2])
    legal = code in (9, 10, 13) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or 0x10000 <= code <= 0x10FFFF
    return reference[0] if legal else b""


def _no_dump(stretch: Stretch, offset: int, reason: str, line: int = 1) -> DataError:
    """``line`` counts from that of ``offset``."""
    with stretch.path.open("rb") as file:
        while offset > 0 and (block := file.read(min(_BLOCK, offset))):
            line += block.count(b"\n")
            offset -= len(block)
    return DataError(
        f"{stretch.path}:{line}: not the XML of a data dump: {reason}",
        "the file may have been cut off: unpack it again; on_error=skip leaves out what is broken and goes on after it",
    )
