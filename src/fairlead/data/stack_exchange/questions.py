"""Questions with their answers: how answers are scored and paired. Knows nothing of files and splits.

The score of an answer is that of Askell et al. 2021 (A General Language Assistant as a Laboratory for Alignment,
section 4.1 on preference model pre-training): round(log2(1 + upvotes)), plus one when the questioner accepted it, and
-1 whatever else holds when its votes are negative. A dump's ``Score`` is upvotes less downvotes and stands for
upvotes, as in the published sets made by this recipe.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from fairlead.data.sources import Counts
from fairlead.data.splits import keyed_hash


@dataclass(frozen=True, slots=True)
class Answer:
    id: int
    text: str
    """Markdown."""
    score: int
    is_accepted: bool
    licence: str | None
    author: str | None


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answers, at least two, by id."""

    site: str
    id: int
    prompt: str
    """Title, blank line, body in Markdown."""
    answers: tuple[Answer, ...]
    licence: str | None
    author: str | None = None
    tags: tuple[str, ...] = ()


def answer_score(votes: int, *, is_accepted: bool) -> int:
    """Askell et al. 2021. Negative and accepted is -1: one reader does not outweigh the crowd."""
    return -1 if votes < 0 else round(math.log2(1 + votes)) + is_accepted


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

    sampled = heapq.nsmallest(limit, pairs, key=draw) if len(pairs) > limit else pairs
    counts.dropped["more pairs than the limit"] += len(pairs) - len(sampled)
    counts.kept += len(sampled)
    return sorted(sampled, key=lambda pair: (pair[0].id, pair[1].id))


def demonstrations(question: Question, which: Literal["all", "accepted_or_best"]) -> Sequence[Answer]:
    """The answers worth imitating: all, or the accepted one, else the one of the highest score, then the lowest id."""
    if which == "all":
        return question.answers
    return [min(question.answers, key=lambda answer: (not answer.is_accepted, -answer.score, answer.id))]
