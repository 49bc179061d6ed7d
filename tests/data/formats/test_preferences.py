"""Pairs, judgements and rankings."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fairlead.data.formats import recognise
from fairlead.data.records import load_records
from fairlead.data.sources import Row
from fairlead.errors import DataError
from fairlead.types import Message, Preference, Ranking


def parse(row: dict[str, Any], notes: Counter[str] | None = None) -> Any:
    return recognise(Row(row, "a.jsonl:7")).parse(Row(row, "a.jsonl:7"), notes)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}  # type: ignore[typeddict-item]


SYSTEM: Message = {"role": "system", "content": "s"}
GPT = {"from": "gpt", "value": "c"}


@pytest.mark.parametrize(
    ("row", "format", "pair"),
    [
        ({"prompt": "q", "chosen": "c", "rejected": "r"}, "preference", Preference("q", "c", "r")),
        ({"question": "q", "chosen": "c", "rejected": "r", "system": "s"}, "preference",
         Preference((SYSTEM, user("q")), "c", "r")),
        ({"query": "q", "positive": "c", "negative": "r"}, "preference", Preference("q", "c", "r")),
        ({"prompt": [user("q")], "chosen": [assistant("c")], "rejected": [assistant("r")]}, "preference",
         Preference((user("q"),), "c", "r")),
        # UltraFeedback as the hub has it: the prompt again in both conversations, and scores
        ({"prompt": "q", "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")],
          "messages": [user("q"), assistant("c")], "score_chosen": 8.5, "score_rejected": 6.0}, "preference",
         Preference("q", "c", "r", 2.5)),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "metadata": {"score_chosen": 5, "score_rejected": 4}},
         "preference", Preference("q", "c", "r", 1.0)),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "margin": 3, "score_chosen": 5, "score_rejected": 4},
         "preference", Preference("q", "c", "r", 3.0)),
        # the conversations hold more than the prompt, or go on from it
        ({"prompt": "q", "chosen": [SYSTEM, user("q"), assistant("c")],
          "rejected": [SYSTEM, user("q"), assistant("r")]}, "preference", Preference((SYSTEM, user("q")), "c", "r")),
        ({"prompt": "q", "chosen": [assistant("a"), user("b"), assistant("c")],
          "rejected": [assistant("a"), user("b"), assistant("r")]}, "preference",
         Preference((user("q"), assistant("a"), user("b")), "c", "r")),
        ({"instruction": "i", "input": "x", "output": "o", "chosen": "c", "rejected": "r"}, "alpaca-preference",
         Preference("i\n\nx", "c", "r")),
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": GPT,
          "rejected": {"from": "gpt", "value": "r"}}, "conversation-preference", Preference((user("q"),), "c", "r")),
        ({"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}, "implicit-preference",
         Preference((user("q"),), "c", "r")),
        ({"chosen_messages": [SYSTEM, user("q"), assistant("c")],
          "rejected_messages": [SYSTEM, user("q"), assistant("r")]}, "implicit-preference",
         Preference((SYSTEM, user("q")), "c", "r")),
        # LMFlow's paired_conversation
        ({"chosen": {"conversation_id": 1, "system": "s", "messages": [user("q"), assistant("c")]},
          "rejected": {"conversation_id": 2, "system": "s", "messages": [user("q"), assistant("r")]}},
         "implicit-preference", Preference((SYSTEM, user("q")), "c", "r")),
        ({"question": "q", "response_j": "c", "response_k": "r", "qid": 1}, "stack-exchange-paired",
         Preference("q", "c", "r")),
    ],
)  # fmt: skip
def test_pairs_come_in_many_forms(row: dict[str, Any], format: str, pair: Preference) -> None:
    assert recognise(Row(row, "x")).name == format
    assert parse(row) == pair


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [user("q"), assistant("c")], "rejected": [user("p"), assistant("r")]}, "prompts differ"),
        ({"chosen": [user("q"), assistant("a"), user("b"), assistant("c")], "rejected": [user("q"), assistant("r")]},
         "prompts differ"),
        ({"prompt": "q", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
         "prompts differ"),
        ({"chosen": [assistant("c")], "rejected": [assistant("r")]}, "nothing before the answer"),
        ({"prompt": "q", "chosen": [assistant("", tool_calls=[{"function": {"name": "f"}}])],
          "rejected": [assistant("r")]}, "a tool call is compared"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_dropped_for_a_reason(row: dict[str, Any], reason: str) -> None:
    assert parse(row) == reason


def test_the_reasoning_of_a_compared_answer_is_left_out_and_noted() -> None:
    notes = Counter[str]()
    row = {"prompt": "q", "chosen": [assistant("c", reasoning_content="hm")], "rejected": [assistant("r")]}
    assert parse(row, notes) == Preference("q", "c", "r")
    assert notes == {"reasoning of a compared answer left out": 1}


@pytest.mark.parametrize("score", ["5", True, float("nan")])
def test_a_score_that_is_no_number_is_an_error(score: Any) -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl:7: score_chosen must be a number"):
        parse({"prompt": "q", "chosen": "c", "rejected": "r", "score_chosen": score, "score_rejected": 1})


# --- judgements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "judged"),
    [
        (1, Preference("i", "one", "two", 1.0)),
        (2, Preference("i", "two", "one", 1.0)),
        (2.0, Preference("i", "two", "one", 1.0)),
        (1.25, Preference("i", "one", "two", 0.5)),
        (1.75, Preference("i", "two", "one", 0.5)),
        (0, "tie"),
        (1.5, "tie"),
        (None, "not judged"),
    ],
)
def test_alpaca_eval_says_which_output_is_better_and_how_surely(preference: Any, judged: Any) -> None:
    row = {"instruction": "i", "output_1": "one", "output_2": "two", "preference": preference, "annotator": "gpt4"}
    assert parse(row) == judged


@pytest.mark.parametrize("preference", [3, -1, 0.5, "1", True])
def test_a_judgement_out_of_its_range_is_an_error(preference: Any) -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl:7: preference must be"):
        parse({"instruction": "i", "output_1": "one", "output_2": "two", "preference": preference})


# --- rankings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ranking"),
    [
        ({"prompt": "q", "responses": ["a", "b"]}, Ranking("q", ("a", "b"))),
        ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]},
         Ranking("q", ("b", "c", "a"), (3.0, 2.0, 1.0))),
        ({"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]},
         Ranking("q", ("b", "a", "c"), (-1.0, -2.0, -2.0))),
        ({"prompt": "q", "responses": ["a", "b"], "scores": None}, Ranking("q", ("a", "b"))),
        # UltraFeedback as first published
        ({"instruction": "i", "models": ["x", "y"],
          "completions": [{"response": "a", "overall_score": 6.5}, {"response": "b", "overall_score": 8.0}]},
         Ranking("i", ("b", "a"), (8.0, 6.5))),
        # LMFlow's text_to_scored_textlist
        ({"input": "q", "output": [{"score": 0.5, "text": "a"}, {"score": 1.5, "text": "b"}]},
         Ranking("q", ("b", "a"), (1.5, 0.5))),
        ({"prompt": "q", "responses": ["a"]}, "fewer than two answers"),
    ],
)  # fmt: skip
def test_a_ranking_stands_best_first(row: dict[str, Any], ranking: Any) -> None:
    assert recognise(Row(row, "x")).name == "ranking"
    assert parse(row) == ranking


def test_answers_that_are_empty_or_without_a_score_are_left_out_of_a_ranking() -> None:
    notes = Counter[str]()
    row = {"prompt": "q", "responses": ["a", " ", "b", "c"], "scores": [1, 5, None, 2]}
    assert parse(row, notes) == Ranking("q", ("c", "a"), (2.0, 1.0))
    assert notes == {
        "empty answer of a ranking left out": 1,
        "answer of a ranking without a score left out": 1,
    }


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"scores": [1]}, "scores must be a list of 2 numbers, one for each of responses"),
        ({"scores": ["1", 2]}, "scores must be a number, got '1'"),
        ({"responses": ["a", 3]}, "responses must be a list of texts"),
    ],
)
def test_a_wrong_ranking_is_an_error_with_its_place(more: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse({"prompt": "q", "responses": ["a", "b"], **more})
    assert str(caught.value).startswith(f"a.jsonl:7: {error}")


def test_lmflows_pairs_for_a_reward_model_are_read_without_a_type(tmp_path: Path) -> None:
    """Its own file: an object of instances, prompt and answer in one text on both sides."""
    asked = "###Human: Is it safe?###Assistant:"
    rows = [{"positive": f"{asked} Yes, it is.", "negative": f"{asked} No."}]
    (tmp_path / "pairs.json").write_text(json.dumps({"instances": rows}), "utf-8")
    records, _ = load_records(str(tmp_path / "pairs.json"), Preference)
    (record,) = records
    assert (record.chosen, record.rejected) == ("Yes, it is.", "No.")
    assert [(turn["role"], turn["content"]) for turn in record.prompt] == [("user", "Is it safe?")]
