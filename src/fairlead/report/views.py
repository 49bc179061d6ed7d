"""Turns runs into the tables and charts of the page. Knows no algorithm: what a run logged is what is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairlead.report import charts
from fairlead.report.charts import Series
from fairlead.report.numbers import number, places_for, signed
from fairlead.report.page import setting
from fairlead.report.read import Comparison, Row, Run, as_mapping, as_text, finite, parse_estimates, score_names

HIGHER_IS_BETTER = ("gold", "score", "win_rate", "accuracy")
LOWER_IS_BETTER = ("perplexity",)
_LAST_COLUMNS = ("win_rate", "accuracy", "perplexity", "kl", "length", "distinct_1", "distinct_2")
_OF_REWARD = "reward/"  # metrics that a reward model alone has stand in its own section
_MAX_SAMPLES = 12
_MAX_RANKED = 24
_CHANGES_OF_A_KIND = 4
_WORTH_A_REMARK = 0.1  # share of gold's whole range that it must have lost again


def columns(runs: list[Run]) -> list[Row]:
    """The metrics of the comparison in reading order; `best` where it is known whether more or less is better."""
    names = dict.fromkeys(name for run in runs for name in run.estimates if not name.startswith(_OF_REWARD))
    extra = [name for name in names if name not in ("gold", "score", *_LAST_COLUMNS)]
    columns: list[Row] = []
    for name in (n for n in ("gold", "score", *extra, *_LAST_COLUMNS) if n in names):
        measured = [of for run in runs for of in (run.estimates, *run.best.values())]
        means = [of[name].mean for of in measured if name in of]
        pick = max if name in HIGHER_IS_BETTER else min if name in LOWER_IS_BETTER else None
        best = pick(means) if pick and len(means) > 1 else None
        columns.append({"name": name, "places": places_for(means), "best": best})
    return columns


def setups(runs: list[Run]) -> list[Row]:
    """The ways in which the runs were evaluated; one where all numbers can be compared. A reward model, measured on
    pairs, is compared with no policy."""
    setups: dict[str, list[str]] = {}
    for run in runs:
        if run.estimates and not run.evaluation.get("pairs"):
            counts = [
                f"{number(run.evaluation[unit])} {unit}" for unit in ("prompts", "draws") if unit in run.evaluation
            ]
            sampling = _flatten(as_mapping(run.evaluation.get("sampling")))
            words = ", ".join([*counts, *(f"{key} {setting(value)}" for key, value in sampling)])
            setups.setdefault(words, []).append(run.name)
    return [{"words": words, "runs": names} for words, names in setups.items()]


def metric_charts(runs: list[Run], metric: str) -> list[Row]:
    """The metric of every run, the best on top, and the same against KL."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
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


def change_view(comparison: Comparison, index: int) -> Row:
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


def gauge(run: Run) -> Row | None:
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


def alarms(runs: list[Run]) -> list[Row]:
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


def run_view(run: Run, index: int, max_points: int) -> Row:
    manifest = run.manifest
    parameters = as_mapping(manifest.get("parameters"))
    total, trainable = finite(parameters.get("total")), finite(parameters.get("trainable"))
    panels, rare = charts.panels(run.metrics, leave_out=("step", "seconds", "tokens"))
    return {
        "run": run,
        "index": index,
        "end": run.end,
        "groups": _panel_groups(panels, f"run-{index}", max_points),
        "rare": rare,
        "samples": [
            found | {"title": title, "file": file}
            for title, file, rows in (
                ("Samples drawn while training", "samples.jsonl", run.samples),
                ("Prompts that were watched, each with its mean score", "eval_prompts.jsonl", run.watched),
            )
            if (found := _samples(rows)) is not None
        ],
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


def _samples(drawn: list[Row]) -> Row | None:
    """The responses drawn at the first and at the last step, side by side."""
    steps = [step for row in drawn if (step := finite(row.get("step"))) is not None]
    if not steps:
        return None
    sides: list[dict[str, Row]] = []
    for step in dict.fromkeys((min(steps), max(steps))):
        rows = (row for row in drawn if finite(row.get("step")) == step)
        sides.append({as_text(row.get("prompt")): row for row in rows})
    prompts = list(dict.fromkeys(prompt for side in sides for prompt in side))
    return {
        "steps": [int(step) for step in dict.fromkeys((min(steps), max(steps)))],
        "rows": [(p, [side.get(p) for side in sides]) for p in prompts[:_MAX_SAMPLES]],
        "num_hidden": max(0, len(prompts) - _MAX_SAMPLES),
    }


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        pairs += _flatten(inner, f"{name}.") if isinstance(inner, dict) and inner else [(name, inner)]
    return pairs
