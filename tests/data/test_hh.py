import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from fairlead.data.hh import Pair, parse_pair, parse_turns, read_pairs, transcript
from fairlead.data.sources import Counts, write_jsonl
from fairlead.errors import DataError

ASKED = "\n\nHuman: Is the sky blue or bland?\n\nAssistant:"


def test_the_last_answer_is_the_response_and_the_rest_the_prompt() -> None:
    begin = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is 2+2?\n\nAssistant:"
    assert parse_pair(f"{begin} 4", f"{begin} 5 ") == Pair(
        prompt=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "What is 2+2?"},
        ],
        chosen="4",
        rejected="5",
    )


def test_answers_that_begin_alike_are_not_cut_inside_a_word() -> None:
    pair = parse_pair(f"{ASKED} It is blue.", f"{ASKED} It is bland.")
    assert isinstance(pair, Pair)
    assert (pair.chosen, pair.rejected) == ("It is blue.", "It is bland.")
    assert pair.prompt == [{"role": "user", "content": "Is the sky blue or bland?"}]


def test_blank_lines_inside_an_answer_stay() -> None:
    turns = parse_turns(f"{ASKED} One.\n\n- two\n\n\n- three\n")
    assert turns[-1] == {"role": "assistant", "content": "One.\n\n- two\n\n\n- three"}


def test_a_marker_inside_a_turn_is_text() -> None:
    turns = parse_turns("\n\nHuman: He wrote Human: once\n\nAssistant: Human: OK\nAssistant: no  Human: yes")
    assert turns == [
        {"role": "user", "content": "He wrote Human: once"},
        {"role": "assistant", "content": "Human: OK\nAssistant: no  Human: yes"},
    ]


def test_windows_line_ends_and_a_missing_leading_blank_line_are_read() -> None:
    assert parse_turns("Human: a\r\n\r\nAssistant: b\r\nc") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\nc"},
    ]


GOOD = "\n\nHuman: q\n\nAssistant: yes"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("", GOOD, "no turn markers"),
        ("plain text", GOOD, "no turn markers"),
        (GOOD, "He said Human: q", "no turn markers"),
        (f"Note.{GOOD}", GOOD, "text before the first turn"),
        (f"{ASKED} a\n\nAssistant: b", GOOD, "two turns of the same role running"),
        (GOOD, f"\n\nHuman: p{GOOD}", "two turns of the same role running"),
        (f"\n\nAssistant: hi{GOOD}", GOOD, "does not begin with a human turn"),
        ("\n\nAssistant: hi", GOOD, "does not begin with a human turn"),
        (f"{GOOD}\n\nHuman: thanks", GOOD, "does not end in an assistant turn"),
        ("\n\nHuman:\n\nAssistant: yes", GOOD, "empty turn in the prompt"),
        (GOOD, "\n\nHuman: q\n\nAssistant: \n", "empty answer"),
        ("\n\nHuman: q\n\nAssistant:", GOOD, "empty answer"),
        ("\n\nHuman: other\n\nAssistant: yes", GOOD, "prompts differ"),
        (GOOD, f"{GOOD} ", "chosen equal to rejected"),
    ],
)
def test_what_is_no_pair_is_dropped_for_a_reason(chosen: str, rejected: str, reason: str) -> None:
    assert parse_pair(chosen, rejected) == reason


def test_every_row_is_kept_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = GOOD.replace("yes", "Human: no")
    rows = [(GOOD, bad), (GOOD, bad), (GOOD, GOOD), ("", ""), (bad, GOOD)]
    write_jsonl(path, [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows])
    counts = Counts()
    pairs = list(read_pairs([path], counts))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("yes", "Human: no"),
        ("Human: no", "yes"),
    ]
    assert counts.as_dict() == {
        "read": 5,
        "kept": 2,
        "dropped": {"chosen equal to rejected": 1, "duplicate pair": 1, "no turn markers": 1},
        "notes": {"marker inside a turn": 2},
    }


@pytest.mark.parametrize("row", [{"chosen": GOOD}, {"chosen": GOOD, "rejected": [GOOD]}])
def test_a_row_without_both_transcripts_is_located(tmp_path: Path, row: dict[str, object]) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"chosen": GOOD, "rejected": GOOD}, row])
    with pytest.raises(DataError, match=r"a\.jsonl:2: rejected must be a transcript, got "):
        list(read_pairs([path], Counts()))


def test_a_transcript_is_written_as_it_was_read() -> None:
    text = "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    turns = parse_turns(text)
    assert not isinstance(turns, str)
    assert transcript(turns[:-1], turns[-1]["content"]) == text


def test_the_published_file_keeps_1592_of_1600_rows() -> None:
    path = Path(os.environ.get("FAIRLEAD_DATA", "")) / "hh-rlhf/harmless-base/test.jsonl.gz"
    if not os.environ.get("FAIRLEAD_DATA") or not path.exists():
        pytest.skip("FAIRLEAD_DATA names no folder with hh-rlhf/harmless-base/test.jsonl.gz")
    counts = Counts()
    pairs = list(read_pairs([path], counts))

    expected = Counter[str]()
    with gzip.open(path) as file:
        for line in file:
            sides = [
                side.replace("\n\nHuman:", "\1").replace("\n\nAssistant:", "\2") for side in json.loads(line).values()
            ]
            markers = ["".join(c for c in side if c in "\1\2") for side in sides]
            if any("\1\1" in side or "\2\2" in side for side in markers):
                expected["two turns of the same role running"] += 1
            elif any(side.rstrip().endswith("\2") for side in sides):
                expected["empty answer"] += 1
            elif sides[0].rpartition("\2")[0] != sides[1].rpartition("\2")[0]:
                expected["prompts differ"] += 1
    assert counts.dropped == expected
    assert (counts.read, counts.kept, len(pairs)) == (1600, 1592, 1592)
    assert counts.dropped == {"empty answer": 4, "two turns of the same role running": 4}
