"""Whole conversations in one string."""

from collections import Counter
from typing import Any

import pytest

from fairlead.data.formats import recognise
from fairlead.data.sources import Row
from fairlead.types import Demonstration, Message, Preference, Prompt

HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
LMFLOW = "###Human: Hi###Assistant: Yes?###Human: Bye###Assistant:"
GUANACO = "### Human: Hi### Assistant: Yes?\n### Human: Bye\n### Assistant:"
PROMPT: tuple[Message, ...] = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
)
STYLES = [HH, LMFLOW, GUANACO]


def parse(row: dict[str, Any], notes: Counter[str] | None = None) -> Any:
    return recognise(Row(row, "a.jsonl:7")).parse(Row(row, "a.jsonl:7"), notes)


@pytest.mark.parametrize("asked", STYLES)
@pytest.mark.parametrize("field", ["text", "chosen"])
def test_one_transcript_is_a_demonstration_of_its_last_answer(asked: str, field: str) -> None:
    assert recognise(Row({field: f"{asked} c"}, "x")).name == "transcript"
    assert parse({field: f"{asked} c"}) == Demonstration(PROMPT, "c")


@pytest.mark.parametrize("asked", STYLES)
@pytest.mark.parametrize("fields", [("chosen", "rejected"), ("positive", "negative")])
def test_two_transcripts_are_a_pair(asked: str, fields: tuple[str, str]) -> None:
    row = {fields[0]: f"{asked} c", fields[1]: f"{asked} r"}
    assert recognise(Row(row, "x")).name == "hh"
    assert parse(row) == Preference(PROMPT, "c", "r")


@pytest.mark.parametrize("asked", STYLES)
def test_a_prompt_that_is_a_transcript_is_read_as_turns(asked: str) -> None:
    notes = Counter[str]()
    assert parse({"prompt": asked, "chosen": " c", "rejected": "r"}, notes) == Preference(PROMPT, " c", "r")
    assert notes == {"prompt written as a transcript, read as turns": 1}


def test_a_transcript_that_ends_with_the_human_is_a_prompt() -> None:
    assert parse({"text": "### Human: Hi### Assistant: Yes?### Human: Bye"}) == Prompt(PROMPT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "two turns of the same role running"),
        ("### Human: a### Assistant: b### Assistant: c", "two turns of the same role running"),
        ("\n\nHuman:\n\nAssistant: c", "empty turn in the prompt"),
    ],
)
def test_a_transcript_that_cannot_be_parted_for_sure_is_dropped(text: str, reason: str) -> None:
    assert parse({"text": text}) == reason


def test_a_marker_inside_an_answer_stays_and_is_noted_once_a_row() -> None:
    notes = Counter[str]()
    pair = parse({"chosen": f"{HH} Human: no", "rejected": f"{HH} Human: yes"}, notes)
    assert (pair.chosen, pair.rejected) == ("Human: no", "Human: yes")
    assert notes == {"marker inside a turn": 1}


@pytest.mark.parametrize("text", ["He said Human: hi", "Assistants: none", "#Human: a", "##Human: a"])
def test_other_text_is_plain_text(text: str) -> None:
    assert recognise(Row({"text": text}, "x")).name == "text"


@pytest.mark.parametrize(("chosen", "rejected"), [(f"{HH} c", "plain"), ("plain", f"{HH} r")])
def test_a_side_without_turns_makes_no_pair(chosen: str, rejected: str) -> None:
    assert parse({"chosen": chosen, "rejected": rejected}) == "no turn markers"
