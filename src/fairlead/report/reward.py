"""Turns what was measured of a reward model into tables, charts and words. Reads no file and knows no page."""

from __future__ import annotations

from typing import Any

from fairlead.report import charts
from fairlead.report.numbers import interval, number, places_for
from fairlead.report.read import Estimate, Row, Run, as_mapping, finite, parse_estimates

_TABLES = {
    "by_source": "Source",
    "by_margin": "Margin of the data",
    "by_length_difference": "Characters by which the chosen response is the longer",
}
_SIDES = ("chosen", "rejected")


def reward_view(run: Run) -> Row | None:
    """The section of one reward model; none where it was not measured."""
    quality = run.reward_quality
    if not quality:
        return None
    calibration = as_mapping(quality.get("calibration"))
    points = [
        (x, e)
        for row in _rows(calibration.get("curve"))
        if (x := finite(row.get("confidence"))) is not None and (e := _accuracy(row)) is not None
    ]
    tables = [{"title": title, "rows": rows} for key, title in _TABLES.items() if (rows := _bins(quality.get(key)))]
    return {
        "run": run.name,
        "sentence": _sentence(run, calibration),
        "reliability": charts.reliability(
            points, label="confidence: sigmoid of the difference of scores", key=f"reliability-{run.name}"
        )
        if points
        else None,
        "histogram": _histogram(as_mapping(quality.get("scores")), f"scores-{run.name}"),
        "metrics": {name: e for name, e in run.estimates.items() if "accuracy" in name or name.startswith("reward/")},
        "tables": tables,
    }


def _sentence(run: Run, calibration: Any) -> str:
    """Calibration and length bias in words."""
    parts: list[str] = []
    if ece := run.estimates.get("reward/ece"):
        words = f"expected calibration error {_words(ece)} over {number(calibration.get('bins'))} bins"
        if (chance := finite(calibration.get("ece_if_calibrated"))) is not None:
            words += f", where chance alone would give a calibrated model {number(chance, 3)}"
        parts.append(words)
    sides = [run.estimates.get(f"reward/accuracy_longer_{side}") for side in _SIDES]
    whose = [
        f"{_words(e)} where the {side} response is the longer one" for side, e in zip(_SIDES, sides, strict=True) if e
    ]
    if whose:
        parts.append(f"accuracy {' and '.join(whose)}")
    return "; ".join(parts)


def _histogram(scores: Any, key: str) -> Any:
    edges, *sides = (_numbers(scores.get(name)) for name in ("edges", *_SIDES))
    if len(edges) < 2 or edges != sorted(edges) or any(len(side) != len(edges) - 1 for side in sides):
        return None
    return charts.histogram(edges, list(zip(_SIDES, sides, strict=True)), label="score", key=key)


def _bins(rows: object) -> list[tuple[str, Estimate]]:
    """(what the pairs of a bin have in common, accuracy over them)."""
    found: list[tuple[str, Estimate]] = []
    for row in _rows(rows):
        if e := _accuracy(row):
            ends = [number(row.get(name)) for name in ("from", "to")]
            extent = " to ".join(dict.fromkeys(ends))
            found.append((str(row.get("source") or "not named") if "source" in row else extent, e))
    return found


def _accuracy(row: Row) -> Estimate | None:
    return parse_estimates({"accuracy": row.get("accuracy")}).get("accuracy")


def _rows(value: object) -> list[Row]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _numbers(value: object) -> list[float]:
    items = [finite(item) for item in value] if isinstance(value, list) else []
    return [item for item in items if item is not None] if None not in items else []


def _words(e: Estimate) -> str:
    places = places_for([e.mean])
    return f"{number(e.mean, places)} {interval(e, places)}".rstrip()
