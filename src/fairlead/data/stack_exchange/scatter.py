"""First pass: the posts of one stretch of a dump, parted by a hash of their question. Knows attributes, not text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from fairlead.data.sources import Counts, atomic_write

from .dump import Stretch
from .options import StackExchangeOptions
from .rows import read_table

POSTS = pyarrow.schema(
    [
        ("question", pyarrow.int64()),
        ("is_answer", pyarrow.bool_()),
        ("id", pyarrow.int64()),
        ("votes", pyarrow.int64()),
        ("accepted", pyarrow.int64()),
        ("title", pyarrow.string()),
        ("body", pyarrow.string()),
        ("tags", pyarrow.string()),
        ("author", pyarrow.string()),
        ("licence", pyarrow.string()),
    ]
)
COMPRESSED = pyarrow.ipc.IpcWriteOptions(compression="zstd")
_QUESTION, _ANSWER = "1", "2"
_DUPLICATE = "3"
_CHUNK = 4096
_IDS = 2**40

Post = tuple[int, bool, int, int, int, str, str, str, str | None, str | None]


def scatter(target: Path, stretch: Stretch, site: int, parts: int, options: StackExchangeOptions) -> dict[str, Any]:
    """Writes the posts of a stretch as ``TARGET.arrow``, whose record batch ``i`` is part ``i``; returns the counts."""
    counts = Counts()
    tables: list[pyarrow.Table] = []
    held: list[Post] = []

    def flush() -> None:
        columns = zip(*held, strict=True) if held else [[] for _ in POSTS]
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, POSTS, strict=True)]
        tables.append(pyarrow.Table.from_arrays(arrays, schema=POSTS))
        held.clear()

    for attributes in read_table(stretch, "posts", counts, options.on_error):
        post = _post(attributes)
        if isinstance(post, str):
            counts.dropped[post] += 1
            continue
        held.append(post)
        if len(held) == _CHUNK:
            flush()
    flush()
    posts = pyarrow.concat_tables(tables)
    tables.clear()
    part = part_of(posts["question"].to_numpy(), site, parts)
    order = numpy.argsort(part, kind="stable")
    ends = numpy.cumsum(numpy.bincount(part, minlength=parts))
    posts = posts.take(order).combine_chunks()
    with (
        atomic_write(target.with_suffix(".arrow")) as sink,
        pyarrow.ipc.new_file(sink, POSTS, options=COMPRESSED) as writer,
    ):
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            (batch,) = posts.slice(start, end - start).to_batches() or [_EMPTY]
            writer.write_batch(batch)
    return {"posts": posts.num_rows, "counts": counts.as_dict()}


_EMPTY = pyarrow.RecordBatch.from_pylist([], schema=POSTS)


def part_of(question: numpy.ndarray, site: int, parts: int) -> numpy.ndarray:
    """Uniform over the parts, the same for a question and its answers (the finaliser of SplitMix64)."""
    with numpy.errstate(over="ignore"):
        bits = question.astype(numpy.uint64) + numpy.uint64(site) * numpy.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> numpy.uint64(31))) % numpy.uint64(parts)).astype(numpy.int64)


def _post(attributes: Mapping[str, str]) -> Post | str:
    """The post, or the reason to drop it."""
    kind = attributes.get("PostTypeId")
    if kind not in (_QUESTION, _ANSWER):
        return "neither question nor answer"
    try:
        id, votes = _integer(attributes["Id"]), _integer(attributes["Score"])
        question = _integer(attributes["ParentId"]) if kind == _ANSWER else id
        accepted = _integer(attributes.get("AcceptedAnswerId", "-1"))
    except (KeyError, ValueError):
        return "post without id, score or parent"
    return (
        question,
        kind == _ANSWER,
        id,
        votes,
        accepted,
        attributes.get("Title", "").strip(),
        attributes.get("Body", ""),
        attributes.get("Tags", ""),
        author_of(attributes),
        licence_of(attributes),
    )


def _integer(value: str) -> int:
    number = int(value)
    if not -_IDS < number < _IDS:
        raise ValueError
    return number


def place_of(site: int, id: int) -> int:
    """One number for a post of a site, in the order of sites and ids."""
    return site * _IDS + id


def author_of(attributes: Mapping[str, str]) -> str | None:
    """``user 7``, whose page is https://SITE/users/7; the name left by a deleted user; none where the dump has none."""
    if user := attributes.get("OwnerUserId"):
        return f"user {user}"
    return attributes.get("OwnerDisplayName")


def licence_of(attributes: Mapping[str, str]) -> str | None:
    """As the dump names it; in dumps before 2020, which do not, by the post's date, and marked so.

    The dates are those of https://meta.stackexchange.com/questions/347758. An edit after such a date puts the text
    under the newer version, but a dump does not part edits of the text from those of the tags.
    """
    if stated := attributes.get("ContentLicense"):
        return stated
    date = attributes.get("CreationDate", "")
    if not re.match(r"\d{4}-\d\d-\d\d", date):
        return None
    version = "2.5" if date < "2011-04-08" else "3.0" if date < "2018-05-02" else "4.0"
    return f"CC BY-SA {version} (by date)"


def find_duplicates(target: Path, stretch: Stretch, site: int, options: StackExchangeOptions) -> dict[str, Any]:
    """Writes ``TARGET.npy``: the places of questions, two by two, one closed as a duplicate of the other."""
    counts = Counts()
    pairs: list[tuple[int, int]] = []
    for attributes in read_table(stretch, "postlinks", counts, options.on_error):
        if attributes.get("LinkTypeId") != _DUPLICATE:
            continue
        try:
            one, other = _integer(attributes["PostId"]), _integer(attributes["RelatedPostId"])
            pairs.append((place_of(site, one), place_of(site, other)))
        except (KeyError, ValueError):
            counts.notes["link without posts"] += 1
    with atomic_write(target.with_suffix(".npy")) as sink:
        numpy.save(sink, numpy.array(pairs, dtype=numpy.int64).reshape(-1, 2))
    return {"links": counts.read, "duplicates": len(pairs), "counts": Counts(notes=counts.notes).as_dict()}
