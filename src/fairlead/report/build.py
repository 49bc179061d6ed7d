"""Turns run directories into one HTML page. Knows which runs are compared, and by which metric one is the best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from fairlead.errors import RunError
from fairlead.report import views, words
from fairlead.report.page import render, write
from fairlead.report.read import Run, compare, read_runs
from fairlead.report.reward import reward_view


def build_report(runs: Sequence[Path], out: Path, *, title: str | None = None, before: str | None = None) -> Path:
    """Writes one self-contained HTML file about `runs` and returns its path.

    A pipeline's folder stands for its runs. `out` is the file, or a folder that gets `report.html`. `before` names the
    run whose responses the others are compared with; else it is the reference of the evaluations, else the first run
    that was evaluated. The same directories give the same bytes. Raises RunError where a path is no run directory or
    `before` is none of the runs.
    """
    found = read_runs(runs)
    page = render("fairlead.report", "template.html", _page(found, title or _title(runs, found), before))
    return write(Path(out), page)


def _page(runs: list[Run], title: str, before: str | None) -> dict[str, Any]:
    reference = _reference(runs, before)
    comparisons = [
        compare(reference, run)
        for run in runs
        if reference is not None and reference.responses and run.responses and run is not reference
    ]
    leader = _leader(runs, reference)
    if leader:  # the run the page speaks of comes first
        comparisons.sort(key=lambda c: c.run != leader[0].name)
    gauges = [gauge for run in runs if (gauge := views.gauge(run))]
    max_points = max(60, min(400, 4000 // len(runs)))
    setups = views.setups(runs)
    return {
        "title": title,
        "facts_line": words.facts_line(runs),
        "headline": words.headline(runs, reference, leader, comparisons),
        "figures": words.key_figures(runs, leader, comparisons),
        "remarks": words.remarks(runs, gauges, setups),
        "columns": views.columns(runs),
        "metric_charts": views.metric_charts(runs, leader[1]) if leader else [],
        "setups": setups,
        "unevaluated": [run.name for run in runs if not run.estimates],
        "reference": reference,
        "changes": [views.change_view(c, i) for i, c in enumerate(comparisons)],
        "gauges": gauges,
        "rewards": [view for run in runs if (view := reward_view(run))],
        "runs": [views.run_view(run, i, max_points) for i, run in enumerate(runs)],
        "leader": leader[0].name if leader else runs[-1].name,
        "alarms": views.alarms(runs),
        "notes": [(run.name, note) for run in runs for note in run.notes],
    }


def _title(paths: Sequence[Path], runs: list[Run]) -> str:
    if len(paths) == 1:
        return Path(paths[0]).resolve().name
    return ", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"


def _find(runs: list[Run], name: object) -> Run | None:
    """By name, else by the name of its folder."""
    named = [run for run in runs if run.name == name]
    folder = PurePath(str(name or "")).name
    return next(iter(named + [run for run in runs if run.path.resolve().name == folder]), None)


def _reference(runs: list[Run], before: str | None) -> Run | None:
    if before is not None:
        if found := _find(runs, before):
            return found
        names = ", ".join(run.name for run in runs)
        raise RunError(f"before: no run is called {before!r}", hint=f"one of: {names}")
    answered = [run for run in runs if run.responses]
    named = [_find(answered, run.evaluation.get("reference")) for run in answered]
    most_common = Counter(run.name for run in named if run).most_common(1)
    return _find(answered, most_common[0][0]) if most_common else next(iter(answered), None)


def _leader(runs: list[Run], reference: Run | None) -> tuple[Run, str] | None:
    """The best run, and the metric by which it is."""
    for candidates in ([run for run in runs if run is not reference], runs):
        for metric in (*views.HIGHER_IS_BETTER, *views.LOWER_IS_BETTER):
            sign = 1 if metric in views.HIGHER_IS_BETTER else -1
            if having := [run for run in candidates if metric in run.estimates]:
                return max(having, key=lambda run: sign * run.estimates[metric].mean), metric
    return None
