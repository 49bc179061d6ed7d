"""Figures of a reward model: the mathematics by hand, and what an evaluation leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.evaluation.conftest import PAIRS, TINY, Runs, settings

from fairlead.errors import ConfigError
from fairlead.evaluation import evaluate
from fairlead.evaluation.metrics import Numbers, correctness
from fairlead.evaluation.reward_quality import (
    Judged,
    bin_of,
    brier,
    calibration_error,
    chance_error,
    clustered_spearman,
    confidences,
    judge,
    measure,
    places_of,
    quantile_bins,
    rank_correlation,
    score_histogram,
    spearman,
)
from fairlead.models.heads import RewardHeads
from fairlead.pipeline import run_pipeline
from fairlead.rollout.rewards.models import Heads
from fairlead.runner import train
from fairlead.types import Preference

LN3 = math.log(3)
"""Its sigmoid is 3/4."""


def by_scipy(a: Any, b: Any) -> float:
    found: Any = spearmanr(a, b)
    return float(found.statistic)


def judged(rows: Sequence[tuple[str, str, str, float, float]], margins: Sequence[float | None] = ()) -> Judged:
    """(prompt, chosen, rejected, score of chosen, score of rejected) each, of one source."""
    given = margins or [None] * len(rows)
    pairs = [Preference(p, c, r, margin) for (p, c, r, _, _), margin in zip(rows, given, strict=True)]
    chosen, rejected = (np.array([row[side] for row in rows], float) for side in (3, 4))
    return Judged(pairs, ["x"] * len(rows), chosen, rejected, 0)


# --- calibration ---------------------------------------------------------------------------------------------------


def test_confidence_is_the_sigmoid_of_the_margin_whichever_side_is_preferred():
    assert confidences([LN3, -LN3, 0.0, 1e4]) == pytest.approx([0.75, 0.75, 0.5, 1.0])


def test_brier_is_the_squared_error_of_the_probability_that_chosen_is_better():
    # sigmoid: 3/4, 1/4, 1/2, 0.
    assert brier([LN3, -LN3, 0.0, -1e4]) == pytest.approx([1 / 16, 9 / 16, 1 / 4, 1.0])


def test_an_edge_belongs_to_the_bin_above_it_and_certainty_to_the_last():
    assert bin_of([0.5, 0.549, 0.55, 0.6, 0.95, 1.0], 10).tolist() == [0, 0, 1, 2, 9, 9]


def error_of(confidence: Numbers, right: Numbers, **options: Any) -> float:
    prompts = range(len(right))
    return calibration_error(np.array(confidence), np.array(right), prompts, seed=0, **options).mean


def test_the_calibration_error_by_hand():
    # 0.72: three of four right, gap 0.03; 0.92: one of two, gap 0.42 -> (4 x 0.03 + 2 x 0.42) / 6.
    confidence, right = [0.72] * 4 + [0.92] * 2, [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert error_of(confidence, right) == pytest.approx(0.16)
    # One bin for all: mean confidence 4.72 / 6, share right 4 / 6.
    assert error_of(confidence, right, bins=1) == pytest.approx(0.12)


def test_bins_that_err_in_opposite_directions_do_not_cancel_each_other():
    assert error_of([0.6, 0.6, 0.9, 0.9], [1.0, 1.0, 1.0, 0.0]) == pytest.approx(0.4)


def test_folding_gives_the_error_of_both_orientations_in_twice_as_many_bins():
    rng = np.random.default_rng(3)
    margins = rng.normal(0.5, 1.5, size=500)
    # Every pair stands there as (p, right) and turned round as (1 - p, 1 - right), in 20 bins over [0, 1].
    p = 1 / (1 + np.exp(-margins))
    probability, outcome = np.concatenate([p, 1 - p]), np.repeat([1.0, 0.0], len(p))
    places = np.minimum((probability * 20).astype(int), 19)
    gaps = [abs((probability - outcome)[places == place].sum()) for place in range(20)]
    assert error_of(confidences(margins), correctness(margins)) == pytest.approx(sum(gaps) / 1000)


def drawn(n: int, heat: float, seed: int) -> tuple[Any, Any]:
    """Confidences of n pairs, and whether each is right, with the probability that ``heat`` x the margin gives."""
    rng = np.random.default_rng(seed)
    margins = np.abs(rng.normal(0, 2, size=n))
    return confidences(margins), (rng.random(n) < confidences(heat * margins)).astype(float)


def integrated_error() -> float:
    """Of margins |N(0, 2)| that are twice too large: the sum over ten bins of |integral of confidence - sigmoid of half
    the margin|."""
    margin = np.linspace(0, 30, 600_001)
    density = 2 * np.exp(-(margin**2) / 8) / math.sqrt(8 * math.pi)
    gap = (1 / (1 + np.exp(-margin)) - 1 / (1 + np.exp(-margin / 2))) * density * (margin[1] - margin[0])
    edges = [math.log(p / (1 - p)) for p in np.arange(0.55, 0.99, 0.05)]
    return sum(abs(part.sum()) for part in np.split(gap, np.searchsorted(margin, edges)))


def test_the_interval_of_the_calibration_error_is_free_of_what_chance_adds():
    # Of a calibrated model the true error is 0; a percentile interval over resamples would never reach it.
    calibrated = [calibration_error(*drawn(1000, 1.0, seed), range(1000), seed=0) for seed in range(12)]
    assert sum(e.low == 0.0 for e in calibrated) >= 6
    assert all(e.low is not None and e.high is not None and e.low <= e.mean <= e.high for e in calibrated)
    # Half of the margin would be right: 0.1031 is the true error.
    truth = integrated_error()
    hot = [calibration_error(*drawn(1000, 0.5, seed), range(1000), seed=0) for seed in range(12)]
    assert sum(e.low is not None and e.high is not None and e.low <= truth <= e.high for e in hot) >= 9


def test_pairs_of_one_prompt_are_resampled_together():
    confidence, right = drawn(100, 0.5, 0)
    alone = calibration_error(confidence, right, range(100), seed=0)
    # Every pair four times under its prompt: nothing is known better.
    together = calibration_error(np.repeat(confidence, 4), np.repeat(right, 4), [i // 4 for i in range(400)], seed=0)
    assert (together.mean, together.low, together.high) == pytest.approx((alone.mean, alone.low, alone.high))
    assert (alone.n, together.n) == (100, 400)
    assert calibration_error(confidence, right, ["p"] * 100, seed=0).low is None


def test_the_error_that_chance_gives_a_calibrated_model_by_hand():
    # One pair of confidence c is off by 1 - c with probability c, else by c: 2 c (1 - c) = 0.375.
    assert chance_error(np.array([0.75]), seed=0, draws=20000) == pytest.approx(0.375, abs=0.01)
    # Certainty is never wrong.
    assert chance_error(np.array([1.0, 1.0]), seed=0) == 0.0


# --- length --------------------------------------------------------------------------------------------------------


def test_spearmans_correlation_by_hand():
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = -1, 1, -1, 1: 1 - 24 / 60.
    assert spearman([10, 20, 30, 40], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert spearman([1, 2], [5, 3]) == -1.0
    assert math.isnan(spearman([1, 2, 3], [7, 7, 7]))


def test_ties_share_the_mean_of_their_ranks_as_in_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(5, size=60), rng.integers(4, size=60)
    assert spearman(a, b) == pytest.approx(by_scipy(a, b))


def test_weights_stand_for_items_that_are_there_several_times():
    rng = np.random.default_rng(1)
    a, b, times = rng.integers(6, size=20), rng.normal(size=20), rng.integers(4, size=20)
    wanted = by_scipy(np.repeat(a, times), np.repeat(b, times))
    assert rank_correlation(places_of(a), places_of(b), times.astype(float)) == pytest.approx(wanted)


def test_the_correlation_over_groups_is_that_of_all_items_and_its_interval_resamples_groups():
    rng = np.random.default_rng(2)
    groups = [(list(rng.normal(size=3)), list(rng.normal(size=3))) for _ in range(30)]
    found = clustered_spearman(groups, seed=0)
    assert found is not None and found.low is not None and found.high is not None
    a, b = ([value for group in groups for value in group[side]] for side in (0, 1))
    assert found.mean == pytest.approx(by_scipy(a, b))
    assert found.n == 90
    # As wide as the standard error of 90 independent items lets expect: 2 x 1.96 / sqrt(89).
    assert found.high - found.low == pytest.approx(0.416, rel=0.3)
    # The same items twice over, each group beside its copy: nothing is known better.
    doubled = clustered_spearman([(a * 2, b * 2) for a, b in groups], seed=0)
    assert doubled is not None and (doubled.low, doubled.high) == pytest.approx((found.low, found.high))


def test_a_correlation_that_cannot_be_had_is_none():
    assert clustered_spearman([([1.0, 2.0], [3.0, 3.0])], seed=0) is None
    alone = clustered_spearman([([1.0, 2.0], [3.0, 4.0])], seed=0)
    assert alone is not None and (alone.mean, alone.low, alone.n) == (1.0, None, 2)


# --- bins ----------------------------------------------------------------------------------------------------------


def test_quantile_bins_hold_equally_many_and_part_no_equal_values():
    assert [of.tolist() for of in quantile_bins([4, 1, 3, 2], 2)] == [[1, 3], [0, 2]]
    grades = [1] * 8 + [2] * 9 + [3] * 6 + [4.5] * 9
    assert [len(of) for of in quantile_bins(grades, 4)] == [8, 9, 6, 9]
    assert [len(of) for of in quantile_bins([2.0] * 5, 4)] == [5]
    assert quantile_bins([], 4) == []


def test_both_sides_are_counted_over_the_same_edges():
    found = score_histogram(np.array([3.0, 4.0, 4.0]), np.array([0.0, 1.0, 2.5]), 2)
    assert found == {"edges": [0.0, 2.0, 4.0], "chosen": [0, 3], "rejected": [2, 1]}


# --- all of them ---------------------------------------------------------------------------------------------------

# Margins 2, -1, 1, 0, -3, 1; the rejected response is the longer one in the second and the fifth.
ROWS = [
    ("p", "long one", "short", 2.0, 0.0),
    ("p", "abc", "a longer text", 0.0, 1.0),
    ("q", "four", "same", 2.0, 1.0),
    ("r", "words", "w", 1.0, 1.0),
    ("s", "no", "yes, indeed", -1.0, 2.0),
    ("t", "a b c", "d", 1.0, 0.0),
]


def test_the_figures_of_six_pairs_by_hand():
    metrics, curves = measure(judged(ROWS, [1.0, 1.0, 2.0, 3.0, None, 4.0]), seed=0)
    assert {name: (round(e.mean, 4), e.n) for name, e in metrics.items() if "accuracy" in name} == {
        "accuracy": (round(3.5 / 6, 4), 6),
        "length_accuracy": (round(3.5 / 6, 4), 6),
        "reward/accuracy_longer_chosen": (round(2.5 / 3, 4), 3),
        "reward/accuracy_longer_rejected": (0.0, 2),
    }
    assert metrics["reward/margin"].mean == 0.0
    wanted = [(1 - 1 / (1 + math.exp(-margin))) ** 2 for margin in (2, -1, 1, 0, -3, 1)]
    assert metrics["reward/brier"].mean == pytest.approx(sum(wanted) / 6)
    # Within: p holds (8, 2), (5, 0), (3, 0), (13, 1): ranks 3 2 1 4 and 4 1.5 1.5 3, whose deviations give 3.5 over
    # sqrt(5 x 4.5); q is of one length, r of one score, s goes with length, and so does t.
    within = metrics["reward/length_correlation_within"]
    assert (within.mean, within.n) == (pytest.approx((3.5 / math.sqrt(22.5) + 1 + 1) / 3), 3)
    texts = {(p, c): score for p, c, _, score, _ in ROWS} | {(p, r): score for p, _, r, _, score in ROWS}
    overall = by_scipy([len(text) for _, text in texts], list(texts.values()))
    assert metrics["reward/length_correlation"].mean == pytest.approx(overall)

    by_length = [(row["from"], row["to"], row["accuracy"]["mean"]) for row in curves["by_length_difference"]]
    assert by_length == [(-10, -10, 0.0), (-9, -9, 0.0), (0, 0, 1.0), (3, 3, 1.0), (4, 4, 0.75)]
    by_margin = [(row["from"], row["to"], row["accuracy"]["mean"]) for row in curves["by_margin"]]
    assert by_margin == [(1, 1, 0.5), (2, 3, 0.75), (4, 4, 1.0)]
    assert curves["by_source"] == []
    assert (curves["pairs"], curves["prompts"]) == (6, 5)


def test_the_reliability_curve_by_hand():
    # Confidences 0.7311 (three: -1, 1, 1), 0.8808, 0.5 (the tie) and 0.9526.
    curve = measure(judged(ROWS), seed=0)[1]["calibration"]["curve"]
    points = [
        (row["from"], row["to"], row["confidence"], row["accuracy"]["mean"], row["accuracy"]["n"]) for row in curve
    ]
    wanted = [(0.5, 0.55, 0.5, 0.5, 1), (0.7, 0.75, 0.731059, 2 / 3, 3), (0.85, 0.9, 0.880797, 1, 1)]
    assert points == [pytest.approx(row, abs=1e-6) for row in [*wanted, (0.95, 1.0, 0.952574, 0, 1)]]


def test_what_the_data_do_not_tell_is_left_out():
    metrics, curves = measure(judged([("p", "aa", "b", 1.0, 0.0), ("q", "cc", "d", 1.0, 0.0)], [2.0, 2.0]), seed=0)
    assert "reward/accuracy_longer_rejected" not in metrics
    assert metrics["reward/accuracy_longer_chosen"].mean == 1.0
    assert (curves["by_margin"], curves["by_source"]) == ([], [])
    flat = measure(judged([("p", "aa", "b", 1.0, 1.0)]), seed=0)[0]
    assert not any("correlation" in name for name in flat)


def test_the_largest_sources_are_named_and_the_others_taken_together():
    names = ["big"] * 30 + [f"s{i:02d}" for i in range(25) for _ in range(2)]
    rows = [(f"p{i}", "aa", "b", float(i % 2), 0.5) for i in range(len(names))]
    found = judged(rows)
    by_source = measure(Judged(found.pairs, names, found.chosen, found.rejected, 0), seed=0)[1]["by_source"]
    assert [row["source"] for row in by_source][:2] == ["big", "s00"]
    assert by_source[-1]["source"] == "6 others" and by_source[-1]["accuracy"]["n"] == 12
    assert sum(row["accuracy"]["n"] for row in by_source) == len(names)
    assert by_source[0]["accuracy"]["mean"] == 0.5


class Fake:
    """A reward model whose tokens are letters: it reads three of them and scores by the last."""

    max_length, heads = 3, None

    def ids(self, texts: Sequence[tuple[Any, Any]]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, prompt + text)) for prompt, text in texts]

    def score_ids(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        return [float(row[-1]) for row in rows]


def test_pairs_read_without_their_beginning_are_counted_once():
    pairs = [Preference("p", "ab", "c"), Preference("p", "abc", "abd"), Preference("q", "d", "efgh")]
    fake: Any = Fake()
    found = judge(fake, pairs, ["x"] * 3)
    assert found.margins.tolist() == [-1.0, -1.0, ord("d") - ord("h")]
    assert found.cut == 2


class FakeHeads(Fake):
    """Two heads: the last letter, and how many letters there are; the lower one is the score."""

    heads: Any = Heads(RewardHeads("ensemble", ("last", "length"), "minimum"))

    def matrix_ids(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor([[float(row[-1]), float(len(row))] for row in rows])


def test_each_of_several_heads_is_measured_beside_their_combination_by_hand():
    pairs = [Preference("p", "ab", "c"), Preference("q", "a", "bcd")]
    fake: Any = FakeHeads()
    found = judge(fake, pairs, ["x"] * 2)
    # Letters: b 98, c 99, a 97, d 100; lengths with the prompt: 3, 2, 2, 4, which are the lower.
    assert (found.chosen.tolist(), found.rejected.tolist()) == ([3.0, 2.0], [2.0, 4.0])
    metrics, _ = measure(found, seed=0)
    assert metrics["accuracy"].mean == 0.5
    assert metrics["reward/accuracy/last"].mean == 0.0
    assert metrics["reward/accuracy/length"].mean == 0.5
    spreads = [(98 - 3) / 2, (99 - 2) / 2, (97 - 2) / 2, (100 - 4) / 2]
    assert metrics["reward/disagreement"].mean == pytest.approx(sum(spreads) / 4)
    attributes = replace(found, heads=RewardHeads("attributes", ("last", "length")))
    assert "reward/disagreement" not in measure(attributes, seed=0)[0]


# --- what an evaluation leaves -------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_an_evaluation_writes_metrics_and_curves_by_source(runs: Runs, tmp_path: Path):
    named = [{**row, "source": "kitchen" if i % 2 else "shop"} for i, row in enumerate(PAIRS[:6])]
    paths = [write(tmp_path / "named.jsonl", named), write(tmp_path / "plain.jsonl", PAIRS[6:])]
    found = evaluate([runs.reward], pairs=paths)["reward"]
    folder = runs.reward / "evaluation"
    assert json.loads((folder / "metrics.json").read_text("utf-8"))["metrics"] == found
    quality = json.loads((folder / "reward_quality.json").read_text("utf-8"))
    assert {row["source"]: row["accuracy"]["n"] for row in quality["by_source"]} == {
        "kitchen": 3,
        "shop": 3,
        str(paths[1]): 6,
    }
    assert (quality["run"], quality["pairs"], quality["seed"]) == ("reward", 12, 0)
    assert sum(quality["scores"]["chosen"]) == sum(quality["scores"]["rejected"]) == 12
    assert sum(row["accuracy"]["n"] for row in quality["calibration"]["curve"]) == 12
    for name in ("reward/ece", "reward/brier", "reward/length_correlation", "reward/accuracy_longer_chosen"):
        assert set(found[name]) == {"mean", "low", "high", "n"}, name
    # "No." is always the shorter one and scores lower: learned in 20 steps.
    assert found["reward/length_correlation_within"]["mean"] == 1.0
    assert "reward/accuracy_longer_rejected" not in found


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["whole", "adapter"])
def test_an_ensemble_is_evaluated_with_each_member_and_their_disagreement(adapter: Any, runs: Runs, tmp_path: Path):
    more = {"model.path": str(runs.reference), "model.adapter": adapter, "train.steps": 20}
    more |= {"reward.members": 3, "reward.combine": "minimum"}
    run = train({"algorithm": "reward"}, settings(tmp_path, "ensemble", **more), data=PAIRS).path
    found = evaluate([run], pairs=PAIRS)["ensemble"]
    members = [found[f"reward/accuracy/member_{k}"]["mean"] for k in (1, 2, 3)]
    assert found["accuracy"]["mean"] == 1.0 and min(members) > 0.8
    assert found["reward/disagreement"]["mean"] > 0
    assert found["reward/disagreement"]["n"] == 12


def test_pairs_beyond_the_models_positions_are_counted(runs: Runs):
    long = {**PAIRS[0], "prompt": "tea " * 80}
    evaluate([runs.reward], pairs=[long, *PAIRS])
    counts = json.loads((runs.reward / "evaluation" / "metrics.json").read_text("utf-8"))["data"]["pairs"]
    assert counts == {"read": 13, "kept": 13, "cut": 1, "dropped": {}}


def test_a_score_cannot_take_the_name_of_a_reward_models_metric(runs: Runs):
    with pytest.raises(ConfigError, match="name of a metric: reward/ece"):
        evaluate([runs.reward], pairs=PAIRS, scores={"reward/ece": lambda **_: []})


def test_a_pipelines_evaluation_leaves_them_and_its_report_shows_them(tmp_path: Path):
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    train = settings(tmp_path, "reward", **{"data.path": str(data), "model.scratch": TINY})
    stage = {key: value for key, value in train.items() if not key.startswith("run.")}
    stages = {
        "reward": {"train": {"algorithm": "reward"}, **stage},
        "evaluation": {"evaluate": ["reward"], "pairs": [str(data)]},
        "page": {"report": ["reward"]},
    }
    summary = run_pipeline({"stages": stages}, folder=tmp_path / "all", say=lambda _: None)
    metrics = json.loads((tmp_path / "all" / "evaluation" / "metrics.json").read_text("utf-8"))["reward"]
    assert metrics == summary["models"]["reward"]["metrics"]
    assert metrics["reward/ece"]["n"] == 12
    assert (tmp_path / "all" / "reward" / "evaluation" / "reward_quality.json").is_file()
    page = (tmp_path / "all" / "page.html").read_text("utf-8")
    assert 'id="rewards"' in page and "reward/length_correlation" in page
