"""Scores by attribute: of one answer, of several, as HelpSteer and UltraFeedback publish them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fairlead.data.formats import recognise
from fairlead.data.records import load_records, parse_row
from fairlead.data.sources import Row
from fairlead.errors import DataError
from fairlead.types import Demonstration, Preference, Ranking


def parse(row: dict[str, Any], notes: Counter[str] | None = None) -> Any:
    (record,) = parse_row(Row(row, "a.jsonl:7"), Ranking, notes=notes)
    return record


HELPSTEER = {"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 3, "coherence": 4, "verbosity": 1}


def annotated(text: str, helpful: str, honest: str, **more: Any) -> dict[str, Any]:
    """An answer of UltraFeedback as first published."""
    ratings = {"helpfulness": {"Rating": helpful, "Type": ["1"]}, "honesty": {"Rating": honest, "Rationale": "so"}}
    return {"response": text, "annotations": ratings, **more}


@pytest.mark.parametrize(
    ("row", "ranking"),
    [
        (HELPSTEER, Ranking("q", ("a",), (3.0,), {"helpfulness": (4.0,), "correctness": (3.0,), "coherence": (4.0,),
                                                  "verbosity": (1.0,)})),
        ({"instruction": "q", "output": "a", "attributes": {"kind": 2, "right": None}},
         Ranking("q", ("a",), (2.0,), {"kind": (2.0,), "right": (None,)})),
        # The order is that of the scores; attributes go with their answers.
        ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 2],
          "attributes": {"kind": [5, 4, 3], "right": [0, None, 2]}},
         Ranking("q", ("b", "c", "a"), (3.0, 2.0, 1.0), {"kind": (4.0, 3.0, 5.0), "right": (None, 2.0, 0.0)})),
        # Without scores it is that of the mean of what was judged.
        ({"prompt": "q", "responses": ["a", "b"], "attributes": {"kind": [1, 4], "right": [2, None]}},
         Ranking("q", ("b", "a"), (4.0, 1.5), {"kind": (4.0, 1.0), "right": (None, 2.0)})),
        ({"prompt": "q", "completions": [{"text": "a", "attributes": {"kind": 1}},
                                         {"text": "b", "attributes": {"kind": 2, "right": 5}}]},
         Ranking("q", ("b", "a"), (3.5, 1.0), {"kind": (2.0, 1.0), "right": (5.0, None)})),
        ({"instruction": "q", "completions": [annotated("a", "3", "N/A", overall_score=6.5),
                                              annotated("b", "4", "2", overall_score=8.0)]},
         Ranking("q", ("b", "a"), (8.0, 6.5), {"helpfulness": (4.0, 3.0), "honesty": (2.0, None)})),
        # A mapping of something else beside the answers is left alone.
        ({"prompt": "q", "responses": ["a", "b"], "attributes": {"language": "en"}}, Ranking("q", ("a", "b"))),
    ],
)  # fmt: skip
def test_scores_by_attribute_come_in_many_forms(row: dict[str, Any], ranking: Ranking) -> None:
    assert parse(row) == ranking


def test_a_ranking_by_the_mean_of_its_attributes_is_noted() -> None:
    notes = Counter[str]()
    parse({"prompt": "q", "responses": ["a", "b"], "attributes": {"kind": [1, 4]}}, notes)
    assert notes["ranked by the mean of its attributes"] == 1


def test_an_empty_answer_takes_its_scores_along() -> None:
    row = {"prompt": "q", "responses": ["a", " ", "c"], "scores": [1, 5, 2], "attributes": {"kind": [7, 8, 9]}}
    assert parse(row) == Ranking("q", ("c", "a"), (2.0, 1.0), {"kind": (9.0, 7.0)})


def test_columns_of_other_names_are_attributes_where_they_are_said_to_be() -> None:
    rows = [{"ask": "q", "reply": "a", "clarity": 3, "tone": 5, "id": 17}]
    columns = {"prompt": "ask", "response": "reply", "attributes.clear": "clarity", "attributes.tone": "tone"}
    (record,), _ = load_records(rows, Ranking, columns=columns)
    assert record == Ranking("q", ("a",), (4.0,), {"clear": (3.0,), "tone": (5.0,)})
    with pytest.raises(DataError, match=r"no column 'clean', which data\.columns names for attributes\.clear"):
        load_records(rows, Ranking, columns=columns | {"attributes.clear": "clean"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attributes": {"kind": [1]}}, "attributes.kind must be a list of 2 numbers, one for each answer, got list"),
        ({"attributes": {"kind": [1, "good"]}}, "attributes.kind must be a number, got str"),
        ({"attributes": {"kind": [1, True]}}, "attributes.kind must be a number, got True"),
    ],
)
def test_a_score_by_attribute_that_is_no_number_is_an_error_with_its_place(more: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse({"prompt": "q", "responses": ["a", "b"], **more})
    assert str(caught.value).startswith(f"a.jsonl:7: {message}")


def test_a_rated_answer_is_a_demonstration_still_and_no_pair() -> None:
    assert recognise(Row(HELPSTEER, "x")).name == "prompt-response"
    assert parse_row(Row(HELPSTEER, "x"), Demonstration) == [Demonstration("q", "a")]
    assert parse_row(Row(HELPSTEER, "x"), Preference) == ["fewer than two answers"]
    assert parse({**HELPSTEER, "attributes": {"kind": None}}) == "no score of an attribute"
