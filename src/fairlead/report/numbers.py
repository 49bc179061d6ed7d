"""Numbers as a person reads them, in text and at the ticks of an axis. Knows no page and no run directory."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fairlead.report.read import Estimate, finite

_MINUS, _DASH = "\u2212", "\u2013"


def number(value: object, places: int | None = None) -> str:
    """At most four significant digits (whole numbers: all), thousands separated; a dash where there is no value."""
    x = finite(value)
    if x is None:
        return _DASH
    if isinstance(value, int) and abs(x) < 1e15:
        text = f"{value:,}"
    elif abs(x) >= 1e9 or (places is None and 0 < abs(x) < 1e-4):
        text = _scientific(x)
    else:
        digits = places_for([x]) if places is None else places
        text = f"{round(x, digits):z,.{max(digits, 0)}f}"
        text = text.rstrip("0").rstrip(".") if places is None and digits > 0 else text
    return text.replace("-", _MINUS)


def places_for(values: Iterable[float]) -> int:
    """Decimals that show three significant digits of the largest value, four from 1,000 on (negative: tens ...)."""
    largest = max((abs(v) for v in values), default=0.0)
    if largest == 0.0:
        return 0
    exponent = math.floor(math.log10(largest))
    return min(2 - exponent, 6) if exponent < 3 else 3 - exponent


def signed(value: float, places: int | None = None) -> str:
    return f"+{number(value, places)}" if value > 0 else number(value, places)


def interval(e: Estimate | None, places: int | None = None) -> str:
    """`[low, high]`, or nothing where there is none."""
    if e is None or e.low is None or e.high is None:
        return ""
    digits = max(places_for([e.mean]), 0) if places is None else places
    return f"[{number(e.low, digits)}, {number(e.high, digits)}]"


def duration(seconds: object) -> str:
    x = finite(seconds)
    if x is None:
        return _DASH
    if x < 60:
        return f"{number(x)} s"
    minutes = round(x / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def compact(value: float, _: object = None) -> str:
    """A number in few letters, for the ticks of an axis: 0.25, 20k, 1.5M."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        text = _scientific(value)
    elif size >= 1e4:
        text = f"{value / 1e6:.4g}M" if size >= 1e6 else f"{value / 1e3:.4g}k"
    else:
        text = f"{value:.4g}"
    return text.replace("-", _MINUS)


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
