"""Reads pairs and rankings: which of several answers is better, and by how much where it is said. Knows no kinds of
prompt beyond what the readers of turns and demonstrations take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fairlead.data.formats.attributes import attributes_of, mean_scores
from fairlead.data.formats.base import Data, Notes, Parsed, Parser, first, number, string, wrong
from fairlead.data.formats.demonstrations import PROMPTS, read_conversation
from fairlead.data.formats.transcripts import read_transcript, style_of
from fairlead.data.formats.turns import answer_turns, as_turns, conversation, plain_answer, read_tools
from fairlead.data.sources import Row
from fairlead.errors import DataError
from fairlead.types import Conversation, Message, Preference, Ranking

RANKED = f"{PROMPTS}|input"
ANSWERS = "responses|completions|answers|output"

_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_ITEM_TEXT = "response|text|content|output|answer"
_CUT = ([True, False], [False, True], [False, False])
"""How sampled pairs of which a side was cut at its limit say so."""
_ITEM_SCORE = "score|overall_score|rating"


def pair(chosen: str, rejected: str, prompt: str | None = None) -> Parser:
    """A parser of two responses, by the names of their fields. Without ``prompt`` the turns both begin with are it."""

    def parse(row: Row, notes: Notes) -> Parsed:
        names = first(row.data, chosen), first(row.data, rejected)
        given = None if prompt is None else _prompt(row, prompt, notes)
        if given is None and any(isinstance(row.data[name], str) for name in names):
            better, worse = (read_transcript(string(row, name), notes) for name in names)
        else:
            better, worse = (answer_turns(row, name, notes) for name in names)
        for side in (better, worse):
            if isinstance(side, str):
                return side
            if side[-1]["role"] != "assistant":
                return "does not end in an assistant turn"
        return _preference(row, given, cast(list[Message], better), cast(list[Message], worse), notes)

    return parse


def _prompt(row: Row, names: str, notes: Notes) -> Conversation:
    name = first(row.data, names)
    if name in ("messages", "conversations"):
        return tuple(conversation(row, name, notes))
    return read_conversation(row, name, notes)


def _preference(
    row: Row, prompt: Conversation | None, chosen: list[Message], rejected: list[Message], notes: Notes
) -> Parsed:
    lead = chosen[:-1]
    if lead != rejected[:-1]:
        return "prompts differ"
    if prompt is None:
        prompt = tuple(lead)
    elif lead and lead != list(as_turns(prompt)):
        turns = list(as_turns(prompt))
        if lead[0]["role"] == "assistant":  # both sides go on from the prompt, alike at first
            prompt = (*turns, *lead)
        elif turns and turns[-1]["content"] in [turn["content"] for turn in lead]:  # both sides repeat it
            prompt = tuple(lead)
        else:
            return "prompts differ"
    if not isinstance(prompt, str) and not prompt:
        return "nothing before the answer"
    better, worse = plain_answer(chosen[-1], notes), plain_answer(rejected[-1], notes)
    if better is None or worse is None:
        return "a tool call is compared"
    finished = row.data.get("finished")
    ended = (finished[0], finished[1]) if finished in _CUT else (True, True)
    return Preference(prompt, better, worse, _margin(row), read_tools(row), ended)


def _margin(row: Row) -> float | None:
    if "margin" in row.data:
        return number(row, "margin", row.data["margin"])
    metadata = row.data.get("metadata")
    for data in (row.data, metadata if isinstance(metadata, Mapping) else {}):
        for better, worse in _SCORES:
            if data.get(better) is not None and data.get(worse) is not None:
                return number(row, better, data[better]) - number(row, worse, data[worse])
    return None


def parse_judgement(row: Row, notes: Notes) -> Parsed:
    """AlpacaEval: 1 prefers the first output, 2 the second, what lies between leans; 0 and 1.5 are ties."""
    preference = row.data.get("preference")
    if preference is None:
        return "not judged"
    preference = number(row, "preference", preference)
    if preference in (0, 1.5):
        return "tie"
    if not 1 <= preference <= 2:
        raise DataError(f"{row.place}: preference must be 0 or between 1 and 2, got {preference!r}")
    outputs = string(row, "output_1"), string(row, "output_2")
    chosen, rejected = outputs if preference < 1.5 else outputs[::-1]
    return Preference(read_conversation(row, "instruction", notes), chosen, rejected, abs(2 * preference - 3))


def is_ranking(data: Data) -> bool:
    """Answers in a list; without scores or ranks they are ranked only if they are called responses."""
    name = first(data, ANSWERS)
    items = data.get(name)
    if not isinstance(items, list | tuple) or not items:
        return False
    if isinstance(items[0], Mapping):
        return items[0].keys() & {*_ITEM_TEXT.split("|")} != set()
    return isinstance(items[0], str) and (name == "responses" or "scores" in data or "ranks" in data)


def parse_ranking(row: Row, notes: Notes) -> Parsed:
    """Answers with scores, in any order, with ranks (1 is best), or best first; scores by attribute beside them, whose
    mean orders what has no score of its own."""
    prompt = read_conversation(row, RANKED, notes)
    name = first(row.data, ANSWERS)
    answers = cast(list[Any], row.data[name])
    key = next((key for key in ("scores", "ranks") if key in row.data), None)
    if key is not None:
        scores = row.data[key]
        if not isinstance(scores, list) or len(scores) != len(answers):
            raise wrong(row, key, f"a list of {len(answers)} numbers, one for each of {name}", scores)
    else:
        scores = [item.get(first(item, _ITEM_SCORE)) if isinstance(item, Mapping) else None for item in answers]
    texts, attributes = ranked_answers(row), attributes_of(row, answers)
    if attributes and all(score is None for score in scores):
        scores = mean_scores(attributes)
        notes["ranked by the mean of its attributes"] += 1
    is_scored = any(score is not None for score in scores)
    ranked: list[tuple[float, int]] = []
    for index, (text, score) in enumerate(zip(texts, scores, strict=True)):
        if not text.strip():
            notes["empty answer of a ranking left out"] += 1
        elif is_scored and score is None:
            notes["answer of a ranking without a score left out"] += 1
        else:
            value = number(row, key or "score", score) if is_scored else 0.0
            ranked.append((-value if key == "ranks" else value, index))
    if len(ranked) < 2:
        return "fewer than two answers"
    ranked.sort(key=lambda item: -item[0])  # stable: equal scores stay in the row's order
    return Ranking(
        prompt,
        tuple(texts[index] for _, index in ranked),
        tuple(score for score, _ in ranked) if is_scored else None,
        {name: tuple(given[index] for _, index in ranked) for name, given in attributes.items()},
    )


def ranked_answers(row: Row) -> list[str]:
    """Every answer of a ranking, in the row's order."""
    name = first(row.data, ANSWERS)
    return [_item_text(row, name, item) for item in row.data[name]]


def _item_text(row: Row, name: str, item: Any) -> str:
    value = item.get(first(item, _ITEM_TEXT)) if isinstance(item, Mapping) else item
    if not isinstance(value, str):
        raise wrong(row, name, "a list of texts, or of {text, score}", item)
    return value


def are_transcripts(data: Data) -> bool:
    return any(style_of(data.get(name)) for name in ("chosen", "rejected", "positive", "negative"))


def are_turns(data: Data) -> bool:
    values = [data.get(name) for name in ("chosen", "rejected", "chosen_messages", "rejected_messages")]
    return sum(isinstance(value, list | Mapping) for value in values) >= 2


def is_open(data: Data) -> bool:
    """A conversation that waits for its answer, beside two answers: not the whole of one of them."""
    turns = data[first(data, "conversations|messages")]
    last = turns[-1] if isinstance(turns, list) and turns else None
    speaker = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
    return speaker not in ("assistant", "gpt")
