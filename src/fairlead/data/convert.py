"""A record as another kind, such as a pair's chosen answer as a demonstration. Knows no formats and no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fairlead.data.formats import RecordType
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Ranking, Record, Text

PLURALS: dict[RecordType, str] = {
    Text: "texts",
    Demonstration: "demonstrations",
    Preference: "pairs",
    Ranking: "rankings",
    Labelled: "labelled texts",
    Prompt: "prompts",
}


def _best_and_worst(record: Ranking) -> list[Record] | str:
    scores = record.scores
    if len(record.responses) < 2:
        return "fewer than two answers"
    if scores is not None and scores[0] == scores[-1]:
        return "tie"
    margin = None if scores is None else scores[0] - scores[-1]
    return [Preference(record.prompt, record.responses[0], record.responses[-1], margin)]


def _imitable(record: Labelled) -> list[Record] | str:
    return [Demonstration(record.prompt, record.response)] if record.label else "labelled as bad"


def _text_alone(record: Demonstration | Labelled) -> list[Record] | str:
    if record.prompt or not isinstance(record.response, str):
        return "has a prompt, and is no plain text"
    return [Text(record.response)]


CONVERSIONS: dict[tuple[RecordType, RecordType], tuple[str, Callable[[Any], list[Record] | str]]] = {
    (Ranking, Preference): ("the best answer against the worst", _best_and_worst),
    (Ranking, Demonstration): ("the best answer", lambda r: [Demonstration(r.prompt, r.responses[0])]),
    (Ranking, Prompt): ("the prompt", lambda r: [Prompt(r.prompt, answer=r.responses[0])]),
    (Preference, Ranking): ("two answers", lambda r: [Ranking(r.prompt, (r.chosen, r.rejected))]),
    (Preference, Demonstration): ("the chosen answer", lambda r: [Demonstration(r.prompt, r.chosen, r.tools)]),
    (Preference, Labelled): (
        "the chosen answer as good, the rejected as bad",
        lambda r: [Labelled(r.prompt, r.chosen, True), Labelled(r.prompt, r.rejected, False)],
    ),
    (Preference, Prompt): ("the prompt", lambda r: [Prompt(r.prompt, tools=r.tools, answer=r.chosen)]),
    (Labelled, Demonstration): ("the answers labelled as good", _imitable),
    (Labelled, Prompt): ("the prompt", lambda r: [Prompt(r.prompt, answer=r.response if r.label else None)]),
    (Labelled, Text): ("the text without its label", _text_alone),
    (Demonstration, Prompt): ("the prompt", lambda r: [Prompt(r.prompt, tools=r.tools, answer=r.response)]),
    (Demonstration, Text): ("the answer, where it has no prompt", _text_alone),
}
"""(what a row holds, what is wanted) -> what is taken, and how. What is not here cannot be had."""


def targets_of(held: RecordType) -> tuple[RecordType, ...]:
    """The kinds that can be had from one, itself first."""
    return (held, *(target for source, target in CONVERSIONS if source is held))


def sources_of(wanted: RecordType) -> tuple[RecordType, ...]:
    """The kinds that give the wanted one, itself first."""
    return (wanted, *(held for held, target in CONVERSIONS if target is wanted))


def convert(records: Sequence[Record], wanted: RecordType) -> list[Record | str]:
    """The records as the wanted kind; a reason (str) stands for each that gives none. Equal prompts are one."""
    converted: list[Record | str] = []
    for record in records:
        if type(record) is wanted:
            converted.append(record)
        elif conversion := CONVERSIONS.get((type(record), wanted)):
            found = conversion[1](record)
            converted += [found] if isinstance(found, str) else found
        else:
            converted.append(_LESS.get(type(record), f"holds {PLURALS[type(record)]} alone"))
    if wanted is Prompt:
        converted = [record for index, record in enumerate(converted) if record not in converted[:index]]
    return [record if isinstance(record, str) else unusable(record) or record for record in converted]


_LESS: dict[RecordType, str] = {Prompt: "does not end in an assistant turn", Text: "not labelled"}
"""Why a row that holds less than others of its format is dropped."""


def unusable(record: Record) -> str | None:
    """Why nothing can be learned from a record that was understood; none where something can."""
    match record:
        case Text(text):
            return None if text.strip() else "empty text"
        case Demonstration(_, response):
            text = response if isinstance(response, str) else response["content"]
            calls = not isinstance(response, str) and response.get("tool_calls")
            return None if calls or text.strip() else "empty response"
        case Labelled():
            return None if record.response.strip() else "empty response"
        case Prompt(prompt):
            text = prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)
            return None if text.strip() else "empty prompt"
        case Ranking():
            return None if all(response.strip() for response in record.responses) else "empty answer"
        case Preference():
            return _no_preference(record)


def _no_preference(pair: Preference) -> str | None:
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty answer"
    if pair.chosen.strip() == pair.rejected.strip():
        return "chosen equal to rejected"
    if pair.margin is not None and pair.margin <= 0:
        return "tie" if pair.margin == 0 else "chosen scored below rejected"
    return None
