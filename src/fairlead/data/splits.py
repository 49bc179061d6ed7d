"""Assigns keys to splits and folds by hashing, so that equal keys meet. Knows no rows, no files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from fairlead.errors import ConfigError


def keyed_hash(seed: int, *parts: str | int) -> int:
    """64 uniform bits that depend on the seed and the parts, not on any earlier draw."""
    data = json.dumps([seed, *parts]).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def split_of(key: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of ``key``, drawn in proportion to ``shares``, which sum to one.

    Rows that share any text to be kept apart must share the key. Raises ConfigError for shares that
    are not shares.
    """
    total = math.fsum(shares.values())
    if min(shares.values(), default=-1.0) < 0 or not math.isclose(total, 1.0, abs_tol=1e-9):
        raise ConfigError(f"split shares must be at least 0 and sum to 1, got {dict(shares)}")
    draw = keyed_hash(seed, "split", key) / 2**64
    *others, last = (name for name, share in shares.items() if share > 0)
    for name in others:
        draw -= shares[name]
        if draw < 0:
            return name
    return last


def fold_of(key: str, folds: int, seed: int) -> int:
    """The fold of ``key``, 0 to ``folds - 1``, independent of its split."""
    if folds < 1:
        raise ConfigError(f"folds must be at least 1, got {folds}")
    return keyed_hash(seed, "fold", key) % folds
