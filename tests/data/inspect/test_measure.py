from __future__ import annotations

import gzip
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tokenizer

from fairlead.data.inspect.measure import Bar, Lengths, Measures, clustered_rate, histogram, lengths_of, measure, rate
from fairlead.data.records import load_records
from fairlead.data.render import Renderer
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Ranking, Text

DATA = os.environ.get("FAIRLEAD_DATA")
PAIRS = [
    Preference("Who is it?", "It is me.", "No", 2.0),
    Preference("Who is it?", "You", "It is you.", 1.0),
    Preference("Why?", "Because", "Because", 1.0),
    Preference("When is it?", "Now and then", "Never", 3.0),
]


def renderer(max_length: int = 64, max_prompt_length: int | None = None) -> Renderer:
    return Renderer(tokenizer(), template="question-answer", max_length=max_length, max_prompt_length=max_prompt_length)


def size(text: str) -> int:
    return len(tokenizer()(text).input_ids)


# --- lengths -------------------------------------------------------------------------------------------------------


def test_percentiles_are_lengths_that_occur() -> None:
    """Nearest rank: of 20 values the 1st, 10th and 19th."""
    assert lengths_of(list(range(20, 0, -1))) == Lengths(20, 10.5, 1, 10, 19, 20)
    assert lengths_of([7]) == Lengths(1, 7, 7, 7, 7, 7)


def test_without_a_tokenizer_lengths_are_in_words_and_characters() -> None:
    found = measure(PAIRS)
    assert list(found.lengths) == ["words", "characters"]
    assert found.lengths["words"]["chosen"] == Lengths(4, 2.0, 1, 1, 3, 3)
    assert found.lengths["characters"] == {
        "prompt": Lengths(4, (10 + 10 + 4 + 11) / 4, 4, 10, 11, 11),
        "chosen": Lengths(4, (9 + 3 + 7 + 12) / 4, 3, 7, 12, 12),
        "rejected": Lengths(4, (2 + 10 + 7 + 5) / 4, 2, 5, 10, 10),
        "row": Lengths(4, (21 + 23 + 18 + 28) / 4, 18, 21, 28, 28),
    }
    assert found.tokenizer is None and found.limits is None and found.packing is None


def test_lengths_in_tokens_are_those_of_whole_records_and_the_limits_say_what_they_cut() -> None:
    prompts = ["Question: a?\n\nAnswer:", "Question: why so?\n\nAnswer:"]
    records = [Demonstration("a?", "yes"), Demonstration("why so?", "no " * 40), Demonstration("a?", "no " * 40)]
    limit = size(prompts[0]) + 8
    found = measure(records, renderer(max_length=limit, max_prompt_length=size(prompts[0])), tokenizer="tiny")
    assert found.lengths["tokens"]["prompt"].max == size(prompts[1]) > found.lengths["tokens"]["prompt"].p50
    assert found.lengths["tokens"]["response"].max == size(" " + "no " * 40) + 1
    assert found.limits is not None
    assert (found.limits.kept, found.limits.cut, sum(found.limits.dropped.values())) == (2, 1, 1)
    assert [tree.num_tokens for tree in found.trees] == [size(prompts[0] + " yes") + 1, limit]
    assert found.kept == [0, 2]


def test_prompts_to_sample_from_have_lengths_and_no_responses() -> None:
    records = [Prompt("a?"), Prompt("why so, and why not otherwise?")]
    limit = size("Question: a?\n\nAnswer:")
    found = measure(records, renderer(max_length=limit + 1), tokenizer="tiny")
    assert list(found.lengths["tokens"]) == ["prompt"]
    assert found.limits is not None and (found.limits.kept, sum(found.limits.dropped.values())) == (1, 1)
    assert found.packing is None and found.length_bias is None


def test_a_text_has_neither_prompt_nor_row() -> None:
    found = measure([Text("one two"), Text("three")], renderer())
    assert list(found.lengths["tokens"]) == ["text"]
    assert found.shared_prompts is None


def test_good_and_bad_responses_have_lengths_of_their_own_and_empty_prompts_none() -> None:
    found = measure([Labelled("", "fine", True), Labelled("", "terrible", False), Labelled("", "good", True)])
    assert list(found.lengths["characters"]) == ["bad response", "good response", "row"]
    assert found.lengths["characters"]["good response"].number == 2
    assert found.labels is not None and (found.labels.hits, found.labels.number) == (2, 3)
    assert found.shared_prompts is None


# --- prompts -------------------------------------------------------------------------------------------------------


def test_shared_prompts_are_counted_and_the_tokens_they_save() -> None:
    found = measure(PAIRS, renderer())
    prompts = [size(f"Question: {pair.prompt}\n\nAnswer:") for pair in PAIRS if pair.chosen != pair.rejected]
    responses = [size(f" {text}") + 1 for p in PAIRS if p.chosen != p.rejected for text in (p.chosen, p.rejected)]
    separate, shared = 2 * sum(prompts) + sum(responses), sum(prompts) + sum(responses)
    assert found.shared_prompts is not None
    assert (found.shared_prompts.prompts, found.shared_prompts.records) == (3, 2)
    assert found.shared_prompts.saved == pytest.approx(1 - shared / separate)


def test_the_share_of_real_tokens_is_that_of_packed_rows_and_of_padded_ones() -> None:
    """Rows of 20, 12 and 8 tokens in rows of 20: packed 40 of 40, padded to the longest 40 of 60."""
    texts = [Text("a" * 19), Text("b" * 11), Text("c" * 7)]
    sizes = [measure([text], renderer(), tokenizer="tiny").lengths["tokens"]["text"].max for text in texts]
    found = measure(texts, renderer(max_length=max(sizes))).packing
    assert found is not None and sizes == [20, 12, 8]
    assert (found["packed"], found["rows"], found["padded"]) == (1.0, 2, pytest.approx(40 / 60))


def test_held_out_prompts_that_meet_the_training_data_are_counted() -> None:
    words = " ".join(f"word{i}" for i in range(20))
    heldout = [Prompt(f"Say {words}"), Prompt(f"Say {words}"), Prompt("Say something of your own choice, would you?")]
    found = measure([Demonstration("Go on", f"Well, {words} is what I say")], heldout=heldout)
    assert found.heldout == {"records": 3, "prompts": 2, "near": 1}


# --- rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_that_of_newcombes_table(hits: int, number: int, low: float, high: float) -> None:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3 (Wilson)."""
    found = rate(hits, number)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 9))
def test_copies_of_a_pair_under_one_prompt_say_no_more_than_the_pair(outcomes: list[bool], copies: int) -> None:
    once = clustered_rate((str(index), outcome) for index, outcome in enumerate(outcomes))
    often = clustered_rate((str(index), outcome) for index, outcome in enumerate(outcomes) for _ in range(copies))
    plain = rate(sum(outcomes), len(outcomes))
    assert once is not None and often is not None
    assert (once.low, once.high) == (pytest.approx(plain.low), pytest.approx(plain.high))
    assert (often.low, often.high) == (pytest.approx(plain.low), pytest.approx(plain.high))
    assert often.number == copies * len(outcomes)


def test_the_length_bias_leaves_equal_lengths_out() -> None:
    bias = measure(PAIRS).length_bias
    assert bias is not None and bias.unit == "characters"
    assert (bias.longer.hits, bias.longer.number, bias.equal) == (2, 3, 1)


def test_the_length_bias_of_rankings_compares_the_best_with_the_worst() -> None:
    rankings = [
        Ranking("?", ("long best", "longer middle", "bad"), (3.0, 2.0, 1.0)),
        Ranking("??", ("best", "even longer bad"), (2.0, 1.0)),
        Ranking("???", ("a tie", "of two", "scores"), (1.0, 1.0, 1.0)),
    ]
    found = measure(rankings)
    assert found.length_bias is not None
    assert (found.length_bias.longer.hits, found.length_bias.longer.number) == (1, 2)
    assert found.histograms["score"] == [Bar(1.0, 1.0, 5), Bar(2.0, 2.0, 2), Bar(3.0, 3.0, 1)]
    assert found.histograms["margin"] == [Bar(0.0, 0.0, 1), Bar(1.0, 1.0, 1), Bar(2.0, 2.0, 1)]


@pytest.mark.skipif(DATA is None, reason="FAIRLEAD_DATA names no folder of real data")
def test_the_length_bias_of_hh_is_that_counted_from_its_lines() -> None:
    folder = Path(str(DATA)) / "hh-rlhf" / "harmless-base"
    longer = unequal = equal = 0
    lines = gzip.decompress((folder / "test.jsonl.gz").read_bytes()).decode().split("\n")
    for row in map(json.loads, filter(None, lines)):
        prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
        other, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
        speakers = [re.findall(r"\n\n(Human|Assistant):", row[k]) for k in ("chosen", "rejected")]
        is_broken = any(a == b for found in speakers for a, b in pairwise(found))
        if prompt != other or is_broken or not chosen.strip() or not rejected.strip():
            continue
        a, b = len(chosen.strip()), len(rejected.strip())
        longer, unequal, equal = longer + (a > b), unequal + (a != b), equal + (a == b)
    records, _ = load_records(str(folder), Preference)
    bias = measure(records).length_bias
    assert bias is not None
    assert (bias.longer.hits, bias.longer.number, bias.equal) == (longer, unequal, equal) == (709, 1582, 10)


# --- histograms and duplicates -------------------------------------------------------------------------------------


def test_few_whole_numbers_have_a_bar_each_and_others_twelve_bars_of_equal_width() -> None:
    assert histogram([1, 1, -1, 3.0]) == [Bar(-1, -1, 1), Bar(1, 1, 2), Bar(3, 3, 1)]
    bars = histogram([0.0, 0.5, 1.0, 11.99, 12.0])
    assert [bar.number for bar in bars] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert (bars[0].low, bars[0].high, bars[-1].high) == (0, 1, 12)
    assert histogram([0.5, 0.5]) == [Bar(0.5, 0.5, 2)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_the_bars_hold_every_value(values: list[float]) -> None:
    assert sum(bar.number for bar in histogram(values)) == len(values)


def test_columns_beside_the_records_become_histograms() -> None:
    found = measure(PAIRS, scores={"chosen_score": [3, 3, 1], "rejected_score": []})
    assert found.histograms["chosen_score"] == [Bar(1, 1, 1), Bar(3, 3, 2)]
    assert "rejected_score" not in found.histograms


def test_duplicates_are_counted_exact_and_near() -> None:
    long = " ".join(f"word{i}" for i in range(40))
    found: Measures = measure([Text(long), Text(long), Text(long + " more"), Text("other")])
    assert (found.duplicates.searched, found.duplicates.exact, found.duplicates.near) == (4, 1, 1)
