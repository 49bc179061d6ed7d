"""Diversity as GEM-metrics defines it, and the phrase that grows."""

from __future__ import annotations

import pytest

from fairlead.rollout.texts import grown_phrase, variety


def test_distinct_and_unique_count_over_all_texts_together_by_hand() -> None:
    measured = variety(["a b a", "a b", "c"])
    assert measured["distinct_1"] == pytest.approx(3 / 6)  # a a a b b c
    assert measured["unique_1"] == 1  # c
    assert measured["distinct_2"] == pytest.approx(2 / 3)  # ab ba ab
    assert measured["unique_2"] == 1  # ba


def test_msttr_is_the_mean_over_whole_segments_of_a_hundred_words_laid_end_to_end() -> None:
    """Of GEM-metrics' own tests: one word alone gives 1 / segment; all different words give 1."""
    assert variety(["token " * 60, "token " * 60])["msttr_100"] == pytest.approx(0.01)
    assert variety([" ".join(map(str, range(250)))])["msttr_100"] == pytest.approx(1.0)
    mixed = " ".join(map(str, range(100))) + " token" * 199  # a segment of 100 kinds, one of 1, the rest left out
    assert variety([mixed])["msttr_100"] == pytest.approx((1.0 + 0.01) / 2)


def test_few_words_have_no_msttr_and_none_have_no_variety() -> None:
    assert "msttr_100" not in variety(["one two three"])
    assert variety(["", " "]) == {"distinct_1": 0.0, "distinct_2": 0.0, "unique_1": 0.0, "unique_2": 0.0}


BEFORE = ["the fuse is loose, so the lamp flickers.", "look at the belt first; it may be worn."] * 20


def test_a_mark_that_fills_the_texts_is_named_with_its_shares() -> None:
    grown = grown_phrase(BEFORE, ["the fuse is loose ####"] * 40, factor=5, share=0.05)
    assert grown is not None and grown.phrase == "#"
    assert grown.now == pytest.approx(4 / 8)
    assert grown.before == pytest.approx(1 / (20 * (10 + 11) + 1))


def test_a_phrase_of_several_words_is_named_whole() -> None:
    grown = grown_phrase(BEFORE, [f"{text} thank you so much" for text in BEFORE], factor=5, share=0.05)
    assert grown is not None and "thank you" in grown.phrase


def test_what_was_frequent_before_or_is_rare_now_is_not_named() -> None:
    assert grown_phrase(BEFORE, BEFORE[::2], factor=5, share=0.05) is None
    rare = [*BEFORE, "#"]
    assert grown_phrase(BEFORE, rare, factor=5, share=0.05) is None
    assert grown_phrase([], ["# #"] * 2, factor=5, share=0.05) is None  # nothing is known of before: 1 of 1
