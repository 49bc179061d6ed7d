"""Says in words what the runs show: the headline, the figures under it, and what a reader must know. Knows no page."""

from __future__ import annotations

from fairlead.report.numbers import compact, duration, interval, number, places_for
from fairlead.report.read import Comparison, Estimate, Row, Run, as_mapping, finite


def facts_line(runs: list[Run]) -> list[str]:
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


def headline(
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


def key_figures(
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
    ends = [run.end for run in runs]
    if tokens := sum(int(finite(end["tokens"]) or 0) for end in ends):
        figures.append((compact(tokens), "", "tokens trained on"))
    if seconds := sum(finite(end["seconds"]) or 0.0 for end in ends):
        figures.append((duration(seconds), "", "of training"))
    return figures


def remarks(runs: list[Run], gauges: list[Row], setups: list[Row]) -> list[tuple[str, str]]:
    """(what a reader must know, where it stands)."""
    remarks = [
        (f"{run.name} is {status}.", f"run-{i}")
        for i, run in enumerate(runs)
        if (status := run.end["status"]) in ("failed", "interrupted")
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


def _estimate(run: Run | None, metric: str) -> Estimate | None:
    return run.estimates.get(metric) if run else None


def _words(e: Estimate) -> tuple[str, str]:
    places = places_for([e.mean])
    return number(e.mean, places), interval(e, places)


def _is_noise(e: Estimate) -> bool:
    return e.low is not None and e.high is not None and e.low <= 0 <= e.high
