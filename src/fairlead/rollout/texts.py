"""What is measured of sampled texts: how varied they are, and which words they have come to repeat. Knows no tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SEGMENT = 100
"""Words of a segment of MSTTR-100."""
LONGEST_PHRASE = 3
_WORDS_AND_MARKS = re.compile(r"\w+|[^\w\s]")

Gram = tuple[str, ...]


def variety(texts: Sequence[str]) -> dict[str, float]:
    """The measures of diversity of GEM-metrics (Gehrmann et al. 2021) as RAFT's paper reports them, over all texts
    together; words are parted by white space, and their case counts:

    ``distinct_1``, ``distinct_2``: different n-grams / all n-grams (Li et al. 2016), in [0, 1], 0 where there is none;
    ``unique_1``, ``unique_2``: the number of n-grams that occur exactly once; ``msttr_100``: different words / words,
    mean over consecutive segments of 100 words of the texts laid end to end, what is left over not counted (Johnson
    1944), in [0, 1]; left out where there is no whole segment.
    """
    words = [text.split() for text in texts]
    measured: dict[str, float] = {}
    for n in (1, 2):
        counts = Counter(gram for each in words for gram in grams(each, n))
        measured[f"distinct_{n}"] = len(counts) / counts.total() if counts else 0.0
        measured[f"unique_{n}"] = float(sum(number == 1 for number in counts.values()))
    flat = [word for each in words for word in each]
    whole = range(0, len(flat) - SEGMENT + 1, SEGMENT)
    if whole:
        measured["msttr_100"] = sum(len(set(flat[at : at + SEGMENT])) for at in whole) / (SEGMENT * len(whole))
    return measured


def grams(words: Sequence[str], n: int) -> Iterator[Gram]:
    """Neighbouring words, ``n`` at a time."""
    return zip(*(words[start:] for start in range(n)), strict=False)


@dataclass(frozen=True, slots=True)
class Growth:
    """A phrase that has become more frequent: its share of all phrases of as many words."""

    phrase: str
    before: float
    now: float


def grown_phrase(before: Sequence[str], now: Sequence[str], *, factor: float, share: float) -> Growth | None:
    """The most frequent phrase of one to three words or marks in ``now`` that makes up ``share`` of them, ``factor``
    times its share in ``before``, where one occurrence more than seen is granted; the shortest of equals. None where
    there is none."""
    earlier, later = ([_WORDS_AND_MARKS.findall(text.lower()) for text in texts] for texts in (before, now))
    found: Growth | None = None
    for n in range(1, LONGEST_PHRASE + 1):
        old, new = (Counter(gram for words in texts for gram in grams(words, n)) for texts in (earlier, later))
        for gram, number in new.most_common():
            now_share = number / new.total()
            if now_share < max(share, 0.0 if found is None else found.now):
                break
            then = (old[gram] + 1) / (old.total() + 1)
            if now_share >= factor * then and (found is None or now_share > found.now):
                found = Growth(" ".join(gram), then, now_share)
                break
    return found
