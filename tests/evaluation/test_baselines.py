import math

import pytest

from fairlead.evaluation.baselines import length_margins, length_only, tf_idf
from fairlead.types import Preference


def pair(chosen: str, rejected: str) -> Preference:
    return Preference("p", chosen, rejected)


def test_length_margins_are_in_characters():
    assert length_margins([pair("abc", "a"), pair("a", "a b")]) == [2.0, -2.0]


def test_the_rule_of_length_is_the_one_that_holds_in_training():
    short, long = pair("a", "abc"), pair("abcd", "a")
    assert length_only([short, short, long], [short, long]) == ("shorter", [2.0, -3.0])
    assert length_only([short, long, long], [short, long]) == ("longer", [-2.0, 3.0])


def test_tf_idf_learns_a_word_that_decides():
    train = [pair(f"good {w}", f"bad {w}") for w in ("tea", "milk", "rice", "salt")]
    features, margins = tf_idf(train, [pair("good soup", "bad soup"), pair("bad fish", "good fish")], [False] * 4)
    assert features == "unigrams"
    assert margins[0] > 0
    assert margins[1] == pytest.approx(-margins[0])


def test_tf_idf_takes_bigrams_where_only_order_tells():
    # The same two words on both sides: unigrams see no difference at all.
    train = [pair("salt then tea", "tea then salt"), pair("salt then milk", "milk then salt")] * 4
    features, margins = tf_idf(train, [pair("salt then rice", "rice then salt")], [False, True] * 4)
    assert features == "bigrams"
    assert margins[0] > 0


def test_the_weight_of_a_lone_word_solves_the_logistic_equation():
    # One pair, "x" against "y": the difference is (1, -1), w = (a, -a), and the loss |w|^2 / 2 + C log(1 + e^-w.d) is
    # least where a = C sigmoid(-2a) with C = 1: a = 0.2781 (by bisection), so the margin is 2a.
    low, high = 0.0, 1.0
    for _ in range(60):
        a = (low + high) / 2
        low, high = (a, high) if a < 1 / (1 + math.exp(2 * a)) else (low, a)
    _, margins = tf_idf([pair("x", "y")], [pair("x", "y")], [False])
    assert margins[0] == pytest.approx(2 * low, abs=1e-3)


def test_responses_of_signs_alone_have_tokens():
    _, margins = tf_idf([pair("!!", "??")], [pair("!", "?")], [False])
    assert margins[0] > 0
