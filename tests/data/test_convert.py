"""One table turns a record into the kind that is wanted."""

from typing import Any, get_args

import pytest

from fairlead.config import FilterSection
from fairlead.data.convert import PLURALS, convert, sources_of, targets_of, unusable
from fairlead.data.filters import apply_filters
from fairlead.data.formats import RecordType
from fairlead.data.sources import Counts
from fairlead.types import Demonstration, Labelled, Message, Preference, Prompt, Ranking, Record, Text

TOOLS = ({"type": "function", "function": {"name": "f"}},)
PAIR = Preference("q", "good", "bad", 2.0, TOOLS)
CALL: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("record", "wanted", "converted"),
    [
        (PAIR, Preference, [PAIR]),
        (PAIR, Demonstration, [Demonstration("q", "good", TOOLS)]),
        (PAIR, Prompt, [Prompt("q", tools=TOOLS)]),
        (PAIR, Labelled, [Labelled("q", "good", True), Labelled("q", "bad", False)]),
        (PAIR, Ranking, [Ranking("q", ("good", "bad"))]),
        (Ranking("q", ("a", "b", "c")), Preference, [Preference("q", "a", "c")]),
        (Ranking("q", ("a", "b", "c"), (5.0, 5.0, 1.5)), Preference, [Preference("q", "a", "c", 3.5)]),
        (Ranking("q", ("a", "b"), (2.0, 2.0)), Preference, ["tie"]),
        (Ranking("q", ("a", "b"), (2.0, 2.0)), Demonstration, [Demonstration("q", "a")]),
        (Ranking("q", ("a", "a")), Preference, ["chosen equal to rejected"]),
        (Ranking("q", ("a", "b")), Prompt, [Prompt("q")]),
        (Labelled("q", "a", True), Demonstration, [Demonstration("q", "a")]),
        (Labelled("q", "a", False), Demonstration, ["labelled as bad"]),
        (Labelled("q", "a", False), Prompt, [Prompt("q")]),
        (Labelled("", "a review", False), Text, [Text("a review")]),
        (Labelled("q", "a", True), Text, ["has a prompt, and is no plain text"]),
        (Demonstration("q", CALL, TOOLS), Prompt, [Prompt("q", tools=TOOLS)]),
        (Demonstration("", "a text"), Text, [Text("a text")]),
        (Demonstration((), CALL), Text, ["has a prompt, and is no plain text"]),
        (Prompt("q"), Demonstration, ["does not end in an assistant turn"]),
        (Text("a"), Labelled, ["not labelled"]),
    ],
)
def test_a_record_becomes_the_wanted_kind_or_says_why_not(record: Record, wanted: RecordType, converted: Any) -> None:
    assert convert([record], wanted) == converted


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        (PAIR, "good"),
        (Ranking("q", ("best", "worst")), "best"),
        (Demonstration("q", CALL, TOOLS), CALL),
        (Labelled("q", "a", True), "a"),
        (Labelled("q", "a", False), None),
    ],
)
def test_a_prompt_knows_the_good_answer_of_its_row_and_is_no_other_prompt_for_it(record: Record, answer: Any) -> None:
    (prompt,) = convert([record], Prompt)
    assert isinstance(prompt, Prompt) and prompt.answer == answer
    assert prompt == Prompt("q", tools=prompt.tools)
    other = Prompt("q", tools=prompt.tools, answer="another")
    assert apply_filters([prompt, other], FilterSection(dedupe="exact"), Counts()) == [prompt]


def test_samples_of_one_prompt_are_one_prompt() -> None:
    samples = [Demonstration("q", "a"), Demonstration("q", "b"), Labelled("p", "c", True)]
    assert convert(samples, Prompt) == [Prompt("q"), Prompt("p")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Text(" \n"), "empty text"),
        (Demonstration("q", "\t"), "empty response"),
        (Demonstration("q", {"role": "assistant", "content": "", "reasoning_content": "hm"}), "empty response"),
        (Demonstration("q", CALL), None),
        (Demonstration("", "a"), None),
        (Labelled("q", "", False), "empty response"),
        (Prompt(" "), "empty prompt"),
        (Prompt(({"role": "user", "content": ""},)), "empty prompt"),
        (Ranking("q", ("a", "")), "empty answer"),
        (Preference("q", "a", ""), "empty answer"),
        (Preference("q", "a", "a "), "chosen equal to rejected"),
        (Preference("q", "a", "b", 0.0), "tie"),
        (Preference("q", "a", "b", -0.5), "chosen scored below rejected"),
        (Preference("q", "a", "b", 0.5), None),
    ],
)
def test_what_nothing_can_be_learned_from_is_unusable(record: Record, reason: str | None) -> None:
    assert unusable(record) == reason


def test_what_is_unusable_as_one_kind_may_serve_as_another() -> None:
    assert convert([Preference("q", "a", "a")], Preference) == ["chosen equal to rejected"]
    assert convert([Preference("q", "a", "a")], Demonstration) == [Demonstration("q", "a")]


def test_what_is_not_in_the_table_cannot_be_had() -> None:
    assert targets_of(Ranking) == (Ranking, Preference, Demonstration, Prompt)
    assert targets_of(Text) == (Text,)
    assert targets_of(Prompt) == (Prompt,)
    assert sources_of(Text) == (Text, Labelled, Demonstration)
    assert sources_of(Ranking) == (Ranking, Preference)
    assert set(PLURALS) == set(get_args(Record))
