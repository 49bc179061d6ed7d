"""Second pass: the posts of one part as questions with their answers, in Markdown. Knows no splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from fairlead.data.clean import html_to_markdown
from fairlead.data.sources import Counts, atomic_write
from fairlead.data.splits import keyed_hash, split_of

from .options import StackExchangeOptions
from .questions import Answer, Question, answer_score
from .scatter import COMPRESSED, place_of

_STRING = pyarrow.string()
_ANSWER = pyarrow.struct(
    [
        ("id", pyarrow.int64()),
        ("text", _STRING),
        ("score", pyarrow.int64()),
        ("is_accepted", pyarrow.bool_()),
        ("licence", _STRING),
        ("author", _STRING),
    ]
)
QUESTIONS = pyarrow.schema(
    [
        ("site", _STRING),
        ("id", pyarrow.int64()),
        ("prompt", _STRING),
        ("answers", pyarrow.list_(_ANSWER)),
        ("licence", _STRING),
        ("author", _STRING),
        ("tags", pyarrow.list_(_STRING)),
    ]
)
KEYS = numpy.dtype([("key", "u8"), ("place", "i8"), ("split", "i1")])
"""Of each question: a hash of its prompt, its place, and the split its prompt is drawn for."""
QUESTIONS_IN_BATCH = 512


def gather(
    target: Path,
    shards: Sequence[tuple[int, Path]],
    names: Sequence[str],
    part: int,
    options: StackExchangeOptions,
    seed: int,
) -> dict[str, Any]:
    """Writes the questions of a part, by site and id, as ``TARGET.arrow``, their keys as ``TARGET.npy``.

    ``shards`` are the sites' numbers and the targets of the first pass, in the order of reading, ``names`` the sites'
    names.
    """
    shares = options.shares
    counts = Counts()
    keys: list[tuple[int, int, int]] = []
    splits = {name: number for number, name in enumerate(shares)}
    held: list[dict[str, Any]] = []
    with (
        atomic_write(target.with_suffix(".arrow")) as sink,
        pyarrow.ipc.new_file(sink, QUESTIONS, options=COMPRESSED) as writer,
    ):
        for site, posts in _threads(shards, part):
            question = _question(names[site], posts, counts)
            if question is None:
                continue
            split = splits[split_of(question.prompt, shares, seed)]
            keys.append((keyed_hash(0, "prompt", question.prompt), place_of(site, question.id), split))
            held.append(_row(question))
            if len(held) == QUESTIONS_IN_BATCH:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(held, schema=QUESTIONS))
                held.clear()
        writer.write_batch(pyarrow.RecordBatch.from_pylist(held, schema=QUESTIONS))
    with atomic_write(target.with_suffix(".npy")) as sink:
        numpy.save(sink, numpy.array(keys, dtype=KEYS))
    return {"counts": counts.as_dict()}


def _row(question: Question) -> dict[str, Any]:
    row = {name: getattr(question, name) for name in QUESTIONS.names}
    names = [field.name for field in _ANSWER]
    return row | {"answers": [{name: getattr(answer, name) for name in names} for answer in question.answers]}


def _threads(shards: Sequence[tuple[int, Path]], part: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The posts that name one question, itself first where it is there, then by id; by site and question."""
    batches, sites = list[pyarrow.RecordBatch](), list[numpy.ndarray]()
    for site, path in shards:
        with pyarrow.memory_map(f"{path}.arrow") as source, pyarrow.ipc.open_file(source) as file:
            batch = file.get_batch(part)
        if batch.num_rows:
            batches.append(batch)
            sites.append(numpy.full(batch.num_rows, site))
    if not batches:
        return
    posts = pyarrow.Table.from_batches(batches).combine_chunks()
    batches.clear()
    site, question, is_answer, id = (
        numpy.concatenate(sites),
        *(posts[name].to_numpy(zero_copy_only=False) for name in ("question", "is_answer", "id")),
    )
    order = numpy.lexsort((id, is_answer, question, site))  # stable: of equal ones the first read stays the first
    changes = (numpy.diff(site[order]) != 0) | (numpy.diff(question[order]) != 0)
    starts = [0, *(numpy.flatnonzero(changes) + 1).tolist(), len(order)]
    bodies = posts["body"].chunk(0)
    columns = {name: posts[name].to_pylist() for name in posts.column_names if name != "body"}
    for start, end in pairwise(starts):
        rows = order[start:end].tolist()
        thread = [{name: column[row] for name, column in columns.items()} for row in rows]
        if len(thread) > 2 and not thread[0]["is_answer"]:  # the bodies of other threads are not needed
            for post, row in zip(thread, rows, strict=True):
                post["body"] = bodies[row].as_py()
        yield int(site[rows[0]]), thread


def _question(site: str, posts: Sequence[dict[str, Any]], counts: Counts) -> Question | None:
    """The question in Markdown, or none and the reason in ``counts``."""
    distinct: dict[tuple[bool, int], dict[str, Any]] = {}
    for post in posts:
        if distinct.setdefault((post["is_answer"], post["id"]), post) is not post:
            counts.dropped["repeated post id"] += 1
    (asked, *answers) = distinct.values()
    if asked["is_answer"]:
        counts.dropped["answer without its question"] += len(distinct)
        return None
    if len(answers) < 2:
        return _drop("question with fewer than two answers", len(answers), counts)
    title, body = asked["title"], html_to_markdown(asked["body"])
    texts = [(post, text) for post in answers if (text := html_to_markdown(post["body"]))]
    counts.dropped["answer without body"] += len(answers) - len(texts)
    if not title or not body:
        return _drop("question without title or body", len(texts), counts)
    if len(texts) < 2:
        return _drop("question with fewer than two answers", len(texts), counts)
    if asked["accepted"] >= 0 and all(post["id"] != asked["accepted"] for post, _ in texts):
        counts.notes["accepted answer is not among the answers"] += 1
    return Question(
        site=site,
        id=asked["id"],
        prompt=f"{title}\n\n{body}",
        answers=tuple(_answer(post, text, asked["accepted"]) for post, text in texts),
        licence=asked["licence"],
        author=asked["author"],
        tags=tuple(re.findall(r"[^<>|]+", asked["tags"])),
    )


def _drop(reason: str, num_answers: int, counts: Counts) -> None:
    counts.dropped[reason] += 1
    counts.dropped["answer of a dropped question"] += num_answers


def _answer(post: dict[str, Any], text: str, accepted: int) -> Answer:
    is_accepted = post["id"] == accepted
    score = answer_score(post["votes"], is_accepted=is_accepted)
    return Answer(post["id"], text, score, is_accepted, post["licence"], post["author"])
