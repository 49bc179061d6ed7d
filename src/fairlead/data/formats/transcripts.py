"""Reads transcripts: whole conversations written into one string, as HH and LMFlow do. Knows no template."""

from __future__ import annotations

import re

from fairlead.data.formats.base import Data, Notes, Parsed, first, string
from fairlead.data.hh import HASH_TURN, MARKER, TURN, split_turns
from fairlead.data.sources import Row
from fairlead.types import Conversation, Demonstration, Message, Prompt

_ANSWER_IS_NEXT = re.compile(r"(?:\n\n|###\s?)Assistant:\s*\Z")


def style_of(text: object) -> re.Pattern[str] | None:
    """What parts the turns of a text that begins with one; none for other text."""
    if not isinstance(text, str):
        return None
    start = text.lstrip()
    return TURN if start.startswith("Human:") else HASH_TURN if HASH_TURN.match(start) else None


def is_transcript(data: Data) -> bool:
    return style_of(data.get(first(data, "text|chosen"))) is not None


def read_transcript(text: str, notes: Notes) -> list[Message] | str:
    """The turns of a transcript of either style, or why it has none. A marker inside a turn stays, and is noted."""
    style = style_of(text) or TURN
    turns = split_turns(text, style)
    if not isinstance(turns, str) and any(MARKER.search(turn["content"]) for turn in turns):
        notes["marker inside a turn"] += 1
    return turns


def read_prompt(prompt: Conversation, notes: Notes) -> Conversation:
    """A prompt that is a transcript waiting for its answer, as turns; any other as it is."""
    if not isinstance(prompt, str) or style_of(prompt) is None or not (end := _ANSWER_IS_NEXT.search(prompt)):
        return prompt
    turns = split_turns(prompt[: end.start()], style_of(prompt) or TURN)
    if isinstance(turns, str):
        return prompt
    notes["prompt written as a transcript, read as turns"] += 1
    return tuple(turns)


def parse_transcript(row: Row, notes: Notes) -> Parsed:
    """One transcript: a Demonstration of its last answer, or a Prompt where the human has the last word."""
    turns = read_transcript(string(row, "text|chosen"), notes)
    if isinstance(turns, str):
        return turns
    if turns[-1]["role"] == "user":
        return Prompt(tuple(turns))
    return Demonstration(tuple(turns[:-1]), turns[-1]["content"])
