"""Rules and rewards that tests name as `module:function`."""

from __future__ import annotations

from typing import Any


def shortened(text: str) -> str:
    """Always another text, so that a response is tokenised anew and ends."""
    return text[:12] + "."


def likes_hashes(outputs: list[str], **_: Any) -> list[float]:
    """What the reward model of the source could not see, planted: a little for brevity, and much for '#'."""
    return [min(output.count("#"), 4) - len(output) / 100 for output in outputs]


def two_levels(outputs: list[str], **_: Any) -> list[float]:
    """Nearly noise: nothing that can be learned in a few steps."""
    return [float(sum(map(ord, output)) % 7) for output in outputs]
