"""A question-and-answer site of the miniature world, written as a Stack Exchange data dump.

Votes follow the gold score, but like real ones they also favour length and code. Knows nothing of
training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from random import Random
from typing import Any, Final

from .gold import gold_score
from .world import WORLD, Answer, Block, Question, World, render, sample_answer, sample_question

NUM_ANSWERS_WEIGHTS: Final = (3, 14, 25, 28, 18, 12)  # of 0, 1, 2 ... answers to a question
ACCEPT_RATE: Final = 0.7  # share of answered questions whose asker accepts an answer
ACCEPT_NOISE: Final = 0.25  # standard deviation of the asker's judgement, in gold
REPEAT_RATE: Final = 0.01  # share of questions that repeat an earlier one; some more do by chance
DELETED_RATE: Final = 0.01  # share of questions that were deleted while their answers stayed
NUM_WIKIS: Final = 6  # posts of types 4 and 5 (a tag's excerpt and wiki), all with empty bodies
TYPICAL_WORDS: Final = 29  # about the mean of an answer's length in words
WORDS_SPREAD: Final = 7  # its standard deviation
ORIGIN: Final = datetime(2024, 1, 1)
ATTRIBUTES: Final = (
    "Id", "PostTypeId", "AcceptedAnswerId", "ParentId", "CreationDate", "Score", "ViewCount",
    "Body", "OwnerUserId", "LastActivityDate", "Title", "Tags", "AnswerCount", "CommentCount",
    "ContentLicense",
)  # fmt: skip

Post = dict[str, Any]  # attributes of a row; one post refers to another by its dict, written as Id


@dataclass(frozen=True)
class Votes:
    """What voters like: latent = base + quality * gold + length * z + code * has_code + noise * e.

    z is the length in words, normalised by TYPICAL_WORDS and WORDS_SPREAD; e is standard normal.
    The score shown is the question's popularity times sinh(latent), rounded: mostly small numbers,
    some below zero, and a long tail.
    """

    quality: float = 3.0
    length: float = 0.25
    code: float = 0.4
    noise: float = 0.35
    base: float = -1.0


@dataclass(frozen=True)
class Thread:
    """A question, its answers, their gold scores and votes, and the accepted answer's index."""

    question: Question
    answers: tuple[Answer, ...]
    golds: tuple[float, ...]
    scores: tuple[int, ...]
    accepted: int | None


def sample_site(*, seed: int, num_questions: int, votes: Votes | None = None, world: World = WORLD) -> list[Thread]:
    """The threads of a site in the order asked; a few repeat an earlier question word for word."""
    rng = Random(f"site/{seed}")
    threads: list[Thread] = []
    for _ in range(num_questions):
        repeats = bool(threads) and rng.random() < REPEAT_RATE
        question = rng.choice(threads).question if repeats else sample_question(rng, world=world)
        threads.append(_sample_thread(rng, question, votes or Votes(), world))
    return threads


def _sample_thread(rng: Random, question: Question, votes: Votes, world: World) -> Thread:
    [num_answers] = rng.choices(range(len(NUM_ANSWERS_WEIGHTS)), NUM_ANSWERS_WEIGHTS)
    answers = tuple(sample_answer(rng, question, world=world) for _ in range(num_answers))
    golds = tuple(gold_score(question.text, answer.text, world=world) for answer in answers)
    popularity = rng.lognormvariate(0, 0.5)

    def score(answer: Answer, gold: float) -> int:
        z = (answer.num_words - TYPICAL_WORDS) / WORDS_SPREAD
        liked = votes.quality * gold + votes.length * z + votes.code * answer.has_code
        return round(popularity * math.sinh(votes.base + liked + rng.gauss(0, votes.noise)))

    scores = tuple(map(score, answers, golds))
    accepted = None
    if answers and rng.random() < ACCEPT_RATE:
        seemed = [gold + rng.gauss(0, ACCEPT_NOISE) for gold in golds]
        accepted = seemed.index(max(seemed))
    return Thread(question, answers, golds, scores, accepted)


def write_dump(
    directory: str | Path,
    *,
    seed: int,
    num_questions: int,
    votes: Votes | None = None,
    world: World = WORLD,
) -> None:
    """Write a site's `Posts.xml` into `directory`, in the form of a Stack Exchange data dump.

    The same arguments give the same bytes. Like real dumps it has dirt for a preparer to count and
    drop: repeated questions, questions without answers (both among the `num_questions`), answers
    whose question was deleted, tag wikis with empty bodies.
    """
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, got {num_questions}")
    threads = sample_site(seed=seed, num_questions=num_questions, votes=votes, world=world)
    rng = Random(f"dump/{seed}")
    posts = [_post(ORIGIN, PostTypeId=4 + index % 2, Score=0, Body="") for index in range(NUM_WIKIS)]
    for index, thread in enumerate(threads):
        asked = ORIGIN + timedelta(minutes=40 * (index + rng.uniform(0.1, 1)))
        posts.extend(_thread_posts(rng, thread, asked))
    posts.sort(key=lambda post: post["CreationDate"])
    for number, post in enumerate(posts, start=1):
        post |= {"Id": number, "OwnerUserId": rng.randint(1, num_questions)}
    rows = [_row(post) for post in posts if post["PostTypeId"] != 1 or rng.random() >= DELETED_RATE]
    text = "\n".join(('<?xml version="1.0" encoding="utf-8"?>', "<posts>", *rows, "</posts>"))
    path = Path(directory) / "Posts.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(text.encode("utf-8-sig"))  # real dumps begin with a byte-order mark
    partial.replace(path)


def _thread_posts(rng: Random, thread: Thread, asked: datetime) -> list[Post]:
    """The question, asked at the time given, and its answers, some hours after it."""
    question = _post(
        asked,
        PostTypeId=1,
        Score=round(rng.lognormvariate(0.7, 0.8)) - 1,
        ViewCount=round(rng.lognormvariate(5, 1)),
        Body=render([Block("p", (thread.question.body,))], html=True),
        Title=thread.question.title,
        Tags=f"|{thread.question.topic}|{thread.question.problem}|",
        AnswerCount=len(thread.answers),
    )
    answers = [
        _post(
            asked + timedelta(hours=0.1 + rng.expovariate(1 / 12)),
            PostTypeId=2,
            ParentId=question,
            Score=score,
            Body=render(answer.blocks, html=True),
        )
        for answer, score in zip(thread.answers, thread.scores, strict=True)
    ]
    question["LastActivityDate"] = max(post["CreationDate"] for post in (question, *answers))
    if thread.accepted is not None:
        question["AcceptedAnswerId"] = answers[thread.accepted]
    return [question, *answers]


def _post(created: datetime, **attributes: Any) -> Post:
    common = {"CommentCount": 0, "ContentLicense": "CC BY-SA 4.0"}
    return {"CreationDate": created, "LastActivityDate": created, **common, **attributes}


def _row(post: Post) -> str:
    attributes = (f'{name}="{_value(post[name])}"' for name in ATTRIBUTES if name in post)
    return f"  <row {' '.join(attributes)} />"


def _value(value: Any) -> str:
    match value:
        case dict():
            return str(value["Id"])
        case datetime():
            return value.isoformat(timespec="milliseconds")
        case _:
            return escape(str(value)).replace("\n", "&#xA;")
