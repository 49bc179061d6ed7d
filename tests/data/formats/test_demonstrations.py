"""Prompts with answers, with several, with labels, and alone."""

from collections import Counter
from typing import Any

import pytest

from fairlead.data.formats import recognise
from fairlead.data.sources import Row
from fairlead.errors import DataError
from fairlead.types import Demonstration, Labelled, Message, Prompt, Text


def parse(row: dict[str, Any], notes: Counter[str] | None = None) -> Any:
    return recognise(Row(row, "a.jsonl:7")).parse(Row(row, "a.jsonl:7"), notes)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


SYSTEM: Message = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "format", "record"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt-response", Demonstration("q", "a")),
        ({"query": "q", "response": "a"}, "prompt-response", Demonstration("q", "a")),
        ({"question": "q", "answer": "a #### 3"}, "prompt-response", Demonstration("q", "a #### 3")),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "prompt-response",
         Demonstration((SYSTEM, user("q")), "a")),
        ({"prompt": [user("q")], "completion": [assistant("a"), user("b"), assistant("c")]}, "prompt-response",
         Demonstration((user("q"), assistant("a"), user("b")), "c")),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", Demonstration("i", "o")),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", Demonstration("i\n\nx", "o")),
        ({"instruction": "i", "output": "o"}, "alpaca", Demonstration("i", "o")),
        ({"instruction": "i", "context": "x", "response": "o", "category": "z"}, "alpaca",
         Demonstration("i\n\nx", "o")),
        ({"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]}, "alpaca",
         Demonstration((SYSTEM, user("a"), assistant("b"), user("i\n\nx")), "o")),
        ({"instruction": "i", "input": "", "output": ["1", "2"]}, "alpaca",
         [Demonstration("i", "1"), Demonstration("i", "2")]),
        ({"instruction": "i", "instances": [{"input": "x", "output": "1"}, {"input": "", "output": "2"}]},
         "seed-tasks", [Demonstration("i\n\nx", "1"), Demonstration("i", "2")]),
        ({"input": "q", "output": "a"}, "input-output", Demonstration("q", "a")),
        ({"input": "q", "output": ["a", "b"]}, "input-output", [Demonstration("q", "a"), Demonstration("q", "b")]),
        ({"turns": ["a", "b", "c"], "category": "x"}, "mt-bench", Prompt("a", {"turns": ["b", "c"]})),
        ({"prompt": "q", "completion": "a", "label": True}, "kto", Labelled("q", "a", True)),
        ({"instruction": "i", "input": "x", "output": "a", "kto_tag": False}, "kto", Labelled("i\n\nx", "a", False)),
        ({"prompt": [user("q")], "completion": [assistant("a")], "label": "false"}, "kto",
         Labelled((user("q"),), "a", False)),
        ({"question": "q", "ground_truth": "g", "6b": {"solution": "a", "is_correct": True},
          "175b": {"solution": "b", "is_correct": False}}, "graded-solutions",
         [Labelled("q", "a", True), Labelled("q", "b", False)]),
        ({"prompt": "q", "answer": 42}, "prompt", Prompt("q")),
        ({"instruction": "i", "input": "x"}, "prompt", Prompt("i\n\nx")),
        ({"prompt": [SYSTEM, user("q")]}, "prompt", Prompt((SYSTEM, user("q")))),
        ({"text": "t", "label": 1}, "sentiment", Labelled("", "t", True)),
        ({"text": "t", "label": "neg"}, "sentiment", Labelled("", "t", False)),
        ({"text": "t", "label": -1}, "sentiment", Text("t")),
        ({"text": "t", "label": None}, "text", Text("t")),
        ({"text": "t", "label": 3}, "text", Text("t")),
        ({"text": "t", "label": "sports"}, "text", Text("t")),
    ],
)  # fmt: skip
def test_rows_are_recognised_by_their_fields(row: dict[str, Any], format: str, record: Any) -> None:
    assert recognise(Row(row, "x")).name == format
    assert parse(row) == record


@pytest.mark.parametrize(
    "said",
    ["noinput", "<noinput>", "No input", "No input.", "<no input>.", "Noinput", "<noinput", "\\<noinput\\>",
     "`<noinput>`", "{\\noinput}", "< noinput >", "<none>"],
)  # fmt: skip
def test_an_input_that_says_there_is_none_is_none(said: str) -> None:
    notes = Counter[str]()
    assert parse({"instruction": "i", "input": said, "output": "o"}, notes) == Demonstration("i", "o")
    assert notes == {"input that says there is none, left out": 1}


@pytest.mark.parametrize("said", ["None", "No input was given to the program.", "no", "0", "N/A"])
def test_other_inputs_stay(said: str) -> None:
    assert parse({"instruction": "i", "input": said, "output": "o"}) == Demonstration(f"i\n\n{said}", "o")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"instruction": "i", "output": 3}, "output must be text, got int 3"),
        ({"instruction": "i", "output": ["a", 3]}, "output must be a list of texts, got list ['a', 3]"),
        ({"instruction": ["i"], "output": "o"}, "instruction must be text, got list ['i']"),
        ({"instruction": "i", "input": 3, "output": "o"}, "input must be text, got int 3"),
        ({"instruction": "i", "output": "o", "history": ["a"]}, "history must be a list of [question, answer]"),
        ({"instruction": "i", "instances": ["a"]}, "instances must be a list of {input, output}"),
        ({"instruction": "i", "instances": [{"input": ""}]}, "output must be text, got NoneType None"),
        ({"prompt": [user("q"), assistant("a")]}, "the prompt ends in an assistant turn"),
        ({"text": 3}, "text must be text, got int 3"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_with_its_place(row: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(row)
    assert str(caught.value).startswith(f"a.jsonl:7: {error}")
