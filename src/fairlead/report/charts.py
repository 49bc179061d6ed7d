"""Numbers as inline SVG by matplotlib, the same bytes for the same numbers and coloured by CSS variables so that one
drawing serves light, dark and paper. Knows no run directory."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator
from numpy.typing import NDArray

from fairlead.report.numbers import compact
from fairlead.report.read import Estimate, finite

Floats = NDArray[np.float64]

# Colours nobody would choose stand for CSS variables in the drawing.
_INK, _MUTED, _RULE, _GOOD, _BAD = "#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005"
_SERIES = ("#0b0001", "#0b0002", "#0b0003", "#0b0004")
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _RULE: "--rule",
    _GOOD: "--good",
    _BAD: "--bad",
    **{colour: f"--series-{i}" for i, colour in enumerate(_SERIES, start=1)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 7.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.5,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "lines.linewidth": 1.3,
    "lines.markeredgewidth": 0,
    "lines.markersize": 4,
    "lines.solid_joinstyle": "round",
}
_SIDES = ("chosen", "rejected")
_MANY = 60  # points from which a curve has a running mean and no dots

_ROOT = re.compile(r'^.*?<svg[^>]*?(viewBox="[^"]*")[^>]*>\s*<defs>\s*<style.*?</defs>', re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_TRIM = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r' id="[A-Za-z0-9.]*_\d+"', ""),  # line2d_7: in every drawing, and never referred to
        (r"xlink:href", "href"),
        (r"font-family: [^;\"]*;? ?", ""),
        (r"(\d\.\d\d)\d+", r"\1"),
        (r"\s+", " "),
    )
]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; a value that was not finite is None and leaves a gap."""

    name: str
    held_out: bool
    steps: list[float]
    values: list[float | None]
    margins: list[float | None] = field(default_factory=list[float | None])
    """Half the interval of each value, where `NAME_margin` was logged beside all of them."""

    @property
    def finite(self) -> list[float]:
        return [v for v in self.values if v is not None]


def panels(
    rows: Sequence[Mapping[str, Any]], *, leave_out: Collection[str]
) -> tuple[dict[str, list[Series]], list[tuple[str, Any, Any]]]:
    """Every metric of the rows: what belongs into one panel, by its title, and (name, value, step) of those that show
    no curve: fewer than two numbers, or one number throughout. A metric shares a panel with its held-out twin
    `eval/...`, and chosen with rejected; its margin is a band around it."""
    names = dict.fromkeys(key for row in rows for key in row if key not in leave_out)
    margins = {name: f"{name}_margin" for name in names if f"{name}_margin" in names}
    bases = {name.removeprefix("eval/") for name in names}
    panels: dict[str, list[Series]] = {}
    rare: list[tuple[str, Any, Any]] = []
    for name in (name for name in names if name not in margins.values()):
        found = [(row["step"], row[name]) for row in rows if name in row]
        values = [finite(value) for _, value in found]
        if len({value for value in values if value is not None}) < 2:
            rare.append((name, found[-1][1], found[-1][0]))
            continue
        title = base = name.removeprefix("eval/")
        stem, _, side = base.rpartition("/")
        if side in _SIDES and {f"{stem}/{side}" for side in _SIDES} <= bases:
            title = f"{stem}/{', '.join(_SIDES)}"
        half = [finite(row.get(margins[name])) for row in rows if name in row] if name in margins else []
        one = Series(name, name != base, [float(step) for step, _ in found], values, half)
        panels.setdefault(title, []).append(one)
    return panels, rare


def curves(series: Sequence[Series], *, key: str, max_points: int = 400) -> Markup:
    """Training as lines (many points: a running mean over the raw ones), held-out dashed."""
    with _style(key):
        figure, axes = _axes(3.0, 1.7)
        # Margins in points are the same for every panel, so that a row of them lines up.
        figure.subplots_adjust(left=0.145, right=0.985, bottom=0.13, top=0.96)
        for i, one in enumerate(series):
            steps = np.array(one.steps)
            values = np.array([math.nan if v is None else v for v in one.values])
            many = len(steps) >= _MANY
            if one.margins:
                half = np.array([math.nan if v is None else v for v in one.margins])
                band = (values - half, values + half)
                axes.fill_between(steps, *band, color=_SERIES[i % len(_SERIES)], alpha=0.15, linewidth=0)
            smooth = many and not one.held_out
            axes.plot(
                *thin(steps, values, max_points),
                color=_SERIES[i % len(_SERIES)],
                linestyle="--" if one.held_out else "-",
                linewidth=0.6 if smooth else 1.2,
                alpha=0.35 if smooth else 1.0,
                marker="" if many else "o",
                markersize=2.8,
            )
            if smooth:
                mean = running_mean(values, max(3, len(values) // 20))
                axes.plot(*thin(steps, mean, max_points), color=_SERIES[i % len(_SERIES)])
        _scale(axes, [v for one in series for v in one.finite])
        _linear(axes.xaxis, 4, integer=True)
        return _svg(figure, tight=False)


def intervals(rows: Sequence[tuple[str, Estimate]], *, label: str, key: str) -> Markup:
    """A dot with its interval for each run, the first on top."""
    with _style(key):
        figure, axes = _axes(5.0, 0.6 + 0.24 * max(len(rows), 4))
        for y, (_, e) in enumerate(rows):
            if e.low is not None and e.high is not None:
                axes.plot([e.low, e.high], [y, y], color=_SERIES[0], linewidth=2.6, alpha=0.35)
            axes.plot([e.mean], [y], color=_SERIES[0], marker="o")
        axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        _linear(axes.xaxis, 5)
        return _svg(figure)


def frontier(points: Sequence[tuple[str, float, Estimate]], *, label: str, key: str) -> Markup:
    """What was gained against how far each run moved: (name, KL in nats, estimate)."""
    with _style(key):
        figure, axes = _axes(5.0, 0.6 + 0.24 * min(max(len(points), 5), 12))
        width, height = np.ptp([kl for _, kl, _ in points]), np.ptp([e.mean for _, _, e in points])
        for i, (name, kl, e) in enumerate(points):
            if e.low is not None and e.high is not None:
                axes.plot([kl, kl], [e.low, e.high], color=_SERIES[0], linewidth=2.6, alpha=0.35)
            axes.plot([kl], [e.mean], color=_SERIES[0], marker="o")
            crowded = any(
                abs(kl - other) <= 0.15 * width and abs(e.mean - near.mean) <= 0.1 * height
                for _, other, near in points[:i]
            )
            if len(points) <= 12:
                x, side = (-5, "right") if crowded else (5, "left")
                axes.annotate(_short(name), (kl, e.mean), (x, 2), textcoords="offset points", ha=side)
        axes.margins(x=0.14, y=0.1)
        axes.set_xlabel("KL to the reference, nats")
        axes.set_ylabel(label)
        _linear(axes.xaxis, 5)
        _scale(axes, [e.mean for _, _, e in points])
        return _svg(figure)


def waterfall(changes: Sequence[float], *, key: str) -> Markup:
    """A bar for each prompt's change, the largest gain first."""
    with _style(key):
        figure, axes = _axes(10.4, 1.5)
        ranks = np.arange(1.0, len(changes) + 1)
        x, y = thin(ranks, np.array(changes), 400)
        width = 0.8 * len(changes) / len(x)
        for side, colour in ((y > 0, _GOOD), (y < 0, _BAD)):
            axes.bar(x[side], y[side], width=width, color=colour, linewidth=0)
        axes.axhline(0, color=_MUTED, linewidth=0.6)
        axes.margins(x=0.01)
        axes.set_xlabel("prompts, from the largest gain to the largest loss")
        _linear(axes.xaxis, 8, integer=True)
        _scale(axes, changes)
        return _svg(figure)


def scatter(
    x: Sequence[float],
    values: Sequence[float],
    *,
    best: int,
    label: str,
    key: str,
    ticks: Sequence[str] = (),
    line: Sequence[float] = (),
    is_log: bool = False,
) -> Markup:
    """A dot for each value, that of index `best` marked. `ticks` name the places 0, 1 ... of x; `line` goes over the
    same x."""
    with _style(key):
        figure, axes = _axes(4.2, 2.4)
        if line:
            axes.plot(x, line, color=_MUTED, linewidth=0.8, drawstyle="steps-post")
        axes.plot(x, values, color=_SERIES[0], linestyle="", marker="o", alpha=0.75)
        axes.plot([x[best]], [values[best]], color=_GOOD, marker="o", markersize=7)
        _scale(axes, values)
        _linear(axes.xaxis, 5)
        if ticks:
            axes.set_xticks(range(len(ticks)), [_short(tick) for tick in ticks])
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        elif is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1,) if max(x) > 100 * min(x) else (1, 2, 5), numticks=5))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(compact))
        axes.set_xlabel(label)
        return _svg(figure)


def reliability(points: Sequence[tuple[float, Estimate]], *, label: str, key: str) -> Markup:
    """(confidence, share that is right) of each bin, the larger the dot the more pairs; dashed: perfect calibration."""
    with _style(key):
        figure, axes = _axes(4.2, 3.0)
        most = max((e.n or 1 for _, e in points), default=1)
        axes.plot([0.5, 1.0], [0.5, 1.0], color=_MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
        for x, e in points:
            if e.low is not None and e.high is not None:
                axes.plot([x, x], [e.low, e.high], color=_SERIES[0], linewidth=2.6, alpha=0.35)
        axes.plot([x for x, _ in points], [e.mean for _, e in points], color=_SERIES[0], linewidth=0.8)
        for x, e in points:
            axes.plot([x], [e.mean], color=_SERIES[0], marker="o", markersize=2.5 + 5 * math.sqrt((e.n or 1) / most))
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(min([0.48, *(e.mean for _, e in points), *(e.low for _, e in points if e.low is not None)]), 1.02)
        axes.set_xlabel(label)
        axes.set_ylabel("share that is right")
        _linear(axes.xaxis, 5)
        _linear(axes.yaxis, 5)
        return _svg(figure)


def histogram(edges: Sequence[float], sides: Sequence[tuple[str, Sequence[float]]], *, label: str, key: str) -> Markup:
    """Counts of several sides over the same bins, in the colours of the series in their order."""
    with _style(key):
        figure, axes = _axes(4.2, 3.0)
        for (_, counts), colour in zip(sides, _SERIES, strict=False):
            axes.stairs(counts, edges, color=colour, fill=True, alpha=0.25, linewidth=0)
            axes.stairs(counts, edges, color=colour, linewidth=1.2)
        axes.set_xlabel(label)
        axes.set_ylabel("responses")
        _linear(axes.xaxis, 6)
        _linear(axes.yaxis, 5, integer=True)
        return _svg(figure)


def overoptimisation(
    x: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float]]],
    *,
    label: str,
    peak: int,
    key: str,
) -> Markup:
    """Proxy above, gold below, over one x axis; the dashed line stands at index `peak`."""
    with _style(key):
        figure = Figure(figsize=(5.6, 3.2))
        panels = figure.subplots(len(curves), 1, sharex=True)
        for axes, (name, values), colour in zip(panels, curves, _SERIES[1::-1], strict=True):
            axes.axvline(x[peak], color=_MUTED, linewidth=0.7, linestyle=(0, (3, 2)))
            axes.plot(x, values, color=colour, marker="o", ms=2.8)
            axes.set_ylabel(name)
            _scale(axes, values)
        panels[-1].set_xlabel(label)
        _linear(panels[-1].xaxis, 5)
        figure.align_ylabels(panels)
        return _svg(figure)


def thin(x: Floats, y: Floats, max_points: int) -> tuple[Floats, Floats]:
    """At most `max_points` (>= 4) of the points: both ends, and the lowest and highest of each of equal buckets."""
    if len(x) <= max_points:
        return x, y
    keep = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), max_points // 2 - 1):
        if np.isnan(y[bucket]).all():
            keep.add(int(bucket[0]))
        else:
            keep |= {int(bucket[np.nanargmin(y[bucket])]), int(bucket[np.nanargmax(y[bucket])])}
    index = sorted(keep)
    return x[index], y[index]


def running_mean(values: Floats, width: int) -> Floats:
    """Centred mean of those of `width` values that are finite; nan where none is."""
    seen = np.isfinite(values)
    kernel = np.ones(min(width, len(values)))
    total = np.convolve(np.where(seen, values, 0.0), kernel, "same")
    count = np.convolve(seen.astype(float), kernel, "same")
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0.5)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _linear(axis: Axis, num_ticks: int, *, integer: bool = False) -> None:
    axis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10], integer=integer))
    axis.set_major_formatter(FuncFormatter(compact))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Linear, or logarithmic where one value would flatten all others."""
    sizes = np.abs([v for v in values if v != 0.0])
    typical = float(np.median(sizes)) if len(sizes) else 0.0
    if typical == 0.0 or float(sizes.max()) <= 1e4 * typical:
        _linear(axes.yaxis, 5)
        return
    if min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
    else:
        axes.set_yscale("symlog", linthresh=typical)
        locator = SymmetricalLogLocator(base=10, linthresh=typical)
        locator.set_params(numticks=5)
        axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(compact))


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _style(key: str) -> AbstractContextManager[None]:
    """The house style over matplotlib's own defaults, whatever the user's matplotlibrc says; `key` makes a drawing's
    ids its own on a page of many."""
    return style.context(["default", {**_STYLE, "svg.hashsalt": key}])


def _svg(figure: Figure, *, tight: bool = True) -> Markup:
    """The drawing without prolog, namespaces, fonts, and digits that nobody sees."""
    file = StringIO()
    box: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.03} if tight else {}
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts count, not matplotlib's
        figure.savefig(file, format="svg", transparent=True, metadata=metadata, **box)
    svg = _ROOT.sub(r"<svg \1>", file.getvalue(), count=1)
    return Markup(_TAG.sub(lambda tag: _trim(tag[0]), svg))


def _trim(tag: str) -> str:
    for pattern, replacement in _TRIM:
        tag = pattern.sub(replacement, tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return tag
