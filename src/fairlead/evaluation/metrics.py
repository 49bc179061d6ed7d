"""Statistics of an evaluation: means with intervals over prompts, and the test between two runs on the same prompts.

Knows numbers and words, no models and no files. The prompt is what is drawn at random, so it is the prompt that is
resampled, with all its draws or pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[Any]

EXACT_PROMPTS = 13
"""Up to this many prompts the sign-flip test goes through all 2^n assignments."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval over ``n`` prompts or pairs; no interval can be had from one."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_interval(
    groups: Sequence[Sequence[float]], *, seed: int, resamples: int = 1000, level: float = 0.95
) -> Estimate:
    """Mean over prompts of the mean over a prompt's draws; ``groups`` holds one prompt's values each. In their unit.

    mean = (1/n) sum_i (1/m_i) sum_j x_ij, interval by ``ratio_interval``.
    """
    means = [math.fsum(group) / len(group) for group in groups]
    return ratio_interval(means, np.ones(len(means)), seed=seed, resamples=resamples, level=level)


def ratio_interval(
    numerators: Numbers,
    denominators: Numbers,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Estimate:
    """sum_i a_i / sum_i b_i over prompts i, in units of a/b. [n], [n] -> an estimate of n prompts.

    The interval is the percentile bootstrap (Efron 1979): n prompts are drawn with replacement, the ratio is taken
    anew, and the outer (1 - level) / 2 of ``resamples`` such ratios are cut off at both ends. Raises ValueError where
    there is no prompt.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    count = len(above)
    if not count:
        raise ValueError("an estimate needs at least one prompt")
    mean = float(above.sum() / below.sum())
    if count == 1:
        return Estimate(mean, None, None, 1)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(count, size=count) for _ in range(resamples))
    ratios = [above[index].sum() / below[index].sum() for index in drawn]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), count)


def distinct_n(groups: Sequence[Sequence[str]], n: int, *, level: float = 0.95) -> Estimate:
    """Different n-grams / all n-grams of words, over all responses together (Li et al. 2016), in [0, 1].

    ``groups`` holds one prompt's responses each; words are parted by white space; 0 where no response has n words.
    The interval leaves out one prompt at a time (jackknife): mean +- z sqrt((n - 1) / n sum_i (d_-i - d_mean)^2). A
    bootstrap would draw prompts twice and so count repetitions that are none: its interval lies below the estimate.
    """
    counts = [Counter(gram for text in group for gram in _ngrams(text.split(), n)) for group in groups]
    total = sum(counts, Counter[tuple[str, ...]]())
    mean = _share(len(total), total.total())
    if len(groups) < 2:
        return Estimate(mean, None, None, len(groups))
    without = np.array(
        [
            _share(len(total) - sum(total[gram] == k for gram, k in own.items()), total.total() - own.total())
            for own in counts
        ]
    )
    error = math.sqrt((len(groups) - 1) * without.var())
    margin = NormalDist().inv_cdf((1 + level) / 2) * error
    return Estimate(mean, max(0.0, mean - margin), min(1.0, mean + margin), len(groups))


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, seed: int) -> Estimate:
    """Probability in [0, 1] that a response of ours scores above one of theirs to the same prompt, a tie counting half.

    Groups are one prompt's scores; within a prompt every draw of ours meets every draw of theirs.
    """
    shares = [(np.sign(np.subtract.outer(a, b)).mean() + 1) / 2 for a, b in zip(ours, theirs, strict=True)]
    return ratio_interval(shares, np.ones(len(shares)), seed=seed)


def correctness(margins: Numbers) -> NDArray[np.float64]:
    """1 where the chosen response scores higher (margin > 0), 1/2 at a tie, 0 where it scores lower. [P] -> [P]"""
    return (np.sign(np.asarray(margins, float)) + 1) / 2


def pair_accuracy(margins: Numbers, prompts: Sequence[Hashable], *, seed: int) -> Estimate:
    """Share of pairs in [0, 1] whose chosen response scores higher, a tie counting half; ``n`` is the number of pairs.

    ``prompts`` names each pair's prompt: pairs of one prompt are resampled together.
    """
    return pair_mean(correctness(margins), prompts, seed=seed)


def paired_difference(
    ours: Numbers,
    theirs: Numbers,
    prompts: Sequence[Hashable],
    *,
    seed: int,
) -> Estimate:
    """Mean of ours - theirs over items measured by both, in their unit; ``n`` is the number of items."""
    return pair_mean(np.subtract(ours, theirs), prompts, seed=seed)


def pair_mean(values: Numbers, prompts: Sequence[Hashable], *, seed: int) -> Estimate:
    """Mean over pairs, or other items of prompts, in their unit; those of one prompt are resampled together, and ``n``
    is the number of items."""
    sums, items = per_prompt(np.asarray(values, float), prompts)
    return replace(ratio_interval(sums, items, seed=seed), n=len(prompts))


def sign_flip_p_value(differences: Numbers, prompts: Sequence[Hashable], *, seed: int, flips: int = 9999) -> float:
    """Two-sided p-value of the paired permutation test (Fisher 1935) of no difference.

    If nothing differs, each prompt's sum of differences could as well bear the other sign: p is the share of sign
    assignments whose total is at least as far from zero as the one seen. All are tried up to ``EXACT_PROMPTS`` prompts
    that differ; else ``flips`` random ones and the one seen.
    """
    sums, _ = per_prompt(np.asarray(differences, float), prompts)
    sums = sums[sums != 0]
    seen = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if len(sums) <= EXACT_PROMPTS:
        signs = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1) * 2 - 1
        return float(np.mean(np.abs(signs @ sums) >= seen))
    rng = np.random.default_rng(seed)
    beyond = sum(abs((rng.integers(2, size=len(sums)) * 2 - 1) @ sums) >= seen for _ in range(flips))
    return float((beyond + 1) / (flips + 1))


def perplexity(nll: Sequence[float], tokens: Sequence[int], *, seed: int) -> Estimate:
    """exp(sum of nats / sum of tokens) over texts; ``nll`` and ``tokens`` are one text's sums, ``n`` counts texts."""
    nats = ratio_interval(nll, tokens, seed=seed)
    low, high = (None if bound is None else math.exp(bound) for bound in (nats.low, nats.high))
    return Estimate(math.exp(nats.mean), low, high, nats.n)


def per_prompt(values: NDArray[np.float64], prompts: Sequence[Hashable]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The sum and the number of the values of each prompt."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    index = np.array([places[prompt] for prompt in prompts], int)
    return np.bincount(index, weights=values), np.bincount(index)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
