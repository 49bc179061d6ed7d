"""Reads plain text for pretraining: any encoding in, documents of bounded size out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fairlead.data.sources import Counts, clip, decode, find_files, format_of, open_bytes, read_rows, without_nul
from fairlead.errors import DataError

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_START = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG [^*]*\*\*\*", re.IGNORECASE)
_END = re.compile(r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG [^*]*\*\*\*", re.IGNORECASE)
_CREDIT = re.compile(r"\s*Produced by .*(?:\n.+)*")
_LAST_WORDS = re.compile(r"\n\s*End of (?:the )?Project Gutenberg.*(?:\n.+)*\s*\Z")


def text_files(path: str | Path) -> list[Path]:
    """The file at ``path``, or the ``.txt`` and ``.jsonl`` files of the folder there."""
    return find_files(path, lambda file: format_of(file) in (".txt", ".jsonl"), ".txt or .jsonl files")


def read_documents(paths: Iterable[Path], counts: Counts, *, max_characters: int = 4000) -> Iterator[dict[str, str]]:
    """``{"text": ...}`` of at most ``max_characters`` each, cut at blank lines where possible.

    ``counts`` counts texts: a ``.txt`` file, or the field ``text`` of a ``.jsonl`` row.
    """
    for path in paths:
        for text in _texts(path, counts):
            counts.read += 1
            documents = list(split_text(text.replace("\r\n", "\n").replace("\r", "\n"), max_characters))
            if not documents:
                counts.dropped["empty text"] += 1
                continue
            counts.kept += 1
            counts.notes["documents"] += len(documents)
            yield from ({"text": document} for document in documents)


def _texts(path: Path, counts: Counts) -> Iterator[str]:
    if format_of(path) == ".jsonl":
        for row in read_rows(path):
            if not isinstance(row.data.get("text"), str):
                raise DataError(
                    f"{row.place}: text must be a string, got {clip(row.data.get('text'))}",
                    'a row of text is {"text": "..."}',
                )
            yield row.data["text"]
        return
    with open_bytes(path) as file:
        text, encoding = decode(file.read())
    counts.notes[f"decoded as {encoding}"] += 1
    text = without_nul(text, counts.notes)
    body = strip_gutenberg(text)
    counts.notes["Project Gutenberg licence removed"] += body != text
    yield body


def strip_gutenberg(text: str) -> str:
    """The book between Project Gutenberg's marks, without the credits; other text as it is."""
    start, end = _START.search(text), _END.search(text)
    if start is None and end is None:
        return text
    body = text[start.end() if start else 0 : end.start() if end else None]
    body = body.replace("\r\n", "\n")
    if credit := _CREDIT.match(body):
        body = body[credit.end() :]
    return _LAST_WORDS.sub("", body).strip("\n")


def split_text(text: str, max_characters: int) -> Iterator[str]:
    """Paragraphs joined while they fit; one too long is cut at a line, a sentence or a word."""
    held = ""
    for paragraph in _BLANK_LINES.split(text):
        for piece in _pieces(paragraph.strip("\n").rstrip(), max_characters):
            if held and len(held) + len("\n\n") + len(piece) > max_characters:
                yield held
                held = ""
            held = f"{held}\n\n{piece}" if held else piece
    if held:
        yield held


def _pieces(paragraph: str, limit: int) -> Iterator[str]:
    while len(paragraph) > limit:
        marks = (("\n", limit // 2), (". ", limit // 2), (" ", 0))
        ends = (paragraph.rfind(mark, start, limit + 1) for mark, start in marks)
        cut = next((end + 1 for end in ends if end >= 0), limit)
        yield paragraph[:cut].rstrip()
        paragraph = paragraph[cut:].lstrip()
    if paragraph:
        yield paragraph
