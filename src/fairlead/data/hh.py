"""Parses Anthropic's HH transcripts into a prompt and two responses. Knows nothing of templates.

A turn begins at ``Human:`` or ``Assistant:`` after a blank line (or at the very start) and nowhere
else. The crowd's transcripts hold answers such as ``Assistant: Human: OK, I understand``; a marker
inside a turn stays part of its text, because cutting there would put words into the other speaker's
mouth. An answer that itself holds a blank line and a marker cannot be told from a turn and is read
as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fairlead.data.sources import Counts, clip, read_rows
from fairlead.errors import DataError

if TYPE_CHECKING:
    from fairlead.types import Message

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
HASH_TURN = re.compile(r"###\s?(Human|Assistant):")
"""LMFlow's form, and Guanaco's: the marker begins a turn wherever it stands."""
MARKER = re.compile(r"\b(?:Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


class Pair(NamedTuple):
    """Turns up to the last answer, and the two answers."""

    prompt: list[Message]
    chosen: str
    rejected: str


def split_turns(transcript: str, marker: re.Pattern[str] = TURN) -> list[Message] | str:
    """The turns of a transcript, whoever has the last word and whether or not it is empty, or why it has none."""
    before, *pieces = marker.split(transcript.replace("\r\n", "\n"))
    if not pieces:
        return "no turn markers"
    turns: list[Message] = [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    roles = [turn["role"] for turn in turns]
    if before.strip():
        return "text before the first turn"
    if any(role == following for role, following in pairwise(roles)):
        return "two turns of the same role running"
    if roles[0] != "user":
        return "does not begin with a human turn"
    return turns if all(turn["content"] for turn in turns[:-1]) else "empty turn in the prompt"


def parse_turns(transcript: str) -> list[Message] | str:
    """The turns of a transcript that runs from a human turn to an answer, or why it does not."""
    turns = split_turns(transcript)
    if isinstance(turns, str):
        return turns
    if turns[-1]["role"] != "assistant":
        return "does not end in an assistant turn"
    return turns if turns[-1]["content"] else "empty answer"


def parse_pair(chosen: str, rejected: str) -> Pair | str:
    """Both transcripts as a pair, or why they are none. Split at turns, not at characters."""
    chosen_turns, rejected_turns = parse_turns(chosen), parse_turns(rejected)
    if isinstance(chosen_turns, str):
        return chosen_turns
    if isinstance(rejected_turns, str):
        return rejected_turns
    if chosen_turns[:-1] != rejected_turns[:-1]:
        return "prompts differ"
    if chosen_turns == rejected_turns:
        return "chosen equal to rejected"
    return Pair(chosen_turns[:-1], chosen_turns[-1]["content"], rejected_turns[-1]["content"])


def read_pairs(paths: Iterable[Path], counts: Counts) -> Iterator[Pair]:
    """The usable pairs of HH files. Raises DataError for a row without both transcripts."""
    seen: set[str] = set()
    for row in (row for path in paths for row in read_rows(path)):
        counts.read += 1
        for name in ("chosen", "rejected"):
            if not isinstance(row.data.get(name), str):
                raise DataError(
                    f"{row.place}: {name} must be a transcript, got {clip(row.data.get(name))}",
                    'an HH row is {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", ...}',
                )
        pair = parse_pair(row.data["chosen"], row.data["rejected"])
        identity = json.dumps(pair)
        if isinstance(pair, str) or identity in seen:
            counts.dropped[pair if isinstance(pair, str) else "duplicate pair"] += 1
            continue
        seen.add(identity)
        counts.kept += 1
        texts = (*(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected)
        counts.notes["marker inside a turn"] += any(MARKER.search(text) is not None for text in texts)
        yield pair


def transcript(prompt: Sequence[Message], response: str) -> str:
    """The conversation as HH writes it, without the leading blank line."""
    turns = [f"{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in prompt]
    return "\n\n".join([*turns, f"Assistant: {response}"])
