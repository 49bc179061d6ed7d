from collections import Counter

import pytest

from fairlead.data.splits import fold_of, keyed_hash, split_of
from fairlead.errors import ConfigError


def test_the_hash_is_blake2b_of_a_json_list() -> None:
    # printf '[0, "a"]' | b2sum -l 64
    assert keyed_hash(0, "a") == 0x59F78A8C3662F0A7
    assert keyed_hash(7, "split", "café") == 0xF13D0EB493DA59B3
    assert keyed_hash(0, "\ud83d") != keyed_hash(0, "a", "b") != keyed_hash(0, "ab")


def test_splits_are_drawn_in_proportion() -> None:
    shares = {"a": 0.5, "none": 0.0, "b": 0.3, "c": 0.2}
    drawn = Counter(split_of(f"prompt {number}", shares, seed=3) for number in range(10_000))
    # Standard deviations are 50, 46 and 40.
    assert abs(drawn["a"] - 5000) < 250
    assert abs(drawn["b"] - 3000) < 230
    assert abs(drawn["c"] - 2000) < 200
    assert drawn["none"] == 0


def test_a_key_has_one_split_and_another_seed_another_draw() -> None:
    shares = {"a": 0.5, "b": 0.5}
    keys = [f"prompt {number}" for number in range(64)]
    first = [split_of(key, shares, seed=0) for key in keys]
    assert first == [split_of(key, shares, seed=0) for key in keys]
    assert first != [split_of(key, shares, seed=1) for key in keys]


def test_folds_are_even_and_do_not_follow_the_splits() -> None:
    keys = [f"prompt {number}" for number in range(6000)]
    drawn = Counter((fold_of(key, 3, seed=0), split_of(key, {"a": 0.5, "b": 0.5}, seed=0)) for key in keys)
    assert len(drawn) == 6
    assert all(abs(number - 1000) < 150 for number in drawn.values())  # deviation 29


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="at least 0 and sum to 1"):
        split_of("key", shares, seed=0)
    with pytest.raises(ConfigError, match="folds must be at least 1"):
        fold_of("key", 0, seed=0)
