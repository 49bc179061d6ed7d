"""What a reward returned, checked: a finite number for each sample, or numbers for the tokens or spans of its response.
Whatever else it is stops the run, with the source and a sample named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

from fairlead.data.render import Renderer
from fairlead.errors import TrainingError
from fairlead.rollout.rewards.spans import Span, spread
from fairlead.types import Rollout, Scores

TELLING = 8
"""Samples from which on equal scores say something of the reward."""


def scores_from(found: Any, rollouts: Sequence[Rollout], name: str, renderer: Renderer) -> Scores:
    """Scores of a number a sample; or, dense, of a sequence a sample: one number a token of the response, or spans
    (start, end, value) of characters of its text. Raises TrainingError for what is neither."""
    held = listed(found, len(rollouts), name)
    if not held or not _is_sequence(held[0]):
        return Scores(tuple(number(value, name, r.text) for value, r in zip(held, rollouts, strict=True)))
    tokens = tuple(_dense(value, rollout, name, renderer) for value, rollout in zip(held, rollouts, strict=True))
    return Scores(tuple(map(math.fsum, tokens)), tokens)


def listed(found: Any, wanted: int, name: str) -> list[Any]:
    """One value a sample. Raises TrainingError where there are more or fewer."""
    if not _is_sequence(found):
        raise TrainingError(
            f"the reward {name} returned {_short(found)} for {wanted} samples",
            hint="return a list of numbers, one a sample",
        )
    held = list(found)
    if len(held) != wanted:
        raise TrainingError(f"the reward {name} returned {len(held)} scores for {wanted} samples")
    return held


def number(value: Any, name: str, text: str) -> float:
    """A finite number. Raises TrainingError that names the source and the sample."""
    if not _is_number(value):
        raise TrainingError(
            f"the reward {name} returned {_short(value)}, which is no number, for the sample {sample(text)}"
        )
    if not math.isfinite(found := float(value)):
        raise TrainingError(f"the reward {name} returned {found} for the sample {sample(text)}")
    return found


def sample(text: str) -> str:
    """A response as an error quotes it."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def is_constant(scores: Scores) -> bool:
    """All of some samples score alike: such a reward teaches nothing."""
    return len(scores.values) >= TELLING and min(scores.values) == max(scores.values)


def _dense(value: Any, rollout: Rollout, name: str, renderer: Renderer) -> tuple[float, ...]:
    if not _is_sequence(value):
        raise TrainingError(
            f"the reward {name} returned {_short(value)} for the sample {sample(rollout.text)}, sequences for others",
            hint="of a dense reward every sample gets a sequence",
        )
    items, length = list(value), len(rollout.response_ids)
    if items and all(map(_is_number, items)):
        if len(items) != length:
            raise TrainingError(
                f"the reward {name} returned {len(items)} numbers for the {length} tokens of the sample "
                f"{sample(rollout.text)}",
                hint="give one a token of response_ids, or spans (start, end, value) of characters",
            )
        return tuple(number(item, name, rollout.text) for item in items)
    return spread([_span(item, name, rollout.text) for item in items], rollout, renderer, name)


def _span(item: Any, name: str, text: str) -> Span:
    held = list(item) if _is_sequence(item) else []
    if len(held) == 3 and all(map(_is_number, held)) and all(float(each).is_integer() for each in held[:2]):
        start, end = int(held[0]), int(held[1])
        if 0 <= start <= end <= len(text):
            return Span(start, end, number(held[2], name, text))
    raise TrainingError(
        f"the reward {name} returned {_short(item)}, which is no span of the sample {sample(text)} of {len(text)} "
        "characters",
        hint="a span is (start, end, value) with 0 <= start <= end <= length of the output",
    )


def _is_number(value: Any) -> bool:
    """Of Python, numpy or torch, or a tensor of one element without dimensions; no text."""
    return hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | dict | set) and not _is_number(value)


def _short(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f"{text} ({type(cast(object, value)).__name__})"
