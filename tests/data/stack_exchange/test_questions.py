from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.data.sources import Counts
from fairlead.data.stack_exchange import Answer, Question, answer_score, sample_pairs


@pytest.mark.parametrize(
    ("votes", "is_accepted", "score"),
    [
        (-1, False, -1),
        (-1, True, -1),
        (-40, False, -1),
        (0, False, 0),
        (0, True, 1),
        (1, False, 1),
        (2, False, 2),
        (3, True, 3),
        (10, False, 3),
        (100, True, 8),
    ],
)
def test_scores_are_those_of_askell_et_al(votes: int, is_accepted: bool, score: int) -> None:
    assert answer_score(votes, is_accepted=is_accepted) == score


@settings(deadline=None)
@given(st.integers(-(10**6), 10**6))
def test_a_score_is_the_rounded_logarithm_of_one_more_than_the_votes(votes: int) -> None:
    # bit_length() // 2 of a square is the rounded logarithm: 2^(2k-1) <= n^2 < 2^(2k+1).
    expected = -1 if votes < 0 else ((1 + votes) ** 2).bit_length() // 2
    assert answer_score(votes, is_accepted=False) == expected
    assert answer_score(votes, is_accepted=True) == (-1 if votes < 0 else expected + 1)
    assert answer_score(votes + 1, is_accepted=False) >= expected


def of_scores(*scores: int, id: int = 1) -> Question:
    answers = tuple(Answer(n, f"text {n}", score, False, None, None) for n, score in enumerate(scores))
    return Question("site", id, "prompt", answers, None)


def pair_ids(question: Question, *, seed: int = 0, limit: int = 10) -> list[tuple[int, int]]:
    pairs = sample_pairs(question, seed=seed, limit=limit, counts=Counts())
    return [(better.id, worse.id) for better, worse in pairs]


def test_the_better_answer_is_first_and_ties_make_no_pair() -> None:
    assert pair_ids(of_scores(2, 5, 2, -1)) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]


def test_equal_texts_make_no_pair() -> None:
    counts = Counts()
    answers = tuple(Answer(id, "same", id, False, None, None) for id in range(2))
    assert sample_pairs(Question("site", 1, "prompt", answers, None), seed=0, limit=10, counts=counts) == []
    assert +counts.dropped == {"equal texts": 1}


def test_at_most_ten_pairs_are_drawn_and_the_others_counted() -> None:
    counts = Counts()
    pairs = sample_pairs(of_scores(*range(12), 11), seed=0, limit=10, counts=counts)
    assert len(set(pairs)) == 10
    assert all(better.score > worse.score for better, worse in pairs)
    assert (counts.read, counts.kept) == (78, 10)
    assert counts.dropped == {"equal scores": 1, "more pairs than the limit": 67}


def test_pairs_depend_on_the_seed_and_the_question() -> None:
    question = of_scores(*range(9))
    assert pair_ids(question) != pair_ids(question, seed=1)
    assert pair_ids(question) != pair_ids(of_scores(*range(9), id=2))


@settings(deadline=None)
@given(
    scores=st.lists(st.integers(-1, 6), min_size=2, max_size=12),
    limit=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    shuffle=st.randoms(use_true_random=False),
)
def test_sampled_pairs_are_few_enough_right_and_the_same_in_any_order_of_reading(
    scores: list[int], limit: int, seed: int, shuffle: object
) -> None:
    question = of_scores(*scores)
    drawn = pair_ids(question, seed=seed, limit=limit)
    untied = sum(a != b for n, a in enumerate(scores) for b in scores[:n])
    assert len(drawn) == len(set(drawn)) == min(limit, untied)
    assert all(scores[better] > scores[worse] for better, worse in drawn)
    turned = list(question.answers)
    shuffle.shuffle(turned)  # type: ignore[attr-defined]
    assert pair_ids(Question("site", 1, "prompt", tuple(turned), None), seed=seed, limit=limit) == drawn
    assert set(pair_ids(question, seed=seed, limit=limit + 1)) >= set(drawn)


def test_every_pair_is_about_equally_likely() -> None:
    drawn = Counter(pair for id in range(400) for pair in pair_ids(of_scores(*range(6), id=id), limit=5))
    assert len(drawn) == 15
    # 400 draws at 1/3 each: 133 expected, standard deviation 9.4.
    assert 95 < min(drawn.values()) <= max(drawn.values()) < 172
