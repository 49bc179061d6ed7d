"""What a reward model is worth on held-out pairs: whom it gets right, whether its scores mean what they say, and how
far they follow length. Knows scores, texts and prompts; no run directories.

A pair counts once, seen from the side that the model prefers: its confidence is sigmoid(|chosen - rejected|), in
[1/2, 1], and it is right where the chosen response scores higher (a tie: half). Turning each pair at random instead
would add the noise of the draw and spread the pairs over twice as many bins, half of which mirror the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairlead.data.records import prompt_key
from fairlead.evaluation.baselines import length_margins
from fairlead.evaluation.metrics import (
    Estimate,
    Numbers,
    bootstrap_interval,
    correctness,
    pair_accuracy,
    pair_mean,
    paired_difference,
    per_prompt,
)
from fairlead.models.heads import RewardHeads
from fairlead.rollout.rewards import ModelReward
from fairlead.types import Conversation, Preference

Floats = NDArray[np.float64]

CONFIDENCE_BINS = 10
"""Bins of equal width over [1/2, 1], the same as 20 over [0, 1] for pairs seen from both sides."""
MARGIN_BINS = 4
LENGTH_BINS = 2
"""On each side of equal length."""
SCORE_BINS = 30
NAMED_SOURCES = 20
"""The sources with the most pairs; the others are taken together."""
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Judged:
    """Held-out pairs, where each is from, and what a reward model scored it. [P] each."""

    pairs: Sequence[Preference]
    sources: Sequence[str]
    chosen: Floats
    rejected: Floats
    cut: int
    """Pairs of which a side is longer than the model reads: its beginning was left out."""
    heads: RewardHeads | None = None
    head_scores: Floats | None = None
    """[P, 2, K] of several heads: chosen, rejected."""

    @property
    def margins(self) -> Floats:
        return self.chosen - self.rejected


def judge(reward: ModelReward, pairs: Sequence[Preference], sources: Sequence[str] = ()) -> Judged:
    """Both sides of each pair, scored."""
    texts: list[tuple[Conversation, str]] = [(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)]
    rows = reward.ids(texts)
    cut = sum(max(map(len, both)) > reward.max_length for both in zip(rows[::2], rows[1::2], strict=True))
    if reward.heads is None:
        scores = np.array(reward.score_ids(rows))
        return Judged(pairs, sources, scores[::2], scores[1::2], cut)
    each = reward.matrix_ids(rows).double()
    scores = reward.heads.combined(each).numpy()
    by_pair = each.numpy().reshape(len(pairs), 2, -1)
    return Judged(pairs, sources, scores[::2], scores[1::2], cut, reward.heads.saved, by_pair)


def pair_margins(reward: ModelReward, pairs: Sequence[Preference]) -> list[float]:
    """Score of the chosen response - score of the rejected one, for each pair."""
    return judge(reward, pairs).margins.tolist()


def measure(judged: Judged, *, seed: int) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """All figures of a reward model: estimates by name, and the bins and curves that are no single number.

    Lengths are in characters. What the data do not tell (a margin, several sources, a rejected response that is the
    longer one) is left out.
    """
    prompts, margins = [prompt_key(pair) for pair in judged.pairs], judged.margins
    longer = np.array(length_margins(judged.pairs))
    confidence, right = np.array(confidences(margins)), correctness(margins)

    def accuracy(chosen: Iterable[int]) -> dict[str, Any]:
        index = [int(i) for i in chosen]
        return pair_accuracy(margins[index], [prompts[i] for i in index], seed=seed).as_dict()

    metrics = {
        "accuracy": pair_accuracy(margins, prompts, seed=seed),
        "length_accuracy": pair_accuracy(longer, prompts, seed=seed),
    }
    for name, side in (("longer_chosen", longer > 0), ("longer_rejected", longer < 0)):
        if side.any():
            of_side = [prompt for prompt, on_side in zip(prompts, side, strict=True) if on_side]
            metrics[f"reward/accuracy_{name}"] = pair_accuracy(margins[side], of_side, seed=seed)
    metrics["reward/margin"] = paired_difference(judged.chosen, judged.rejected, prompts, seed=seed)
    metrics["reward/ece"] = calibration_error(confidence, right, prompts, seed=seed)
    metrics["reward/brier"] = pair_mean(brier(margins), prompts, seed=seed)
    metrics |= _length_correlations(judged, seed) | _of_heads(judged, prompts, seed)

    given = [(i, pair.margin) for i, pair in enumerate(judged.pairs) if pair.margin is not None]
    by_margin = _binned([margin for _, margin in given], [i for i, _ in given], MARGIN_BINS)
    by_length = [
        each
        for side in (longer < 0, longer == 0, longer > 0)
        for each in _binned(longer[side], np.flatnonzero(side), LENGTH_BINS)
    ]
    curves = {
        "pairs": len(prompts),
        "prompts": len(set(prompts)),
        "seed": seed,
        "by_source": [{"source": name, "accuracy": accuracy(index)} for name, index in _by_source(judged.sources)],
        "by_margin": []
        if len(by_margin) < 2
        else [extent | {"accuracy": accuracy(index)} for extent, index in by_margin],
        "by_length_difference": [extent | {"accuracy": accuracy(index)} for extent, index in by_length],
        "calibration": {
            "bins": CONFIDENCE_BINS,
            "ece_if_calibrated": chance_error(confidence, seed=seed),
            "curve": reliability(confidence, right, accuracy),
        },
        "scores": score_histogram(judged.chosen, judged.rejected),
    }
    return metrics, curves


def _of_heads(judged: Judged, prompts: Sequence[Hashable], seed: int) -> dict[str, Estimate]:
    """Accuracy of each of several heads; of an ensemble how far its members disagree, as a mean over responses."""
    if judged.heads is None or judged.head_scores is None:
        return {}
    margins = judged.head_scores[:, 0] - judged.head_scores[:, 1]
    found = {
        f"reward/accuracy/{name}": pair_accuracy(margins[:, k], prompts, seed=seed)
        for k, name in enumerate(judged.heads.names)
    }
    if judged.heads.kind == "ensemble":
        spread = judged.head_scores.std(axis=2).mean(axis=1)
        found["reward/disagreement"] = pair_mean(spread, prompts, seed=seed)
    return found


# --- calibration ---------------------------------------------------------------------------------------------------


def confidences(margins: Numbers) -> Floats:
    """sigmoid(|margin|): how probable the model holds its own preference to be right (Bradley-Terry). [P] -> [P]"""
    return (1 + np.tanh(np.abs(np.asarray(margins, float)) / 2)) / 2


def brier(margins: Numbers) -> Floats:
    """(1 - sigmoid(margin))^2, the squared error of the probability that the chosen response is better (Brier 1950): 0
    for certainty that is right, 1/4 for no preference, 1 for certainty that is wrong. [P] -> [P]"""
    return ((1 - np.tanh(np.asarray(margins, float) / 2)) / 2) ** 2


def bin_of(confidence: Numbers, bins: int = CONFIDENCE_BINS) -> NDArray[np.int64]:
    """Which of ``bins`` bins of equal width over [1/2, 1] each confidence lies in; an edge belongs to the upper bin, 1
    to the last. [P] -> [P]"""
    place = np.floor((np.asarray(confidence, float) - 0.5) * 2 * bins + 1e-9)
    return np.clip(place, 0, bins - 1).astype(np.int64)


def reliability(
    confidence: Floats,
    right: Floats,
    accuracy: Callable[[Iterable[int]], Any],
    bins: int = CONFIDENCE_BINS,
) -> list[dict[str, Any]]:
    """Mean confidence beside the share that is right, for each bin that holds pairs. ``accuracy`` gives that share of
    the pairs of some indices with its interval."""
    places = bin_of(confidence, bins)
    return [
        {
            "from": 0.5 + place / (2 * bins),
            "to": 0.5 + (place + 1) / (2 * bins),
            "confidence": float(confidence[places == place].mean()),
            "accuracy": accuracy(np.flatnonzero(places == place)),
        }
        for place in range(bins)
        if (places == place).any()
    ]


def expected_error(gaps: NDArray[Any], pairs: NDArray[Any]) -> NDArray[Any]:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, eq. 3): sum over bins of the bin's share of the
    pairs x |mean confidence - share right| = sum_b |sum of (confidence - right) in b| / pairs. [..., bins], [...] ->
    [...]"""
    return np.abs(gaps).sum(-1) / pairs


def calibration_error(
    confidence: Floats, right: Floats, prompts: Sequence[Hashable], *, seed: int, bins: int = CONFIDENCE_BINS
) -> Estimate:
    """``expected_error`` over the bins of ``bin_of``, in [0, 1]; ``n`` is the number of pairs.

    Chance alone moves every bin off the diagonal, so the error of a sample is too large, and those of resamples are
    larger still: the interval is the basic bootstrap's, 2 x error - the quantiles over resampled prompts, which takes
    the same amount off again; it reaches up to the error itself at least, and down to 0 at most.
    """
    places, gap = bin_of(confidence, bins), confidence - right
    columns = [per_prompt(np.where(places == place, gap, 0.0), prompts) for place in range(bins)]
    gaps, pairs = np.stack([sums for sums, _ in columns], axis=1), columns[0][1]
    error = float(expected_error(gaps.sum(0), pairs.sum()))
    if len(pairs) == 1:
        return Estimate(error, None, None, len(gap))
    resampled = [expected_error(weights @ gaps, weights @ pairs) for weights in _resamples(len(pairs), seed)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(error, max(0.0, float(2 * error - high)), max(error, float(2 * error - low)), len(gap))


def chance_error(confidence: Floats, *, seed: int, bins: int = CONFIDENCE_BINS, draws: int = 200) -> float:
    """The calibration error to be expected of a model of these confidences that is perfectly calibrated, on as many
    pairs: the mean over ``draws`` in which each pair is right with the probability that is its confidence."""
    rng, places = np.random.default_rng(seed), bin_of(confidence, bins)
    found = [
        np.abs(np.bincount(places, weights=confidence - (rng.random(len(confidence)) < confidence))).sum()
        for _ in range(draws)
    ]
    return float(np.mean(found)) / len(confidence)


# --- length --------------------------------------------------------------------------------------------------------


def spearman(a: Numbers, b: Numbers) -> float:
    """Spearman's rank correlation in [-1, 1] (1904): Pearson's of the ranks, equal values sharing the mean of theirs;
    nan where either side is constant. [n], [n] -> a number."""
    return rank_correlation(places_of(a), places_of(b), np.ones(len(a)))


def places_of(values: Numbers) -> NDArray[np.intp]:
    """The place of each value among the different ones, from 0."""
    return np.unique(np.asarray(values, float), return_inverse=True)[1]


def middle_ranks(places: NDArray[np.intp], weights: Floats) -> Floats:
    """Of each different value, in ascending order, the mean rank of the items that have it, from 0 to the sum of the
    weights; an item counts ``weights`` times."""
    counts = np.bincount(places, weights=weights)
    return np.cumsum(counts) - counts / 2


def rank_correlation(a: NDArray[np.intp], b: NDArray[np.intp], weights: Floats) -> float:
    """``spearman`` of items of which each stands there ``weights`` times, by the places of their values. [n] each."""
    deviations: list[Floats] = []
    total = weights.sum()
    for places in (a, b):
        ranks = middle_ranks(places, weights)[places]
        deviations.append(ranks - (weights * ranks).sum() / total)
    x, y = deviations
    # No `@`: the threads of BLAS cost more than they save on sums of one line.
    scale = np.sqrt((weights * x**2).sum() * (weights * y**2).sum())
    return float((weights * x * y).sum() / scale) if scale > 1e-9 else float("nan")


def _length_correlations(judged: Judged, seed: int) -> dict[str, Estimate]:
    """Of score and length over different responses: over all of them, and of the responses to one prompt, the mean
    over the prompts in which neither is constant."""
    scores: dict[str, dict[str, float]] = {}
    for pair, *both in zip(judged.pairs, judged.chosen, judged.rejected, strict=True):
        scores.setdefault(prompt_key(pair), {}).update(zip((pair.chosen, pair.rejected), map(float, both), strict=True))
    groups = [([float(len(text)) for text in of], list(of.values())) for of in scores.values()]
    found: dict[str, Estimate] = {}
    if (overall := clustered_spearman(groups, seed=seed)) is not None:
        found["reward/length_correlation"] = overall
    within = [rho for lengths, of in groups if not np.isnan(rho := spearman(lengths, of))]
    if within:
        found["reward/length_correlation_within"] = bootstrap_interval([[rho] for rho in within], seed=seed)
    return found


def clustered_spearman(groups: Sequence[tuple[Sequence[float], Sequence[float]]], *, seed: int) -> Estimate | None:
    """Spearman's correlation over all items of groups of ([m], [m]), with the percentile bootstrap over the groups,
    each resample ranked anew; ``n`` is the number of items. None where a side is constant."""
    a, b = (places_of([value for group in groups for value in group[side]]) for side in (0, 1))
    of_group = np.repeat(np.arange(len(groups)), [len(group[0]) for group in groups])
    mean = rank_correlation(a, b, np.ones(len(a)))
    if np.isnan(mean):
        return None
    if len(groups) == 1:
        return Estimate(mean, None, None, len(a))
    resampled = [rank_correlation(a, b, weights[of_group]) for weights in _resamples(len(groups), seed)]
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return Estimate(mean, float(low), float(high), len(a))


def _resamples(count: int, seed: int) -> Iterable[Floats]:
    """How often each of ``count`` prompts is drawn, ``RESAMPLES`` times."""
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(rng.integers(count, size=count), minlength=count).astype(float)


# --- bins ----------------------------------------------------------------------------------------------------------


def quantile_bins(values: Numbers, bins: int) -> list[NDArray[np.intp]]:
    """Indices of at most ``bins`` bins of about equally many values, the lowest first; equal values lie in one."""
    places = places_of(values)
    share = middle_ranks(places, np.ones(len(places))) / max(len(places), 1)
    bin_of_value = np.floor(share * bins).astype(int)
    return [np.flatnonzero(bin_of_value[places] == place) for place in np.unique(bin_of_value)]


def score_histogram(chosen: Floats, rejected: Floats, bins: int = SCORE_BINS) -> dict[str, list[float]]:
    """Counts of both sides over the same ``bins`` bins of equal width, and their ``bins`` + 1 edges."""
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins)
    counts = {
        name: np.histogram(side, edges)[0].tolist() for name, side in (("chosen", chosen), ("rejected", rejected))
    }
    return {"edges": edges.tolist(), **counts}


def _binned(values: Numbers, index: Numbers, bins: int) -> list[tuple[dict[str, float], NDArray[Any]]]:
    """The extent of each bin of some pairs' values, and the indices of its pairs."""
    values, index = np.asarray(values, float), np.asarray(index, int)
    return [
        ({"from": float(values[of].min()), "to": float(values[of].max())}, index[of])
        for of in quantile_bins(values, bins)
    ]


def _by_source(sources: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The indices of each source's pairs, the largest first; nothing where there is one source."""
    counts = Counter(sources)
    if len(counts) < 2:
        return []
    named = [name for name, _ in counts.most_common(NAMED_SOURCES)]
    groups: dict[str, list[int]] = {name: [] for name in named}
    rest = f"{len(counts) - len(named)} others"
    for index, source in enumerate(sources):
        groups.setdefault(source if source in groups else rest, []).append(index)
    return list(groups.items())
