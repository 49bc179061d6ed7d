"""Values of spans of characters, put on the tokens of a response: by what each token adds to the decoded text, never by
tokenising that text again, which may cut it elsewhere than the sampler did."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from fairlead.data.render import Renderer
from fairlead.errors import TrainingError
from fairlead.types import Rollout

_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


class Span(NamedTuple):
    start: int
    end: int
    value: float


def spread(spans: Sequence[Span], rollout: Rollout, renderer: Renderer, name: str) -> tuple[float, ...]:
    """One number a token of the response: each span's value at the last token that holds a character of it, values at
    one token added up. A span without characters goes to the token before it, or to the first. Raises TrainingError
    where the text is not that of the tokens."""
    ends = token_ends(renderer, rollout.response_ids)
    text = renderer.tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)
    begin = len(text) - len(text.lstrip())
    if not text.startswith(rollout.text, begin):
        raise TrainingError(
            f"the reward {name} returned spans of the sample {rollout.text[:200]!r}, whose tokens read {text[:200]!r}",
            hint="spans need the text as its tokens write it; return one number a token",
        )
    found = [0.0] * len(ends)
    places = [(index, first) for index, (first, last) in enumerate(pairwise([0, *ends])) if first < last]
    for span in spans:
        found[max((index for index, first in places if first < begin + span.end), default=0)] += span.value
    return tuple(found)


def token_ends(renderer: Renderer, ids: Sequence[int]) -> list[int]:
    """Characters of the decoded response up to and with each token. A character of several tokens is the last one's; a
    special token has none."""
    tokenizer = renderer.tokenizer
    silent, kept = set(tokenizer.all_special_ids), list[int]()
    ends: list[int] = []
    last = 0
    # Decoded in a window that begins one token before what is new: some tokenizers drop a text's first space.
    start, read, done = 0, 0, 0
    for token in ids:
        if token not in silent:
            kept.append(token)
            last = len(ends)
            whole = tokenizer.decode(kept[start:])
            if not whole.endswith(_BROKEN):
                done += len(whole) - len(tokenizer.decode(kept[start:read]))
                start, read = read, len(kept)
        ends.append(done)
    whole = len(tokenizer.decode(kept))  # bytes left over at the end are a character too
    return [*ends[:last], *[whole] * len(ends[last:])]
