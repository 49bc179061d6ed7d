"""The section of a reward model: what stands in it, and what becomes of figures that are missing or odd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.report.run_directories import estimate, responses, write_run

from fairlead.report import build_report
from fairlead.report.charts import histogram, reliability
from fairlead.report.read import Estimate, read_run
from fairlead.report.reward import reward_view

METRICS = {
    "accuracy": estimate(0.7, 0.05, 400),
    "length_accuracy": estimate(0.55, 0.05, 400),
    "reward/accuracy_longer_chosen": estimate(0.83, 0.04, 220),
    "reward/accuracy_longer_rejected": estimate(0.52, 0.06, 170),
    "reward/ece": estimate(0.09, 0.02, 400),
    "reward/length_correlation": estimate(0.46, 0.04, 800),
}
QUALITY: dict[str, Any] = {
    "run": "reward",
    "pairs": 400,
    "by_source": [
        {"source": "kitchen", "accuracy": estimate(0.61, 0.04, 250)},
        {"source": "<b>shop</b>", "accuracy": estimate(0.85, 0.04, 150)},
    ],
    "by_margin": [{"from": 0.5, "to": 1.25, "accuracy": estimate(0.601, 0.05, 200)}],
    "by_length_difference": [
        {"from": -184.0, "to": -64.0, "accuracy": estimate(0.407, 0.05, 85)},
        {"from": 0.0, "to": 0.0, "accuracy": {"mean": 1.0, "low": None, "high": None, "n": 10}},
    ],
    "calibration": {
        "bins": 10,
        "ece_if_calibrated": 0.0391,
        "curve": [
            {"from": 0.5, "to": 0.55, "confidence": 0.53, "accuracy": estimate(0.5, 0.05, 300)},
            {"from": 0.9, "to": 0.95, "confidence": 0.92, "accuracy": estimate(0.8, 0.05, 100)},
        ],
    },
    "scores": {"edges": [-1.0, 0.0, 1.0], "chosen": [150, 250], "rejected": [220, 180]},
}


def reward_run(folder: Path, quality: Any = QUALITY) -> Path:
    evaluation = {"run": folder.name, "pairs": 400, "metrics": METRICS}
    return write_run(folder, evaluation_metrics=evaluation, evaluation_reward_quality=quality)


def text_of(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.read_text("utf-8").partition("</style>")[2]).split())


def test_a_reward_models_section_holds_its_words_tables_and_charts(tmp_path: Path):
    page = build_report([reward_run(tmp_path / "reward")], tmp_path / "page.html")
    section = page.read_text("utf-8").partition('<h2 id="rewards">')[2].partition('<h2 id="curves">')[0]
    assert section.count("<svg") == 2
    for words in (
        "Expected calibration error 0.0900 [0.0700, 0.1100] over 10 bins, where chance alone would give a calibrated "
        "model 0.039; accuracy 0.830 [0.790, 0.870] where the chosen response is the longer one and 0.520 "
        "[0.460, 0.580] where the rejected response is the longer one.",
        "kitchen 0.610 [0.570, 0.650] 250",
        "&lt;b&gt;shop&lt;/b&gt; 0.850 [0.810, 0.890] 150",
        "0.5 to 1.25 0.601 [0.551, 0.651] 200",
        "\u2212184 to \u221264 0.407 [0.357, 0.457] 85",
        "0 1.000 10",
        "reward/length_correlation 0.46 [0.420, 0.500] 800",
    ):
        assert words in text_of(page), words


def test_metrics_that_a_reward_model_alone_has_stand_beside_no_policys(tmp_path: Path):
    policy = {"run": "sft", "prompts": 8, "draws": 2, "metrics": {"score": estimate(0.5, 0.1)}}
    runs = [reward_run(tmp_path / "reward"), write_run(tmp_path / "sft", evaluation_metrics=policy)]
    page = build_report(runs, tmp_path / "page.html")
    heads = re.findall(r'<th scope="col" class="num">([^<]*)</th>', page.read_text("utf-8").partition("</table>")[0])
    assert heads == ["score", "length_accuracy", "accuracy"]
    assert "evaluated in different ways" not in text_of(page)


def test_a_page_without_a_reward_model_has_no_such_section(tmp_path: Path):
    run = write_run(tmp_path / "sft", evaluation_responses=responses({"p": [1.0]}))
    assert "rewards" not in build_report([run], tmp_path / "page.html").read_text("utf-8")
    assert "evaluation/reward_quality.json" not in read_run(run).missing


def test_odd_figures_are_left_out_and_torn_ones_named(tmp_path: Path):
    odd = {
        "by_source": [{"accuracy": 3}, {"source": None, "accuracy": estimate(0.5, 0.1)}, 7],
        "by_margin": "many",
        "by_length_difference": [{"from": None, "to": "x", "accuracy": {"mean": 0.25}}],
        "calibration": {"curve": [{"confidence": None, "accuracy": estimate(0.5, 0.1)}], "bins": None},
        "scores": {"edges": [0.0, 1.0], "chosen": [1, 2], "rejected": [None]},
    }
    view = reward_view(read_run(reward_run(tmp_path / "odd", odd)))
    assert view is not None
    assert (view["reliability"], view["histogram"]) == (None, None)
    assert [(table["title"], [name for name, _ in table["rows"]]) for table in view["tables"]] == [
        ("Source", ["not named"]),
        ("Characters by which the chosen response is the longer", ["\u2013"]),
    ]
    build_report([tmp_path / "odd"], tmp_path / "page.html")
    torn = reward_run(tmp_path / "torn")
    (torn / "evaluation" / "reward_quality.json").write_text('{"run": "re')
    assert read_run(torn).damage == ("evaluation/reward_quality.json is not readable",)
    assert reward_view(read_run(torn)) is None


def test_a_bin_that_is_right_more_often_stands_higher_and_one_of_more_pairs_is_larger():
    points = [(0.55, Estimate(0.5, 0.4, 0.6, 100)), (0.75, Estimate(0.7, n=25)), (0.95, Estimate(0.9, 0.8, 1.0, 4))]
    svg = str(reliability(points, label="confidence", key="a"))
    dots = re.findall(r'<use href="#(\w+)" x="([\d.]+)" y="([\d.]+)"[^>]*series-1', svg)
    (x0, y0), (x1, y1), (x2, y2) = ((float(x), float(y)) for _, x, y in dots)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1) and x0 < x1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.1) and y0 > y1
    # Radii in points: (2.5 + 5 sqrt(share of the most)) / 2 for shares 1, 1/4 and 1/25.
    radii = [re.search(f'id="{shape}" d="M 0 ([\\d.]+)', svg) for shape, _, _ in dots]
    assert [float(found[1]) for found in radii if found] == [3.75, 2.5, 1.75]
    assert svg == str(reliability(points, label="confidence", key="a"))


def test_the_sides_of_a_histogram_have_the_colours_of_the_legend():
    svg = str(histogram([0.0, 1.0, 2.0], [("chosen", [1, 3]), ("rejected", [2, 0])], label="score", key="a"))
    assert svg.count("stroke: var(--series-1)") == svg.count("stroke: var(--series-2)") == 1
    assert svg.count("fill: var(--series-1)") == svg.count("fill: var(--series-2)") == 1
