"""Numbers as drawings."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from fairlead.report.charts import Series, curves, panels, running_mean, scatter, thin


def test_thinning_keeps_both_ends_and_a_spike():
    x = np.arange(5000.0)
    y = np.zeros(5000)
    y[1234] = 7.0
    thin_x, thin_y = thin(x, y, 400)
    assert len(thin_x) <= 400
    assert (thin_x[0], thin_x[-1]) == (0.0, 4999.0)
    assert thin_y[thin_x == 1234.0] == [7.0]


def test_a_running_mean_leaves_out_what_is_not_finite():
    # By hand, over three: (1+2)/2, (1+2)/2, (2+6)/2, 6, none.
    values = np.array([1.0, 2.0, math.nan, 6.0, math.nan, math.nan, math.nan])
    expected = [1.5, 1.5, 4.0, 6.0, 6.0, math.nan, math.nan]
    np.testing.assert_allclose(running_mean(values, 3), expected)


def test_a_metric_shares_a_panel_with_its_held_out_twin_and_chosen_with_rejected():
    names = ("loss", "eval/loss", "rewards/chosen", "rewards/rejected", "eval/rewards/chosen", "logps/chosen")
    rows = [{"step": step, **dict.fromkeys(names, float(step)), "price": 0.3} for step in (1, 2)]
    rows[1]["memory"] = 3.0
    found, rare = panels(rows, leave_out=("step",))
    assert {title: [one.name for one in series] for title, series in found.items()} == {
        "loss": ["loss", "eval/loss"],
        "rewards/chosen, rejected": ["rewards/chosen", "rewards/rejected", "eval/rewards/chosen"],
        "logps/chosen": ["logps/chosen"],
    }
    assert rare == [("price", 0.3, 2), ("memory", 3.0, 2)]


def test_a_margin_is_a_band_around_its_metric_and_no_panel_of_its_own():
    rows = [{"step": step, "eval/score": step, "eval/score_margin": 0.5, "odd_margin": step} for step in (1, 2)]
    found, _ = panels(rows, leave_out=("step",))
    assert list(found) == ["score", "odd_margin"] and found["score"][0].margins == [0.5, 0.5]
    bare = Series("eval/score", True, [1.0, 2.0], [1.0, 1.0])
    assert "fill-opacity: 0.15" in curves(found["score"], key="a") and "fill-opacity" not in curves([bare], key="a")


def test_the_same_numbers_give_the_same_drawing_without_links_out():
    series = [Series("loss", False, [1.0, 2.0, 3.0], [3.0, None, 1e30])]
    svg = curves(series, key="a")
    assert svg == curves(series, key="a")
    assert svg.startswith("<svg viewBox=")
    assert "http" not in svg
    assert re.search(r"\d\.\d{3}", svg) is None
    assert "var(--series-1)" in svg
    assert "#0b0001" not in svg


@pytest.mark.parametrize("values", [[1.0, 1.0, 1e9], [-1.0, 1.0, 1e9]])
def test_one_huge_value_does_not_flatten_the_others(values: list[float]):
    # On a linear axis of 100 units the first two would be 1e-7 units above its foot and at the same height.
    svg = curves([Series("ratio", False, [1.0, 2.0, 3.0], list(values))], key="a")
    heights = [float(y) for y in re.findall(r"<use[^>]* y=\"([\d.]+)\"[^>]*series-1", svg)]
    assert len(heights) == 3
    assert heights[1] - heights[2] > 20
    assert (heights[0] == heights[1]) == (values[0] == values[1])


def test_thinning_keeps_a_gap():
    y = np.zeros(4000)
    y[1000:2000] = math.nan
    _, thin_y = thin(np.arange(4000.0), y, 40)
    assert np.isnan(thin_y).any()


def test_a_scatter_marks_the_best_names_its_places_and_can_be_logarithmic():
    x, values = [0.0, 1.0, 1.0], [11.0, 13.0, 12.0]
    given = {"label": "<b>", "key": "a", "ticks": ["adamw", "lion"], "line": [11.0, 13.0, 13.0]}
    svg = scatter(x, values, best=1, **given)
    assert svg == scatter(x, values, best=1, **given) != scatter(x, values, best=2, **given)
    assert "&lt;b&gt;" in svg and "<b>" not in svg and "var(--good)" in svg
    assert {"adamw", "lion"} <= _ticks(svg).keys()
    places = _ticks(scatter([1e-5, 1e-3, 1e-1], values, best=1, label="rate", key="a", is_log=True))
    assert places["0.001"] == pytest.approx((places["1e\u22125"] + places["0.1"]) / 2, abs=0.02)


def _ticks(svg: str) -> dict[str, float]:
    """The texts of a drawing, each with its place from left to right."""
    return {text: float(x) for x, text in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>([^<]*)<', svg)}
