"""Reads what answers are judged by, one score an attribute: HelpSteer's columns, UltraFeedback's annotations, or a
mapping of our own. Knows no order of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fairlead.data.formats.base import Data, Notes, Parsed, is_list_of, number, string, wrong
from fairlead.data.formats.demonstrations import PROMPTS, read_conversation
from fairlead.data.sources import Row
from fairlead.types import Ranking

Attributes = dict[str, tuple[float | None, ...]]

ANSWERED = "response|completion|answer|output"
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""Columns of HelpSteer and HelpSteer2 (Wang et al. 2023, 2024), 0 to 4."""
_UNKNOWN = ("n/a", "na", "none", "")


def is_rated(data: Data) -> bool:
    """One answer with a mapping of scores, or HelpSteer's columns."""
    if "attributes" in data:
        return isinstance(data["attributes"], Mapping)
    return sum(isinstance(data.get(name), int | float) for name in HELPSTEER) > 1


def parse_rated(row: Row, notes: Notes) -> Parsed:
    """One answer and its scores; the score over all is their mean."""
    given = row.data.get("attributes") or {name: row.data[name] for name in HELPSTEER if name in row.data}
    attributes = {name: (_score(row, f"attributes.{name}", value),) for name, value in given.items()}
    score = mean_scores(attributes)[0] if attributes else None
    if score is None:
        return "no score of an attribute"
    return Ranking(read_conversation(row, PROMPTS, notes), (string(row, ANSWERED),), (score,), attributes)


def attributes_of(row: Row, answers: Sequence[Any]) -> Attributes:
    """Of a list of answers, by attribute, one score each: of the column ``attributes``, {name: [scores]}, or in each
    answer of ``attributes``, {name: score}, or ``annotations``, {name: {Rating: score}}."""
    column = row.data.get("attributes")
    if isinstance(column, Mapping) and any(isinstance(scores, list | tuple) for scores in column.values()):
        for name, scores in column.items():
            if not isinstance(scores, list | tuple) or len(scores) != len(answers):
                raise wrong(row, f"attributes.{name}", f"a list of {len(answers)} numbers, one for each answer", scores)
        return {name: tuple(_score(row, f"attributes.{name}", s) for s in scores) for name, scores in column.items()}
    if not is_list_of(answers, Mapping):
        return {}
    found = [_of_answer(row, answer) for answer in answers]
    names = dict.fromkeys(name for each in found for name in each)
    return {name: tuple(each.get(name) for each in found) for name in names}


def mean_scores(attributes: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """Of each answer, over the attributes it has a score of; none where it has none."""
    known = [[score for score in scores if score is not None] for scores in zip(*attributes.values(), strict=True)]
    return [sum(scores) / len(scores) if scores else None for scores in known]


def _of_answer(row: Row, answer: Mapping[str, Any]) -> dict[str, float | None]:
    given, told = answer.get("attributes"), answer.get("annotations")
    if not isinstance(given, Mapping):
        told = told if isinstance(told, Mapping) else {}
        given = {name: v["Rating"] for name, v in told.items() if isinstance(v, Mapping) and "Rating" in v}
    return {name: _score(row, f"attributes.{name}", value) for name, value in cast(Mapping[str, Any], given).items()}


def _score(row: Row, name: str, value: Any) -> float | None:
    """A number, also as text; none for what was not judged."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNKNOWN):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong(row, name, "a number", value) from None
    return number(row, name, value)
