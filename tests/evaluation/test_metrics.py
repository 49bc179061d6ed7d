import math

import numpy as np
import pytest

from fairlead.evaluation.metrics import (
    Estimate,
    bootstrap_interval,
    correctness,
    distinct_n,
    pair_accuracy,
    paired_difference,
    perplexity,
    ratio_interval,
    sign_flip_p_value,
    win_rate,
)


def test_constant_data_have_an_interval_of_no_width():
    assert bootstrap_interval([[2.5], [2.5, 2.5], [2.5]], seed=0) == Estimate(2.5, 2.5, 2.5, 3)


def test_draws_are_averaged_within_a_prompt_before_prompts_are():
    # Prompt means 0 and 6, not the mean 1.5 of the four draws.
    estimate = bootstrap_interval([[0.0, 0.0, 0.0], [6.0]], seed=0)
    assert estimate.mean == 3.0
    assert estimate.n == 2


def test_two_prompts_are_resampled_whole():
    # Of two prompts at 0 and 6, resampling whole prompts gives 0, 3 or 6, with shares 1/4, 1/2, 1/4.
    estimate = bootstrap_interval([[0.0, 0.0], [6.0, 6.0]], seed=0)
    assert (estimate.low, estimate.high) == (0.0, 6.0)
    narrow = bootstrap_interval([[0.0, 0.0], [6.0, 6.0]], seed=0, level=0.4)
    assert (narrow.low, narrow.high) == (3.0, 3.0)


def test_an_interval_depends_on_the_seed_alone():
    groups = [[float(i * i % 7)] for i in range(20)]
    assert bootstrap_interval(groups, seed=3) == bootstrap_interval(groups, seed=3)
    assert bootstrap_interval(groups, seed=3) != bootstrap_interval(groups, seed=4)


def test_one_prompt_has_a_mean_and_no_interval():
    assert bootstrap_interval([[1.0, 3.0]], seed=0).as_dict() == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_no_prompt_at_all_is_an_error():
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_interval([], seed=0)


def test_95_percent_of_intervals_hold_the_mean_that_normal_data_were_drawn_with():
    # 2 draws a prompt that share the prompt's effect: an interval over draws would be too narrow (about 83 %).
    rng, held = np.random.default_rng(1), 0
    for trial in range(300):
        prompts = rng.normal(5.0, 2.0, size=(40, 1)) + rng.normal(0.0, 0.3, size=(40, 2))
        estimate = bootstrap_interval(prompts.tolist(), seed=trial, resamples=400)
        assert estimate.low is not None and estimate.high is not None
        held += estimate.low <= 5.0 <= estimate.high
    assert 0.91 <= held / 300 <= 0.98  # the percentile bootstrap of 40 is short by a factor sqrt(39 / 40)


def test_the_interval_of_a_mean_is_1_96_standard_errors_wide():
    values = np.random.default_rng(2).normal(0.0, 1.0, 500)
    estimate = bootstrap_interval([[v] for v in values.tolist()], seed=0, resamples=4000)
    assert estimate.low is not None and estimate.high is not None
    expected = 2 * 1.96 * values.std() / math.sqrt(500)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.05)


def test_a_ratio_divides_sums_and_not_the_prompts_ratios():
    assert ratio_interval([1.0, 3.0], [1.0, 9.0], seed=0).mean == pytest.approx(0.4)


def test_distinct_n_counts_ngrams_over_the_whole_set():
    # Words: a b a b | a b c -> 3 different of 7. Bigrams: ab ba ab | ab bc -> 3 different of 5.
    groups = [["a b a b"], ["a  b\nc"]]
    assert distinct_n(groups, 1).mean == pytest.approx(3 / 7)
    assert distinct_n(groups, 2).mean == pytest.approx(3 / 5)


def test_ngrams_do_not_run_from_one_response_into_the_next():
    assert distinct_n([["a", "b"], ["c"]], 2).mean == 0.0


def test_the_interval_of_distinct_n_is_the_jackknife_by_hand():
    groups = [["a b a b"], ["a b c"], ["a"]]
    # Whole: {a, b, c} of 8 words. Leaving out: {a b c}/4, {a b}/5, {a b c}/7.
    without = [3 / 4, 2 / 5, 3 / 7]
    mean = sum(without) / 3
    error = math.sqrt(2 / 3 * sum((w - mean) ** 2 for w in without))
    estimate = distinct_n(groups, 1)
    assert estimate.mean == pytest.approx(3 / 8)
    assert estimate.low == pytest.approx(max(0.0, 3 / 8 - 1.959964 * error))
    assert estimate.high == pytest.approx(3 / 8 + 1.959964 * error)


def test_the_interval_of_distinct_n_holds_what_other_prompts_would_give():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(1000)]
    share = 1 / np.arange(1, 1001)

    def responses() -> list[list[str]]:
        lengths = rng.integers(5, 40, size=40)
        return [[" ".join(rng.choice(words, size=n, p=share / share.sum()))] for n in lengths]

    expected = np.mean([distinct_n(responses(), 1).mean for _ in range(100)])
    held = 0
    for _ in range(100):
        estimate = distinct_n(responses(), 1)
        assert estimate.low is not None and estimate.high is not None
        held += estimate.low <= expected <= estimate.high
    assert 0.88 <= held / 100 <= 1.0


def test_a_tie_is_half_a_win():
    # Prompt 1: every draw of ours against every one of theirs: 1>0, 1=1, 2>0, 2>1 -> 3.5 of 4. Prompt 2: lost.
    assert win_rate([[1.0, 2.0], [0.0, 0.0]], [[0.0, 1.0], [5.0, 5.0]], seed=0).mean == pytest.approx(3.5 / 8)


def test_a_run_wins_half_against_itself():
    scores = [[0.3, 0.1], [2.0, 2.0], [-1.0, 4.0]]
    assert win_rate(scores, scores, seed=0) == Estimate(0.5, 0.5, 0.5, 3)


def test_pair_accuracy_is_a_share_of_pairs_and_resamples_prompts():
    margins, prompts = [1.0, 2.0, 0.0, -3.0], ["a", "a", "a", "b"]
    estimate = pair_accuracy(margins, prompts, seed=0)
    # 2.5 of 4 pairs; the two prompts alone have 2.5/3 and 0/1.
    assert estimate.mean == pytest.approx(2.5 / 4)
    assert estimate.n == 4
    assert (estimate.low, estimate.high) == (0.0, pytest.approx(2.5 / 3))
    assert correctness(margins).tolist() == [1.0, 1.0, 0.5, 0.0]


def test_a_paired_difference_is_taken_item_by_item():
    # Both runs vary by 100 between items; their difference is always 1.
    ours, theirs = [101.0, 1.0, 51.0], [100.0, 0.0, 50.0]
    assert paired_difference(ours, theirs, ["a", "b", "c"], seed=0) == Estimate(1.0, 1.0, 1.0, 3)


def test_the_sign_flip_p_value_of_three_prompts_is_enumerated():
    # Seen: 6. |+-1 +-2 +-3| reaches 6 in two of eight assignments.
    assert sign_flip_p_value([1.0, 2.0, 3.0], ["a", "b", "c"], seed=0) == pytest.approx(2 / 8)
    # Seen: -1 + 2 + 3 = 4. Totals: +-6, +-4, +-2, 0, 0 -> four of eight are at least 4 away from zero.
    assert sign_flip_p_value([-1.0, 2.0, 3.0], ["a", "b", "c"], seed=0) == pytest.approx(4 / 8)


def test_items_of_one_prompt_bear_one_sign():
    # Sums 3 and 1: |+-3 +-1| >= 4 for two of four.
    assert sign_flip_p_value([1.0, 2.0, 1.0], ["a", "a", "b"], seed=0) == pytest.approx(2 / 4)


def test_no_difference_has_a_p_value_of_one():
    assert sign_flip_p_value([0.0, 0.0], ["a", "b"], seed=0) == 1.0


def test_the_random_sign_flips_agree_with_the_binomial_tail():
    # 20 differences of +-1, 15 up and 5 down: two-sided sign test, 2 sum_{k>=15} C(20, k) / 2^20 = 0.0414.
    differences = [1.0] * 15 + [-1.0] * 5
    exact = 2 * sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    assert sign_flip_p_value(differences, range(20), seed=0) == pytest.approx(exact, abs=0.006)


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(5)
    p_values = [sign_flip_p_value(rng.normal(size=10), range(10), seed=0) for _ in range(400)]
    assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.04)


def test_perplexity_is_exp_of_nats_per_token():
    # 2 ln 2 + 6 ln 2 nats over 2 + 2 tokens = 2 ln 2 a token -> 4; the texts alone have 2 and 8.
    estimate = perplexity([2 * math.log(2), 6 * math.log(2)], [2, 2], seed=0)
    assert estimate.mean == pytest.approx(4.0)
    assert (estimate.low, estimate.high) == (pytest.approx(2.0), pytest.approx(8.0))
