"""Evaluations as tables on stdout. Knows names of metrics, and nothing of how they were measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

OF_REWARD = "reward/"
"""Before the names of metrics that a reward model alone has."""

Metrics = Mapping[str, Mapping[str, Any]]


def print_evaluation(runs: Mapping[str, Metrics]) -> None:
    """A row a run for what runs can be compared by; below it a table for what a reward model alone has."""
    print_table(
        {run: {name: m for name, m in of.items() if not name.startswith(OF_REWARD)} for run, of in runs.items()}
    )
    for run, metrics in runs.items():
        own = {name: metric for name, metric in metrics.items() if name.startswith(OF_REWARD)}
        if own:
            print_rows([run, "mean [95 %]", "n"], [[name, _cell(m), f"{m['n']:,}"] for name, m in own.items()])


def print_table(models: Mapping[str, Metrics]) -> None:
    """Metrics of several models, a row a model."""
    names = list(dict.fromkeys(name for metrics in models.values() for name in metrics))
    rows = [[model, *(_cell(metrics.get(name)) for name in names)] for model, metrics in models.items()]
    print_rows(["", *names], rows)


def print_rows(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table of texts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(escape, heads))
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(metric: Mapping[str, Any] | None) -> str:
    if not metric or metric["mean"] is None:
        return ""
    if metric.get("low") is None:
        return f"{metric['mean']:.3g}"
    return f"{metric['mean']:.3g} [{metric['low']:.3g}, {metric['high']:.3g}]"
