"""What a reward model must beat to have learned anything: the length of the responses, and their words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fairlead.evaluation.metrics import correctness
from fairlead.types import Preference

FEATURES: dict[str, tuple[tuple[int, int], float]] = {"unigrams": ((1, 1), 1.0), "bigrams": ((1, 2), 0.3)}
"""Name -> (n-gram range, inverse strength C of the L2 penalty); bigrams stand beside unigrams."""
TOKEN = r"(?u)\w+|[^\w\s]"
"""A word, or a sign that is no letter: no response is without a token."""


def length_margins(pairs: Sequence[Preference]) -> list[float]:
    """By how many characters the chosen response is the longer one."""
    return [float(len(pair.chosen) - len(pair.rejected)) for pair in pairs]


def length_only(train: Sequence[Preference], heldout: Sequence[Preference]) -> tuple[str, list[float]]:
    """``longer`` or ``shorter``, whichever was chosen more often in ``train``, and that rule's held-out margins."""
    margins = length_margins(heldout)
    if correctness(length_margins(train)).mean() >= 0.5:
        return "longer", margins
    return "shorter", [-margin for margin in margins]


def tf_idf(
    train: Sequence[Preference], heldout: Sequence[Preference], validation: Sequence[bool]
) -> tuple[str, list[float]]:
    """Logistic regression on the difference of the two responses' TF-IDF vectors: the features used, and the held-out
    margins in log-odds.

    Of ``FEATURES`` those are used that do best on the training pairs marked by ``validation`` when fitted to the other
    ones; the model is then fitted to all of ``train``.
    """
    inner = [pair for pair, marked in zip(train, validation, strict=True) if not marked]
    outer = [pair for pair, marked in zip(train, validation, strict=True) if marked]

    def validated(features: str) -> float:
        return float(correctness(_margins(inner, outer, features)).mean()) if inner and outer else 0.0

    best = max(FEATURES, key=validated)
    return best, _margins(train, heldout, best)


def _margins(train: Sequence[Preference], heldout: Sequence[Preference], features: str) -> list[float]:
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    ngrams, strength = FEATURES[features]
    vectorizer = TfidfVectorizer(ngram_range=ngrams, token_pattern=TOKEN)
    vectorizer.fit([text for pair in train for text in (pair.chosen, pair.rejected)])

    def differences(pairs: Sequence[Preference]) -> Any:
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        return vectorizer.transform(chosen) - vectorizer.transform(rejected)

    # Every pair stands both ways round at half the weight: the loss of (x, 1) is that of (-x, -1), so two classes are
    # made of one and nothing else changes.
    seen = differences(train)
    model = LogisticRegression(C=strength / 2, fit_intercept=False, max_iter=1000)
    model.fit(vstack([seen, -seen]), np.repeat([1, -1], len(train)))
    return model.decision_function(differences(heldout)).tolist()
