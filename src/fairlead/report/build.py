"""Turns run directories into one HTML page. Knows which numbers to set side by side and how to say them in words, but
no algorithm: what a run logged is what is shown."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined

from fairlead.errors import RunError
from fairlead.report import charts
from fairlead.report.charts import (
    Series,
    compact,
    duration,
    interval,
    number,
    places_for,
    signed,
)
from fairlead.report.read import (
    Comparison,
    Estimate,
    Row,
    Run,
    as_mapping,
    as_text,
    compare,
    finite,
    parse_estimates,
    read_runs,
    score_names,
)

_HIGHER_IS_BETTER = ("gold", "score", "win_rate", "accuracy")
_LOWER_IS_BETTER = ("perplexity",)
_LAST_COLUMNS = ("win_rate", "accuracy", "perplexity", "kl", "length", "distinct_1", "distinct_2")
_MAX_SAMPLES = 12
_MAX_RANKED = 24
_CHANGES_OF_A_KIND = 4
_WORTH_A_REMARK = 0.1  # share of gold's whole range that it must have lost again


def build_report(runs: Sequence[Path], out: Path, *, title: str | None = None, before: str | None = None) -> Path:
    """Writes one self-contained HTML file about `runs` and returns its path.

    A pipeline's folder stands for its runs. `out` is the file, or a folder that gets `report.html`. `before` names the
    run whose responses the others are compared with; else it is the reference of the evaluations, else the first run
    that was evaluated. The same directories give the same bytes. Raises RunError where a path is no run directory or
    `before` is none of the runs.
    """
    found = read_runs(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number,
        "signed": signed,
        "interval": interval,
        "duration": duration,
        "setting": setting,
        "plain": as_text,
    }
    template = resources.files("fairlead.report").joinpath("template.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(_page(found, title or _title(runs, found), before))
    return _write(Path(out), page)


def setting(value: object) -> str:
    """A setting exactly as it was set."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


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
    gauges = [gauge for run in runs if (gauge := _gauge(run))]
    max_points = max(60, min(400, 4000 // len(runs)))
    setups = _setups(runs)
    return {
        "title": title,
        "facts_line": _facts(runs),
        "headline": _headline(runs, reference, leader, comparisons),
        "figures": _key_figures(runs, leader, comparisons),
        "remarks": _remarks(runs, gauges, setups),
        "columns": _columns(runs),
        "metric_charts": _metric_charts(runs, leader[1]) if leader else [],
        "setups": setups,
        "unevaluated": [run.name for run in runs if not run.estimates],
        "reference": reference,
        "changes": [_change_view(c, i) for i, c in enumerate(comparisons)],
        "gauges": gauges,
        "runs": [_run_view(run, i, max_points) for i, run in enumerate(runs)],
        "leader": leader[0].name if leader else runs[-1].name,
        "alarms": _alarms(runs),
        "notes": [(run.name, note) for run in runs for note in _list(run.manifest.get("notes"))],
    }


def _title(paths: Sequence[Path], runs: list[Run]) -> str:
    if len(paths) == 1:
        return Path(paths[0]).resolve().name
    return ", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"


def _facts(runs: list[Run]) -> list[str]:
    """Where the numbers come from, in a line under the title."""
    days = sorted({run.created[:10] for run in runs} - {""})
    devices = {str(as_mapping(run.manifest.get("hardware")).get("device", "")) for run in runs}
    seeds = {str(run.manifest.get("seed", "")) for run in runs} - {""}
    facts = [
        ", ".join(dict.fromkeys(run.algorithm for run in runs)),
        " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
        ", ".join(sorted(devices - {""})),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(sorted(seeds))}" if seeds else "",
    ]
    return [fact for fact in facts if fact]


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
        for metric in (*_HIGHER_IS_BETTER, *_LOWER_IS_BETTER):
            sign = 1 if metric in _HIGHER_IS_BETTER else -1
            if having := [run for run in candidates if metric in run.estimates]:
                return max(having, key=lambda run: sign * run.estimates[metric].mean), metric
    return None


def _headline(
    runs: list[Run],
    reference: Run | None,
    leader: tuple[Run, str] | None,
    comparisons: list[Comparison],
) -> str:
    """What happened, in one sentence."""
    if leader is None:
        return _training_headline(runs)
    run, metric = leader
    after, old = run.estimates[metric], _estimate(reference, metric)
    now = " ".join(_words(after)).rstrip()
    if reference is None or old is None or run is reference:
        sentence = f"{run.name} reached {metric} {now}"
    else:
        verb = "raised" if after.mean > old.mean else "lowered" if after.mean < old.mean else "left"
        was = number(old.mean, places_for([after.mean]))
        sentence = f"{run.name} {verb} {metric} from {was} ({reference.name}) to {now}"
    if kl := _estimate(run, "kl"):
        sentence += f" at KL {number(kl.mean)} nats"
    rivals = sum(metric in other.estimates for other in runs if other is not reference)
    if rivals > 1:
        sentence += f", the best of {rivals} runs"
    change = next((c for c in comparisons if c.run == run.name and c.metric == metric), None)
    if change and change.mean and _is_noise(change.mean):
        sentence += "; a change within the noise of the evaluation"
    return f"{sentence}."


def _training_headline(runs: list[Run]) -> str:
    for run in reversed(runs):
        for name, words in (("eval/loss", "held-out loss"), ("loss", "training loss")):
            if points := run.points(name):
                (step, last), first = points[-1], points[0][1]
                how = f"stood at {number(last)}"
                if len(points) > 1:
                    how = f"went from {number(first)} to {number(last)}"
                return f"{run.name}: {words} {how} at step {number(int(step))}; not evaluated yet."
    return "Nothing has been logged or evaluated yet."


def _key_figures(
    runs: list[Run], leader: tuple[Run, str] | None, comparisons: list[Comparison]
) -> list[tuple[str, str, str]]:
    """(value, its interval or share, what it is)."""
    figures: list[tuple[str, str, str]] = []
    if leader:
        run, metric = leader
        e = run.estimates[metric]
        figures.append((*_words(e), f"{metric}, {run.name}"))
        c = next((c for c in comparisons if c.run == run.name), None)
        if c and c.mean:
            what = f"change in {c.metric} per prompt against {c.reference}"
            mean, bounds = _words(c.mean)
            figures.append((f"{'+' * (c.mean.mean > 0)}{mean}", bounds, what))
            better = number(c.count(lambda x: x > 0))
            figures.append((better, f"of {number(len(c.changes))}", "prompts better than before"))
        if kl := _estimate(run, "kl"):
            figures.append((*_words(kl), f"KL in nats, {run.name}"))
    ends = [_end(run) for run in runs]
    if tokens := sum(int(finite(end["tokens"]) or 0) for end in ends):
        figures.append((compact(tokens), "", "tokens trained on"))
    if seconds := sum(finite(end["seconds"]) or 0.0 for end in ends):
        figures.append((duration(seconds), "", "of training"))
    return figures


def _remarks(runs: list[Run], gauges: list[Row], setups: list[Row]) -> list[tuple[str, str]]:
    """(what a reader must know, where it stands)."""
    remarks = [
        (f"{run.name} is {status}.", f"run-{i}")
        for i, run in enumerate(runs)
        if (status := _end(run)["status"]) in ("failed", "interrupted")
    ]
    remarks += [(f"{run.name}: {d}.", f"run-{i}") for i, run in enumerate(runs) for d in run.damage]
    if alarmed := [run for run in runs if run.alarms]:
        total = sum(len(run.alarms) for run in alarmed)
        names = ", ".join(run.name for run in alarmed)
        remarks.append((f"{number(total)} alarm{'s' * (total > 1)} in {names}.", "alarms"))
    remarks += [(f"{gauge['run']}: {gauge['sentence']}", "overoptimisation") for gauge in gauges if gauge["over"]]
    if len(setups) > 1:
        remarks.append(("The runs were evaluated in different ways; compare with care.", "comparison"))
    return remarks


def _columns(runs: list[Run]) -> list[Row]:
    """The metrics of the comparison in reading order; `best` where it is known whether more or less is better."""
    names = dict.fromkeys(name for run in runs for name in run.estimates)
    extra = [name for name in names if name not in ("gold", "score", *_LAST_COLUMNS)]
    columns: list[Row] = []
    for name in (n for n in ("gold", "score", *extra, *_LAST_COLUMNS) if n in names):
        means = [run.estimates[name].mean for run in runs if name in run.estimates]
        pick = max if name in _HIGHER_IS_BETTER else min if name in _LOWER_IS_BETTER else None
        best = pick(means) if pick and len(means) > 1 else None
        columns.append({"name": name, "places": places_for(means), "best": best})
    return columns


def _setups(runs: list[Run]) -> list[Row]:
    """The ways in which the runs were evaluated; one where all numbers can be compared."""
    setups: dict[str, list[str]] = {}
    for run in runs:
        if run.estimates:
            counts = [
                f"{number(run.evaluation[unit])} {unit}" for unit in ("prompts", "draws") if unit in run.evaluation
            ]
            sampling = _flatten(as_mapping(run.evaluation.get("sampling")))
            words = ", ".join([*counts, *(f"{key} {setting(value)}" for key, value in sampling)])
            setups.setdefault(words, []).append(run.name)
    return [{"words": words, "runs": names} for words, names in setups.items()]


def _metric_charts(runs: list[Run], metric: str) -> list[Row]:
    """The metric of every run, the best on top, and the same against KL."""
    sign = -1 if metric in _HIGHER_IS_BETTER else 1
    having = sorted((r for r in runs if metric in r.estimates), key=lambda run: sign * run.estimates[metric].mean)
    moved = [run for run in having if "kl" in run.estimates]
    figures: list[Row] = []
    if len(having) > 1:
        rows = [(run.name, run.estimates[metric]) for run in having[:_MAX_RANKED]]
        whose = "each run" if len(rows) == len(having) else f"the best {len(rows)} of {len(having)} runs"
        svg = charts.intervals(rows, label=metric, key="intervals")
        figures.append({"svg": svg, "caption": f"{metric} of {whose} with its 95 % interval."})
    if len(moved) > 1:
        points = [(run.name, run.estimates["kl"].mean, run.estimates[metric]) for run in moved]
        svg = charts.frontier(points, label=metric, key="frontier")
        figures.append({"svg": svg, "caption": f"{metric} against the distance from the reference."})
    return figures


def _change_view(comparison: Comparison, index: int) -> Row:
    values = [c.change for c in comparison.changes if c.change is not None]
    return {
        "comparison": comparison,
        "better": comparison.count(lambda x: x > 0),
        "worse": comparison.count(lambda x: x < 0),
        "equal": comparison.count(lambda x: x == 0),
        "groups": comparison.excerpt(_CHANGES_OF_A_KIND),
        "places": max(places_for(values), 0),
        "svg": charts.waterfall(values, key=f"changes-{index}") if len(values) > 1 else None,
    }


def _gauge(run: Run) -> Row | None:
    """Over-optimisation: what became of a held-out truth while the proxy was pushed up."""
    others = dict.fromkeys(["gold", *score_names(run.responses)])
    for gold in (name for name in others if name != "score"):
        names = ("eval/score", f"eval/{gold}")
        points = run.points(*names)
        if len(points) >= 3:
            break
    else:
        return None
    with_kl = run.points(*names, "eval/kl")
    uses_kl = len(with_kl) == len(points)
    steps, proxy, truth = zip(*points, strict=True)
    peak = max(range(len(points)), key=truth.__getitem__)
    rise, fall = proxy[-1] - proxy[peak], truth[peak] - truth[-1]
    x = [point[3] for point in with_kl] if uses_kl else steps
    where = f"step {number(int(steps[peak]))}"
    where += f" (KL {number(x[peak])} nats)" if uses_kl else ""
    if fall <= 0:
        change = proxy[-1] - proxy[0]
        sentence = (
            f"{gold} was highest at the last step, after the proxy had changed by {signed(change)}: "
            "no over-optimisation seen."
        )
    else:
        verb = "rose" if rise > 0 else "fell"
        sentence = (
            f"the proxy {verb} by {number(abs(rise))} while {gold} fell by {number(fall)} "
            f"after its peak of {number(truth[peak])} at {where}."
        )
    svg = charts.overoptimisation(
        x,
        [("score (proxy)", proxy), (gold, truth)],
        label="KL to the reference, nats" if uses_kl else "step",
        peak=peak,
        key=f"overoptimisation-{run.name}",
    )
    over = rise > 0 and fall > _WORTH_A_REMARK * (max(truth) - min(truth))
    return {"run": run.name, "sentence": sentence, "over": over, "svg": svg}


def _alarms(runs: list[Run]) -> list[Row]:
    """Alarms of one kind in one run stand in one line."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for run in runs:
        for alarm in run.alarms:
            groups.setdefault((run.name, str(alarm.get("alarm", ""))), []).append(alarm)
    return [
        {
            "run": run,
            "alarm": alarm,
            "count": len(rows),
            "first": rows[0].get("step"),
            "last": rows[-1].get("step"),
            "message": rows[0].get("message", ""),
        }
        for (run, alarm), rows in groups.items()
    ]


def _run_view(run: Run, index: int, max_points: int) -> Row:
    manifest = run.manifest
    parameters = as_mapping(manifest.get("parameters"))
    total, trainable = finite(parameters.get("total")), finite(parameters.get("trainable"))
    panels, rare = charts.panels(run.metrics, leave_out=("step", "seconds", "tokens"))
    return {
        "run": run,
        "index": index,
        "end": _end(run),
        "groups": _panel_groups(panels, f"run-{index}", max_points),
        "rare": rare,
        "samples": _samples(run),
        "results": parse_estimates(run.summary.get("metrics")),
        "settings": _flatten(run.recipe),
        "data": {k: v for k, v in as_mapping(manifest.get("data")).items() if isinstance(v, dict)},
        "parameters": _flatten(parameters),
        "trainable_share": 100 * trainable / total if total and trainable is not None else None,
        "facts": [
            (title, _flatten(as_mapping(manifest.get(key))))
            for title, key in (("Versions", "versions"), ("Hardware", "hardware"))
        ],
        "inputs": _flatten(as_mapping(manifest.get("inputs"))),
    }


def _panel_groups(panels: dict[str, list[Series]], key: str, max_points: int) -> list[Row]:
    """The charts of a run under the first part of their names."""
    groups: dict[str, list[Row]] = {}
    for title, series in panels.items():
        held_out = all(one.held_out for one in series)
        prefix, slash, _ = title.partition("/")
        heading = prefix + slash if slash else "Held out" if held_out else "Training"
        svg = charts.curves(series, key=f"{key}-{title}", max_points=max_points)
        title = f"eval/{title}" if held_out else title
        groups.setdefault(heading, []).append({"title": title, "series": series, "svg": svg})
    return [{"heading": heading, "panels": group} for heading, group in groups.items()]


def _samples(run: Run) -> Row | None:
    """The responses drawn at the first and at the last step, side by side."""
    steps = [step for row in run.samples if (step := finite(row.get("step"))) is not None]
    if not steps:
        return None
    sides: list[dict[str, Row]] = []
    for step in dict.fromkeys((min(steps), max(steps))):
        rows = (row for row in run.samples if finite(row.get("step")) == step)
        sides.append({as_text(row.get("prompt")): row for row in rows})
    prompts = list(dict.fromkeys(prompt for side in sides for prompt in side))
    return {
        "steps": [int(step) for step in dict.fromkeys((min(steps), max(steps)))],
        "rows": [(p, [side.get(p) for side in sides]) for p in prompts[:_MAX_SAMPLES]],
        "num_hidden": max(0, len(prompts) - _MAX_SAMPLES),
    }


def _end(run: Run) -> Row:
    """Status, steps, tokens and seconds: from the summary, else from the last logged step."""
    last = run.metrics[-1] if run.metrics else {}
    return {
        "status": str(run.summary.get("status") or ("unfinished" if run.metrics else "not started")),
        "steps": run.summary.get("steps", last.get("step")),
        "tokens": run.summary.get("tokens", last.get("tokens")),
        "seconds": run.summary.get("seconds", last.get("seconds")),
    }


def _estimate(run: Run | None, metric: str) -> Estimate | None:
    return run.estimates.get(metric) if run else None


def _words(e: Estimate) -> tuple[str, str]:
    places = places_for([e.mean])
    return number(e.mean, places), interval(e, places)


def _is_noise(e: Estimate) -> bool:
    return e.low is not None and e.high is not None and e.low <= 0 <= e.high


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        pairs += _flatten(inner, f"{name}.") if isinstance(inner, dict) and inner else [(name, inner)]
    return pairs


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _write(out: Path, page: str) -> Path:
    """Whole or not at all: a reader never sees half a page."""
    path = out / "report.html" if out.is_dir() else out
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(page.encode("utf-8", errors="replace"))  # half a surrogate pair is possible
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
