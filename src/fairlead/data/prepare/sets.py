"""Published sets of rows: each row becomes rows of the outputs, and nothing held out is trained on. Knows no dumps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fairlead.data.prepare.kind import Say
from fairlead.data.prepare.rows import writing
from fairlead.data.sources import Counts, Row, read_rows, read_source
from fairlead.data.sources.splits import split_named
from fairlead.data.splits import split_of

Parsed = Sequence[tuple[str, Mapping[str, Any]]] | str
"""Rows, each with the name of its output, or the reason to drop what was read. The first's key decides the split."""
Parse = Callable[[Row, Path, Any, Counter[str]], Parsed]
"""Of a row, the file it stands in, the options, and notes on what was mended."""

_HELDOUT_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class SetOptions:
    heldout: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the prompts kept for evaluation, drawn by a hash; null: the publisher's own test part, or 0.05 where
    there is none."""


def parts_by_name(file: Path) -> tuple[str, ...]:
    """Whether a file's name says train or held out; an archive holds both."""
    if ".tar" in file.suffixes:
        return ("train", "heldout")
    return ("train",) if split_named(file.name) in (None, "train") else ("heldout",)


def write_set(
    parse: Parse,
    files: Sequence[Path],
    folder: Path,
    options: SetOptions,
    seed: int,
    say: Say,
    *,
    parts: Callable[[Path], tuple[str, ...]] = parts_by_name,
) -> dict[str, Any]:
    """Writes the held-out rows first; what is then trained on shares no prompt, labelled answer or text with them."""
    counts, splits, left_out = Counts(), Counter[str](), Counter[str]()
    held: set[bytes] = set()
    by_publisher = options.heldout is None and any("heldout" in parts(file) for file in files)
    share = _HELDOUT_SHARE if options.heldout is None else options.heldout
    shares = {"train": 1 - share, "heldout": share}

    def rows_of(split: str) -> Iterator[tuple[Parsed, Counter[str]]]:
        for file, part in [(each, part) for each in files for part in parts(each)]:
            if by_publisher and part != split:
                continue
            notes = Counter[str]()
            for row in _read(file, part, notes) if len(parts(file)) > 1 else read_rows(file, notes):
                mended = Counter[str]()
                parsed = parse(row, file, options, mended)
                drawn = "train" if isinstance(parsed, str) else split_of(_key(parsed[0][1]), shares, seed)
                if by_publisher or drawn == split:
                    yield parsed, mended
            if by_publisher or split == "train":
                counts.notes.update(notes)

    with writing(folder) as outputs:
        for split, prefix in (("heldout", "heldout_"), ("train", "")):
            for parsed, mended in rows_of(split):
                counts.read += 1
                if isinstance(parsed, str):
                    counts.dropped[parsed] += 1
                    continue
                added, leaked = 0, 0
                for name, fields in parsed:
                    key = blake2b(_key(fields).encode(), digest_size=16).digest()
                    if split == "heldout":
                        held.add(key)
                    elif key in held:
                        leaked += 1
                        left_out[name] += 1
                        continue
                    added += outputs.add(prefix + name, fields)
                if not added:
                    counts.dropped["also held out" if leaked else "duplicate"] += 1
                    continue
                counts.kept += 1
                counts.notes.update(mended)
                splits[split] += 1
    return counts.as_dict() | {
        "splits": dict(sorted(splits.items())),
        "equal_rows_merged": dict(sorted(outputs.merged.items())),
        "left_out_as_held_out": dict(sorted(left_out.items())),
    }


def _read(archive: Path, part: str, notes: Counter[str]) -> Iterator[Row]:
    found = Counter[str]()
    yield from read_source(str(archive), heldout=part == "heldout", notes=found)
    notes.update({note: number for note, number in found.items() if not note.startswith("files left aside")})


def _key(fields: Mapping[str, Any]) -> str:
    """What training must not share with evaluation: the prompt, the labelled answer, or the whole text."""
    key = fields.get("prompt") or fields.get("response") or fields.get("text")
    return key if isinstance(key, str) else json.dumps(key, ensure_ascii=False, sort_keys=True)
