from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tokenizer

from fairlead.config import FilterSection
from fairlead.data.filters import Contamination, apply_filters, duplicates, refuse_unlearnable, unlearnable, words
from fairlead.data.records import load_records
from fairlead.data.render import Renderer, Tree
from fairlead.data.sources import Counts
from fairlead.errors import ConfigError, DataError
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Ranking, Record, Text

DATA = os.environ.get("FAIRLEAD_DATA")
STORY = "Once upon a time a fox crossed the frozen river at night because the moon was bright and the ice was thick"
"""22 words."""


def filtered(records: list[Any], **settings: Any) -> tuple[list[Any], Counts]:
    counts = Counts(read=len(records), kept=len(records))
    return apply_filters(records, FilterSection(**settings), counts), counts


def changed(text: str, *places: int) -> str:
    """With the words at those places exchanged."""
    return " ".join(f"other{i}" if i in places else word for i, word in enumerate(text.split()))


# --- laws ----------------------------------------------------------------------------------------------------------

some_text = st.lists(
    st.sampled_from(["a", "fox", "ran", "over", "the", "ice", "and", "did", "not", "stop"]), max_size=14
).map(" ".join)
some_record = st.one_of(
    st.builds(Text, some_text),
    st.builds(Demonstration, some_text, some_text),
    st.builds(Preference, some_text, some_text, some_text, st.sampled_from([None, 0.5, 2.0])),
    st.builds(Labelled, some_text, some_text, st.booleans()),
    st.builds(Prompt, some_text),
)
some_settings = st.builds(
    FilterSection,
    dedupe=st.sampled_from(["none", "exact", "near"]),
    near_similarity=st.sampled_from([0.3, 0.8, 1.0]),
    min_response_length=st.sampled_from([None, 3]),
    max_response_length=st.sampled_from([None, 40]),
    min_margin=st.sampled_from([None, 1.0]),
)


@settings(deadline=None)  # the first example imports scipy
@given(st.lists(some_record, max_size=12), some_settings)
def test_filters_keep_the_order_count_what_they_drop_and_change_nothing_the_second_time(
    records: list[Record], section: FilterSection
) -> None:
    counts = Counts(read=len(records) + 3, kept=len(records), dropped=Counter({"seen before": 3}))
    try:
        kept = apply_filters(records, section, counts)
    except DataError:
        kept = []
    remaining = iter(records)
    assert all(any(record is other for other in remaining) for record in kept)
    assert counts.read == counts.kept + counts.dropped.total()
    assert counts.kept == len(kept) and counts.dropped["seen before"] == 3
    if kept:
        again = Counts(read=len(kept), kept=len(kept))
        assert apply_filters(kept, section, again) == kept
        assert not again.dropped


@given(st.lists(some_record, min_size=1, max_size=12))
def test_exact_dedupe_keeps_the_first_of_each(records: list[Record]) -> None:
    kept, _ = filtered(records, dedupe="exact")
    first = [record for index, record in enumerate(records) if record not in records[:index]]
    assert kept == first


def jaccard(one: str, other: str) -> float:
    """Written apart from the program: shingles of five words, or the text where there are fewer."""
    sets = []
    for text in (one, other):
        found = re.findall(r"\w+", text.lower())
        sets.append({tuple(found[i : i + 5]) for i in range(len(found) - 4)} if len(found) >= 5 else {text.strip()})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@settings(deadline=None)
@given(st.lists(st.builds(Demonstration, some_text, some_text), max_size=12), st.sampled_from([0.4, 0.8]))
def test_every_near_duplicate_is_near_one_that_stayed(records: list[Demonstration], similarity: float) -> None:
    found = duplicates(records, similarity)
    for index, reason in found.items():
        earlier = [record for i, record in enumerate(records[:index]) if i not in found]
        near = [
            other
            for other in earlier
            if jaccard(records[index].prompt, other.prompt) >= similarity  # pyright: ignore[reportArgumentType]
            and jaccard(records[index].response, other.response) >= similarity  # pyright: ignore[reportArgumentType]
        ]
        assert near
        assert reason == ("duplicate" if records[index] in records[:index] else "near duplicate")


# --- duplicates ----------------------------------------------------------------------------------------------------


def test_near_duplicates_are_found_where_a_word_or_two_differ() -> None:
    """Of 18 shingles a word inside touches five and the last word one: 13 / 23 = 0.57 and 17 / 19 = 0.89."""
    inside, last, twice = changed(STORY, 10), changed(STORY, 20), STORY.upper() + "!"
    texts = [Text(STORY), Text(inside), Text(last), Text(twice)]
    assert duplicates(texts, 0.8) == {2: "near duplicate", 3: "near duplicate"}
    assert duplicates(texts, 0.5) == {1: "near duplicate", 2: "near duplicate", 3: "near duplicate"}
    assert duplicates(texts, 0.9) == {3: "near duplicate"}


def test_pairs_of_one_question_are_no_near_duplicates_of_each_other() -> None:
    """They share the prompt and an answer: as whole texts they would look alike."""
    first, second = f"{STORY} and that is one end", f"{STORY} but there are others too"
    question = " ".join(f"word{i}" for i in range(200))
    pairs = [Preference(question, first, second), Preference(question, first, "No idea at all, sorry, ask them.")]
    assert duplicates(pairs, 0.8) == {}
    assert duplicates([*pairs, Preference(question, first, changed(second, 0))], 0.8) == {2: "near duplicate"}
    assert jaccard(f"{question} {first} {second}", f"{question} {first} No idea at all, sorry, ask them.") > 0.8


def test_texts_of_fewer_than_five_words_are_compared_exactly() -> None:
    records = [Text("Yes, I do."), Text("yes I do"), Text("Yes, I do.")]
    assert duplicates(records, 0.8) == {2: "duplicate"}


def test_equal_texts_of_opposite_labels_are_no_duplicates() -> None:
    records = [Labelled("", STORY, True), Labelled("", STORY, False), Labelled("", STORY + " indeed", True)]
    assert duplicates(records, 0.8) == {2: "near duplicate"}


def test_a_record_repeated_on_purpose_stays() -> None:
    """The same object several times is the weight of its source; an equal object is a duplicate."""
    twice = Text(STORY)
    kept, counts = filtered([twice, twice, Text("other"), Text(STORY)], dedupe="near")
    assert kept == [twice, twice, Text("other")]
    assert counts.dropped == {"duplicate": 1}


def test_records_of_chinese_are_compared_by_character() -> None:
    assert words("你好, World_1 ひ") == ["你", "好", "world_1", "ひ"]
    long = "春天来了山上的花都开了孩子们在河边唱歌跳舞非常快乐"
    assert duplicates([Text(long), Text(long[:-1] + "兴")], 0.8) == {1: "near duplicate"}


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"near needs datasketch.*\n.*fairlead\[data\]"):
        filtered([Text("a"), Text("b")], dedupe="near")
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match=r"language needs py3langid.*\n.*fairlead\[data\]"):
        filtered([Text("a")], language="en")


# --- length, margin, language --------------------------------------------------------------------------------------


def test_every_response_of_a_record_must_have_the_length() -> None:
    sides = [("12345", "1234"), ("123456", "12345"), ("12345", "123456789")]
    pairs = [Preference("?", chosen, rejected) for chosen, rejected in sides]
    kept, counts = filtered(pairs, min_response_length=5, max_response_length=8)
    assert kept == [pairs[1]]
    assert counts.dropped == {"response shorter than 5 characters": 1, "response longer than 8 characters": 1}


def test_a_tool_call_is_as_long_as_what_it_says() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    record = Demonstration("?", {"role": "assistant", "content": "", "tool_calls": [call]})
    assert filtered([record], min_response_length=60)[0] == [record]


def test_pairs_and_rankings_below_the_margin_or_without_one_are_left_out() -> None:
    records: list[Record] = [
        Preference("?", "a", "b", 2.0),
        Preference("?", "a", "b", 1.0),
        Preference("?", "a", "b"),
        Ranking("?", ("a", "b", "c"), (5.0, 4.0, 3.0)),
        Ranking("?", ("a", "b"), (5.0, 4.0)),
        Demonstration("?", "a"),
    ]
    kept, counts = filtered(records, min_margin=1.5)
    assert kept == [records[0], records[3], records[5]]
    assert counts.dropped == {"margin below 1.5": 2, "margin unknown": 1}
    assert counts.notes.total() == 1


def test_another_language_is_left_out_and_what_cannot_be_told_stays() -> None:
    english = Demonstration("Why is the sky blue during the day?", "Because the air scatters blue light the most.")
    german = Demonstration("Warum ist der Himmel am Tag blau?", "Weil die Luft das blaue Licht am stärksten streut.")
    numbers = Demonstration("1 + 1", "2")
    kept, counts = filtered([english, german, numbers], language="en")
    assert kept == [english, numbers]
    assert counts.dropped == {"language is not en": 1}
    assert counts.notes == {"language undecided, kept": 1}
    with pytest.raises(ConfigError, match="'english' is not known"):
        filtered([english], language="english")


def test_settings_that_leave_nothing_are_refused() -> None:
    with pytest.raises(DataError, match=r"no record is left after data\.filter: .*shorter than 9"):
        filtered([Text("short")], min_response_length=9)
    with pytest.raises(ConfigError, match="max_response_length=2 is below min_response_length=3"):
        filtered([Text("short")], min_response_length=3, max_response_length=2)


# --- contamination -------------------------------------------------------------------------------------------------

QUESTION = "A farmer has seventeen sheep and all but nine of them run away one night, how many are left"
"""19 words."""


def reason(evaluated: list[Record], record: Record) -> str | None:
    return Contamination(evaluated).fault(record)


def test_thirteen_words_in_a_row_contaminate_and_twelve_do_not() -> None:
    evaluated: list[Record] = [Prompt(QUESTION)]
    thirteen, twelve = " ".join(QUESTION.split()[2:15]), " ".join(QUESTION.split()[2:14])
    near = "repeats 13 words in a row, or all, of a prompt that is evaluated on"
    assert reason(evaluated, Demonstration("Go on", f"He said: {thirteen.upper()}!")) == near
    assert reason(evaluated, Demonstration(f"He said: {thirteen}", "Yes")) == near
    assert reason(evaluated, Text(f"well {thirteen}")) == near
    assert reason(evaluated, Demonstration("Go on", f"He said: {twelve}!")) is None
    assert reason(evaluated, Demonstration("He said: " + changed(QUESTION, 6, 13), "Yes")) is None


def test_the_same_prompt_contaminates_however_short_it_is() -> None:
    evaluated: list[Record] = [Demonstration("Who?", "Zoe"), Demonstration("Where is she going?", "Home")]
    assert reason(evaluated, Prompt("Who?")) == "prompt is evaluated on"
    assert reason(evaluated, Prompt(({"role": "user", "content": "Who?"},))) == "prompt is evaluated on"
    assert reason(evaluated, Prompt("Tell me: where is she going?")) is None


def test_a_turn_of_eight_to_twelve_words_contaminates_as_a_whole() -> None:
    evaluated: list[Record] = [Prompt("What is the capital of Burkina Faso called?")]
    assert reason(evaluated, Prompt("Quick: what is the capital of Burkina Faso called?")) is not None
    assert reason(evaluated, Prompt("Quick: what is the capital of Burkina Faso, please?")) is None


def test_system_turns_earlier_answers_and_common_phrases_do_not_contaminate() -> None:
    long = " ".join(f"w{i}" for i in range(20))
    turns = (
        {"role": "system", "content": long},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": QUESTION},
        {"role": "user", "content": "Well?"},
    )
    assert reason([Prompt(turns)], Demonstration(long, QUESTION)) is None  # pyright: ignore[reportArgumentType]
    preamble = "Answer the following question as truthfully and as shortly as you possibly can please now:"
    few: list[Record] = [Prompt(f"{preamble} question{i}") for i in range(10)]
    assert reason(few, Prompt(f"{preamble} something else")) is not None
    assert reason([*few, Prompt(f"{preamble} question10")], Prompt(f"{preamble} something else")) is None


def test_files_of_evaluation_records_are_read_as_what_they_are(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": QUESTION, "chosen": "Nine", "rejected": "Eight"}) + "\n")
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{STORY}\n")
    records = [Demonstration("Who?", "Zoe"), Demonstration(QUESTION, "9"), Demonstration("Go on", f"So: {STORY}")]
    kept, counts = filtered(records, contamination=(str(pairs), str(texts)))
    assert kept == records[:1]
    assert counts.dropped == {
        "prompt is evaluated on": 1,
        "repeats 13 words in a row, or all, of a prompt that is evaluated on": 1,
    }


# --- what cannot be learned from -----------------------------------------------------------------------------------


def test_a_data_set_whose_responses_never_end_is_refused() -> None:
    renderer = Renderer(tokenizer(), template="plain", max_length=12)
    long = [Demonstration("Why?", "the fuse is loose " * 10)] * 300
    with pytest.raises(DataError, match=r"no response of 300 records ends: each is cut at data\.max_length=12"):
        refuse_unlearnable(renderer, long)
    refuse_unlearnable(renderer, [*long, Demonstration("Why?", "ok")])


def test_a_data_set_with_every_token_masked_is_known() -> None:
    masked, learned = Tree((1, 2), ((),), (False, False)), Tree((1, 2), ((),), (False, True))
    assert unlearnable([masked, masked], eos=9) == "masked"
    assert unlearnable([masked, learned], eos=9) == "endless"
    assert unlearnable([masked, learned, Tree((1,), ((3, 4), (3, 9)))], eos=9) is None


def test_plain_text_need_not_end() -> None:
    refuse_unlearnable(Renderer(tokenizer(), template="plain", max_length=12), [Text("the fuse is loose " * 10)])


# --- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DATA is None, reason="FAIRLEAD_DATA names no folder of real data")
def test_minhash_finds_what_comparing_all_pairs_finds() -> None:
    """HH answers of some length, each once more with a word in sixty changed."""
    records, _ = load_records(str(Path(str(DATA)) / "hh-rlhf" / "harmless-base"), Preference)
    texts = [r.chosen for r in records if len(r.chosen.split()) > 40][:250]
    noisy = [changed(text, *range(30, len(text.split()), 60)) for text in texts]
    found = duplicates([Text(text) for text in [*texts, *noisy]], 0.8)
    wanted = {i + len(texts) for i, text in enumerate(texts) if jaccard(text, noisy[i]) >= 0.8}
    assert set(found) <= wanted
    assert len(found) >= 0.99 * len(wanted) > 50
