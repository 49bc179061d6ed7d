"""The formats in which data sets are published: one table, and the rule that recognises a row by its fields. Knows
neither files nor what the records are wanted for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache

from fairlead.data.formats.attributes import ANSWERED, is_rated, parse_rated
from fairlead.data.formats.base import Format, Notes, Parsed, RecordType, first, is_list_of
from fairlead.data.formats.demonstrations import (
    PROMPTS,
    demonstration,
    has_label,
    is_answered,
    is_graded,
    parse_graded,
    parse_labelled,
    parse_prompt,
    parse_questions,
    parse_seed_task,
    several,
)
from fairlead.data.formats.preferences import (
    ANSWERS,
    RANKED,
    are_transcripts,
    are_turns,
    is_open,
    is_ranking,
    pair,
    parse_judgement,
    parse_ranking,
    ranked_answers,
)
from fairlead.data.formats.text import is_labelled, parse_sentiment, parse_text
from fairlead.data.formats.transcripts import is_transcript, parse_transcript
from fairlead.data.formats.turns import parse_labelled_messages, parse_messages
from fairlead.data.sources import Row
from fairlead.errors import ConfigError, DataError
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Ranking, Text

__all__ = [
    "FORMATS",
    "REFUSED",
    "Format",
    "Notes",
    "Parsed",
    "RecordType",
    "best_fit",
    "find_format",
    "missing_field",
    "ranked_answers",
    "recognise",
    "unknown",
]

_ASKED = "prompt|question|query|anchor"
_BETTER, _WORSE = "chosen|positive", "rejected|negative"
_GOOD, _BAD = "chosen|chosen_messages", "rejected|rejected_messages"
_TALK = "conversations|messages"
_TOLD = "completion|response|answer"

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "preference",
            "a prompt and two answers, texts or messages, with a margin or scores where it has them",
            Preference,
            (_ASKED, _BETTER, _WORSE),
            pair(_BETTER, _WORSE, _ASKED),
        ),
        Format(
            "alpaca-preference",
            "an instruction, perhaps an input, and two answers",
            Preference,
            ("instruction", "chosen", "rejected"),
            pair("chosen", "rejected", "instruction"),
        ),
        Format(
            "conversation-preference",
            "a conversation and two turns that may follow it, as LLaMA-Factory writes them",
            Preference,
            (_TALK, "chosen", "rejected"),
            pair("chosen", "rejected", _TALK),
            is_open,
        ),
        Format(
            "implicit-preference",
            "two conversations; the turns they both begin with are the prompt",
            Preference,
            (_GOOD, _BAD),
            pair(_GOOD, _BAD),
            are_turns,
            prompt=(_GOOD, _BAD),
        ),
        Format(
            "hh",
            "two transcripts, `Human:` and `Assistant:` after blank lines or `###`",
            Preference,
            (_BETTER, _WORSE),
            pair(_BETTER, _WORSE),
            are_transcripts,
            prompt=(_BETTER, _WORSE),
        ),
        Format(
            "stack-exchange-paired",
            "a question, the better answer and the worse",
            Preference,
            ("question", "response_j", "response_k"),
            pair("response_j", "response_k", "question"),
        ),
        Format(
            "alpaca-eval",
            "an instruction, two outputs and which of them a judge preferred",
            Preference,
            ("instruction", "output_1", "output_2"),
            parse_judgement,
        ),
        Format(
            "ranking",
            "a prompt and several answers with scores or ranks, or best first",
            Ranking,
            (RANKED, ANSWERS),
            parse_ranking,
            is_ranking,
        ),
        Format(
            "kto",
            "a prompt, an answer and whether it is good",
            Labelled,
            (PROMPTS, "completion|response|output", "label|kto_tag"),
            parse_labelled,
            has_label,
        ),
        Format(
            "kto-messages",
            "a conversation and whether its last answer is good",
            Labelled,
            (_TALK, "label|kto_tag"),
            parse_labelled_messages,
            has_label,
        ),
        Format(
            "graded-solutions",
            "a question and columns of {solution, is_correct}",
            Labelled,
            ("question",),
            parse_graded,
            lambda data: any(map(is_graded, data.values())),
        ),
        Format(
            "seed-tasks",
            "an instruction and instances of {input, output}, as Self-Instruct writes them",
            Demonstration,
            ("instruction", "instances"),
            parse_seed_task,
        ),
        Format(
            "alpaca",
            "an instruction, perhaps an input, and an output or a list of sampled outputs",
            Demonstration,
            ("instruction", "output|response"),
            several("instruction", "output|response"),
        ),
        Format(
            "messages",
            "a conversation of {role, content}, perhaps with tools",
            Demonstration,
            ("messages",),
            parse_messages,
        ),
        Format(
            "sharegpt",
            "a conversation of {from, value}, perhaps with system and tools",
            Demonstration,
            ("conversations|conversation",),
            parse_messages,
        ),
        Format(
            "prompt-response",
            "a prompt and its answer, texts or messages",
            Demonstration,
            ("prompt|question|query", _TOLD),
            demonstration("prompt|question|query", _TOLD),
            is_answered,
        ),
        Format(
            "input-output",
            "an input and an output or a list of sampled outputs",
            Demonstration,
            ("input", "output"),
            several("input", "output"),
        ),
        Format(
            "rated",
            "a prompt and one answer with scores by attribute, as HelpSteer has them",
            Ranking,
            (PROMPTS, ANSWERED, "attributes|helpfulness"),
            parse_rated,
            is_rated,
        ),
        Format(
            "mt-bench",
            "questions to be asked one after the other",
            Prompt,
            ("turns",),
            parse_questions,
            lambda data: is_list_of(data["turns"], str),
        ),
        Format(
            "transcript",
            "one transcript, `Human:` and `Assistant:` after blank lines or `###`",
            Demonstration,
            ("text|chosen",),
            parse_transcript,
            is_transcript,
        ),
        Format(
            "sentiment",
            "a text and whether it is positive",
            Labelled,
            ("text", "label"),
            parse_sentiment,
            is_labelled,
        ),
        Format("text", "plain text", Text, ("text",), parse_text),
        Format("prompt", "a prompt alone, text or messages", Prompt, (PROMPTS,), parse_prompt),
    )
}
"""Name -> format, in the order of precedence: a row is of the first that fits."""

REFUSED = {
    "float_only": "its rows are numbers; there is no text in them to learn from",
    "image_text": "its rows hold images; Fairlead reads text only",
}
"""LMFlow's types that are not read, and why."""


def recognise(row: Row) -> Format:
    """The first format of the table that fits the row's fields. Raises DataError, naming the row, where none does."""
    if (format := best_fit(row)) is None:
        raise unknown(row)
    return format


def best_fit(
    row: Row, kinds: Collection[RecordType] | None = None, among: Collection[Format] | None = None
) -> Format | None:
    """Of the formats that fit the row, the first whose record is one of ``kinds``; else the first; else none."""
    if row.kind in REFUSED:
        raise DataError(f"{row.place}: LMFlow's type {row.kind} is not read: {REFUSED[row.kind]}")
    fallback = None
    for format in _having(frozenset(name for name, value in row.data.items() if value is not None)):
        if (among is None or format in among) and format.has_shape(row.data):
            if kinds is None or format.record in kinds:
                return format
            fallback = fallback or format
    return fallback


@lru_cache(maxsize=1024)
def _having(names: frozenset[str]) -> tuple[Format, ...]:
    """The formats whose fields are all among ``names``: the rows of a file mostly have the same ones."""
    return tuple(format for format in FORMATS.values() if all(names & {*f.split("|")} for f in format.fields))


def find_format(name: str) -> Format:
    """The format of that name. Raises ConfigError for an unknown one."""
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        raise ConfigError(
            f"data.format={name}: there is no such format",
            hint=f"did you mean {near[0]}?" if near else f"there are: auto, {', '.join(FORMATS)}",
        )
    return FORMATS[name]


def missing_field(row: Row, formats: Collection[Format]) -> str | None:
    """The field that is null in the row, and without which it is of none of ``formats``; none where that is not why."""
    for format in formats:
        absent = [names for names in format.fields if row.data.get(first(row.data, names)) is None]
        nulls = [name for names in absent for name in names.split("|") if name in row.data]
        if absent and len(nulls) == len(absent):
            return nulls[0]
    return None


def unknown(row: Row, wanted: Format | None = None) -> DataError:
    """The error for a row that is of no format, or not of the wanted one."""
    fields = ", ".join(row.data) or "none"
    if wanted is not None:
        needed = " and ".join(names.replace("|", " or ") for names in wanted.fields)
        return DataError(
            f"{row.place}: the row is not of the format {wanted.name}: it has {fields}",
            f"{wanted.name} is {wanted.about}: {needed}",
        )
    values = list(row.data.values())
    if values and all(isinstance(value, Mapping) and value.keys() & _DESCRIBES for value in values):
        return DataError(
            f"{row.place}: this is LLaMA-Factory's description of data files and no data",
            f"give one of the files it describes: {', '.join(list(row.data)[:5])}",
        )
    return DataError(
        f"{row.place}: no known format has these fields: {fields}",
        "name the columns, as in data.columns={prompt: COLUMN, response: COLUMN}; docs/reference/data-formats.md lists "
        "the formats",
    )


_DESCRIBES = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
