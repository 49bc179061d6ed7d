"""A sweep for people: its plan and its trials on a terminal, and one self-contained page. Reads sweep.json alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fairlead.report.page import setting

Row = Mapping[str, Any]
_LONGEST = 60


def words(parameters: Row) -> str:
    """As they are written on a command line."""
    return shlex.join(f"{key}={setting(value)}" for key, value in parameters.items())


def plan_text(plan: Row) -> str:
    lines = [f"{plan['folder']}: {plan['planned']} trials of {plan['recipe']}"]
    lines += [f"  {key}: {setting(plan[key])}" for key in ("metric", "goal", "read", "sampler", "pruner", "seed")]
    return "\n".join([*lines, *(f"  {key}: {setting(value)}" for key, value in plan["space"].items())])


def print_sweep(result: Row) -> None:
    """A row a trial, and the best one below."""
    from fairlead.evaluation.show import print_rows

    best, keys = result["best"], list(result["space"])
    rows = [
        [
            str(row["number"]),
            "best" if best and row["number"] == best["number"] else row["state"],
            _short(row["value"]),
            *(_short(row["parameters"].get(key)) for key in keys),
            _short(row["seconds"]),
            _short(row["message"]),
        ]
        for row in result["trials"]
    ]
    print_rows(["trial", "state", f"{result['metric']}, {result['goal']}", *keys, "seconds", "message"], rows)
    if best is None:
        print(f"{result['folder']}: no trial has finished")
    else:
        place = Path(result["folder"]) / best["run"]
        print(f"best: {result['metric']} {best['value']:.4g} in {place}: {words(best['parameters'])}")


def _short(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else setting(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


# --- page ----------------------------------------------------------------------------------------------------------


def write_page(folder: Path, result: Row) -> Path:
    from fairlead.report.page import render, write

    return write(folder / "report.html", render("fairlead.sweep", "page.html", _view(folder, result)))


def _view(folder: Path, result: Row) -> dict[str, Any]:
    trials, best = result["trials"], result["best"]
    finished = [row for row in trials if row["state"] == "finished"]
    states = [row["state"] for row in trials]
    counts = {state: states.count(state) for state in ("finished", "pruned", "failed", "unfinished")}
    return {
        "title": folder.resolve().name,
        "result": result,
        "counts": {state: number for state, number in counts.items() if number},
        "seconds": sum(row["seconds"] or 0 for row in trials),
        "keys": list(result["space"]),
        "trials": trials,
        "best": best,
        "command": f"fairlead train {folder / 'base.yaml'} {words(best['parameters'])}" if best else "",
        "charts": _charts(result, finished, finished.index(best)) if len(finished) > 1 else [],
    }


def _charts(result: Row, finished: Sequence[Row], best: int) -> list[dict[str, Any]]:
    """The metric over the trials in order, and over each parameter."""
    from fairlead.report import charts

    values = [row["value"] for row in finished]
    pick = max if result["goal"] == "max" else min
    numbers = [float(row["number"]) for row in finished]
    so_far = list(accumulate(values, pick))
    svg = charts.scatter(numbers, values, best=best, line=so_far, label="trial", key="trials")
    found = [{"title": "Trial by trial, the line being the best so far", "svg": svg}]
    for key, spec in result["space"].items():
        drawn = [row["parameters"][key] for row in finished]
        ticks = [setting(choice) for choice in spec.get("choice", ())]
        x = [float(ticks.index(setting(value))) if ticks else float(value) for value in drawn]
        is_log = "loguniform" in spec or spec.get("log", False)
        svg = charts.scatter(x, values, best=best, ticks=ticks, is_log=is_log, label=key, key=f"of {key}")
        found.append({"title": key, "svg": svg})
    return found
