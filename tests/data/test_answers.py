"""Which answers a row holds, in what order, and what is said of rows that hold none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairlead.data.answers import Answers, read_answers
from fairlead.errors import ConfigError, DataError


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> list[tuple[str | None, Any]]:
    """(format, answers or the reason why there are none) of each row."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [(format and format.name, found) for _, format, found in read_answers(str(path), **options)]


def texts(found: Answers) -> list[Any]:
    return [answer and answer[1] for answer in found.answers]


SEVERAL = ("scores",)
RATED = [{"text": "b", "score": 1}, {"text": "c", "score": 0}]


@pytest.mark.parametrize(
    ("row", "columns", "wanted"),
    [
        ({"prompt": "p", "response": "a"}, ("score",), ["a"]),
        ({"prompt": "p", "completion": "a", "label": False}, ("score",), ["a"]),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
            ("score",),
            ["a"],
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("chosen_score", "rejected_score"), ["a", "b"]),
        ({"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}, None, ["a", "b"]),
        ({"instruction": "p", "output_1": "a", "output_2": "b", "preference": 2}, None, ["b", "a"]),
        # Sorted by their scores they would be b, c, a; the blank one and the one without a score would be left out.
        ({"prompt": "p", "responses": ["a", "b", "", "c"], "scores": [1, 3, 5, 2]}, SEVERAL, ["a", "b", None, "c"]),
        ({"prompt": "p", "completions": [{"text": "a", "score": None}, *RATED]}, SEVERAL, ["a", "b", "c"]),
        ({"instruction": "p", "output": ["a", "", "b"]}, SEVERAL, ["a", None, "b"]),
        ({"question": "p", "x": {"solution": "a", "is_correct": True}, "y": {"solution": "b", "is_correct": False}},
         SEVERAL, ["a", "b"]),
    ],
)  # fmt: skip
def test_the_answers_of_a_row_stand_in_its_order(
    row: dict[str, Any], columns: tuple[str, ...] | None, wanted: list[Any], tmp_path: Path
) -> None:
    [(_, found)] = read(tmp_path, row)
    assert texts(found) == wanted
    assert found.columns == (columns or ("chosen_score", "rejected_score"))
    prompts = [answer[0].prompt for answer in found.answers if answer]
    assert {p if isinstance(p, str) else p[0]["content"] for p in prompts} == {"p"}


def test_tools_and_tool_calls_are_part_of_what_is_judged(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    [(_, found)] = read(tmp_path, {"messages": turns, "tools": [{"name": "f"}]})
    (answer,) = found.answers
    assert answer is not None and answer[1]["tool_calls"] == [call]
    assert answer[0].tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "response": " "}, "empty response"),
        ({"prompt": " ", "response": "a"}, "empty prompt"),
        ({"prompt": "p", "response": None}, "response is null"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty answer"),
        ({"prompt": "p", "responses": ["a"]}, "fewer than two answers"),
        ({"text": "a fine film", "label": 1}, "empty prompt"),
        ({"text": "a film", "label": -1}, "holds text alone"),
        ({"messages": [{"role": "user", "content": "p"}]}, "does not end in an assistant turn"),
    ],
)
def test_a_row_without_an_answer_is_given_with_the_reason(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert read(tmp_path, row, {"prompt": "p", "response": "a"})[0][1] == reason


def test_a_file_of_prompts_or_plain_text_is_refused_with_what_would_serve(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row has prompt, id and is read as prompt .*no answer"):
        read(tmp_path, {"prompt": "p", "response": "a"}, {"prompt": "p", "id": 1})
    with pytest.raises(DataError, match=r"(?s)read as text.*hint: give pairs, rankings, labelled texts, demonst"):
        read(tmp_path, {"text": "plain"})
    with pytest.raises(DataError, match="no known format has these fields: a, b"):
        read(tmp_path, {"a": 1, "b": 2})


def test_columns_and_a_format_may_be_named(tmp_path: Path) -> None:
    row = {"ask": "p", "good": "a", "bad": "b"}
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    [(name, found)] = read(tmp_path, row, columns=columns)
    assert (name, texts(found)) == ("preference", ["a", "b"])
    both = {"prompt": "p", "response": "a", "chosen": "c", "rejected": "r"}
    assert [(name, texts(found)) for name, found in read(tmp_path, both)] == [("preference", ["c", "r"])]
    [(name, found)] = read(tmp_path, both, format="prompt-response")
    assert (name, texts(found)) == ("prompt-response", ["a"])
    with pytest.raises(ConfigError, match="there is no such format"):
        read(tmp_path, both, format="prompt-respons")


def test_a_prepared_folder_is_refused_with_the_names_of_its_files(tmp_path: Path) -> None:
    for name in ("sft.jsonl", "heldout_preference.jsonl"):
        (tmp_path / name).write_text('{"prompt": "p", "response": "a"}\n')
    with pytest.raises(DataError, match=r"name one of its files: heldout_preference.jsonl, sft.jsonl"):
        read_answers(str(tmp_path))
