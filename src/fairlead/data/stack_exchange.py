"""Reads Stack Exchange data dumps into scored answers and pairs. Knows nothing of splits.

The score of an answer is that of Askell et al. 2021 (A General Language Assistant as a Laboratory
for Alignment, section on preference model pre-training): round(log2(1 + upvotes)), plus one when
the questioner accepted it, and -1 whatever else holds when its votes are negative. A dump's
``Score`` is upvotes less downvotes and stands for upvotes.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import cast

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (lxml ships no types)

from fairlead.data.clean import html_to_markdown
from fairlead.data.sources import Counts, find_files, open_bytes
from fairlead.data.splits import keyed_hash
from fairlead.errors import DataError

_QUESTION, _ANSWER = "1", "2"


@dataclass(frozen=True, slots=True)
class Answer:
    id: int
    text: str
    """Markdown."""
    score: int
    is_accepted: bool
    licence: str | None
    """As the dump names it; dumps before 2020 do not."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answers, at least two, by id."""

    site: str
    id: int
    prompt: str
    """Title, blank line, body in Markdown."""
    answers: tuple[Answer, ...]
    licence: str | None


@dataclass(frozen=True, slots=True)
class _Post:
    id: int
    votes: int
    title: str
    body: str
    licence: str | None
    parent: int | None
    accepted_answer: int
    """-1 for none."""


def posts_files(path: str | Path) -> list[Path]:
    """The ``Posts.xml`` at ``path``, in the site folder there, or in the site folders below it."""
    return find_files(path, lambda file: file.name == "Posts.xml", "Posts.xml (unpack the .7z of a dump first)")


def answer_score(votes: int, *, is_accepted: bool) -> int:
    """Askell et al. 2021. Negative and accepted is -1: one reader does not outweigh the crowd."""
    return -1 if votes < 0 else round(math.log2(1 + votes)) + is_accepted


def read_questions(paths: Iterable[Path], counts: Counts) -> Iterator[Question]:
    """The questions with at least two answers, site by site and by id. ``counts`` counts posts.

    A site's posts are held in memory until its file is read, because answers stand far from their
    questions. Raises DataError for a file that is not the XML of a dump.
    """
    seen: set[str] = set()
    for path in paths:
        site = path.resolve().parent.name
        questions, answers = _read_posts(path, counts)
        for _, post in sorted(questions.items()):
            posts = answers.pop(post.id, [])
            if len(posts) < 2:
                _drop("question with fewer than two answers", len(posts), counts)
                continue
            question = _convert(site, post, posts)
            counts.dropped["answer without body"] += len(posts) - len(question.answers)
            if reason := _fault(question, seen):
                _drop(reason, len(question.answers), counts)
                continue
            seen.add(question.prompt)
            counts.kept += 1 + len(question.answers)
            yield question
        counts.dropped["answer without its question"] += sum(map(len, answers.values()))


def _drop(reason: str, num_answers: int, counts: Counts) -> None:
    counts.dropped[reason] += 1
    counts.dropped["answer of a dropped question"] += num_answers


def _fault(question: Question, seen: set[str]) -> str | None:
    if not question.prompt:
        return "question without title or body"
    if len(question.answers) < 2:
        return "question with fewer than two answers"
    return "duplicate question" if question.prompt in seen else None


def _read_posts(path: Path, counts: Counts) -> tuple[dict[int, _Post], dict[int, list[_Post]]]:
    questions: dict[int, _Post] = {}
    answers: defaultdict[int, list[_Post]] = defaultdict(list)
    ids: set[int] = set()
    for attributes in _rows(path):
        counts.read += 1
        post = _post(attributes)
        if isinstance(post, str) or post.id in ids:
            counts.dropped[post if isinstance(post, str) else "repeated post id"] += 1
            continue
        ids.add(post.id)
        if post.parent is None:
            questions[post.id] = post
        else:
            answers[post.parent].append(post)
    return questions, dict(answers)


def _rows(path: Path) -> Iterator[Mapping[str, str]]:
    """The attributes of every post, with the memory of those before it freed."""
    try:
        with open_bytes(path) as file:
            for _, element in etree.iterparse(file, tag="row", resolve_entities=False):
                yield cast("Mapping[str, str]", element.attrib)
                element.clear()
                while element.getprevious() is not None:
                    del element.getparent()[0]
    except etree.XMLSyntaxError as error:
        raise DataError(
            f"{path}:{error.lineno}: not the XML of a data dump: {error.msg}",
            "the file may have been cut off; unpack it again",
        ) from error


def _post(attributes: Mapping[str, str]) -> _Post | str:
    """The post, or the reason to drop it."""
    kind = attributes.get("PostTypeId")
    if kind not in (_QUESTION, _ANSWER):
        return "neither question nor answer"
    try:
        return _Post(
            id=int(attributes["Id"]),
            votes=int(attributes["Score"]),
            title=attributes.get("Title", "").strip(),
            body=attributes.get("Body", ""),
            licence=attributes.get("ContentLicense"),
            parent=int(attributes["ParentId"]) if kind == _ANSWER else None,
            accepted_answer=int(attributes.get("AcceptedAnswerId", -1)),
        )
    except (KeyError, ValueError):
        return "post without id, score or parent"


def _convert(site: str, post: _Post, posts: Iterable[_Post]) -> Question:
    """The question in Markdown, without answers that are empty; its prompt may be empty too."""
    body = html_to_markdown(post.body)
    answers = tuple(
        Answer(
            id=answer.id,
            text=text,
            score=answer_score(answer.votes, is_accepted=answer.id == post.accepted_answer),
            is_accepted=answer.id == post.accepted_answer,
            licence=answer.licence,
        )
        for answer in sorted(posts, key=lambda answer: answer.id)
        if (text := html_to_markdown(answer.body))
    )
    prompt = f"{post.title}\n\n{body}" if post.title and body else ""
    return Question(site, post.id, prompt, answers, post.licence)


def sample_pairs(question: Question, *, seed: int, limit: int, counts: Counts) -> list[tuple[Answer, Answer]]:
    """At most ``limit`` pairs of answers, the better first, the same ones in any order of reading.

    Ties and equal texts make no pair; ``counts`` counts pairs.
    """
    pairs: list[tuple[Answer, Answer]] = []
    for pair in combinations(question.answers, 2):
        counts.read += 1
        better, worse = sorted(pair, key=lambda answer: -answer.score)
        if better.score == worse.score:
            counts.dropped["equal scores"] += 1
        elif better.text == worse.text:
            counts.dropped["equal texts"] += 1
        else:
            pairs.append((better, worse))

    def draw(pair: tuple[Answer, Answer]) -> int:
        return keyed_hash(seed, "pairs", question.site, question.id, pair[0].id, pair[1].id)

    sampled = heapq.nsmallest(limit, pairs, key=draw)
    counts.dropped["more pairs than the limit"] += len(pairs) - len(sampled)
    counts.kept += len(sampled)
    return sorted(sampled, key=lambda pair: (pair[0].id, pair[1].id))
