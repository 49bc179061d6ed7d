"""The reward of the rounds: a function of the text alone that is soon learned. Both sides call it."""

from __future__ import annotations

from collections.abc import Sequence


def long_text(outputs: Sequence[str]) -> list[float]:
    """Tens of characters of each response: tokens of many characters are to be preferred."""
    return [len(text) / 10 for text in outputs]
