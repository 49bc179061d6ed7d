"""Cases as they are measured, and the lines of the result file that several repeats of them, and of a peer, make.

Imports no torch: the process that starts the others reads these.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 1e-2
"""In bf16 both sides' losses may differ by this share of the peer's, at every step."""
SHARES = {"measured": "% of the measured matrix rate", "nominal": "% of the nominal matrix rate"}
BANDWIDTHS = {"measured": "% of the measured bandwidth", "nominal": "% of the nominal bandwidth"}


@dataclass
class Case:
    """What one process measured of one case."""

    name: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    """metric, unit, value; and where the same process measured a peer: peer, peer_name."""
    losses: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] | None = None
    """What a peer is asked; it answers with figures of the same metrics."""

    def add(self, metric: str, unit: str, value: float, **peer: Any) -> None:
        self.figures.append({"metric": metric, "unit": unit, "value": value, **peer})


def rates(case: Case, limit: Mapping[str, Any], found: float, of: str = "") -> None:
    """Operations a second, and their share of what the device can do. ``of`` ends the names."""
    case.add(f"operations a second{of}", "TFLOP/s", found / 1e12)
    for key, metric in SHARES.items():
        if limit[key]:
            case.add(f"{metric}{of}", "%", 100 * found / limit[key])


def bandwidth(case: Case, limit: Mapping[str, Any], found: float) -> None:
    """Bytes a second, and their share of what the device can do."""
    case.add("bytes a second", "TB/s", found / 1e12)
    for key, metric in BANDWIDTHS.items():
        if limit[key]:
            case.add(metric, "%", 100 * found / limit[key])


# --- lines ---------------------------------------------------------------------------------------------------------


def lines(repeats: Sequence[Case], peers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a case measured several times, beside the answers of a peer, one for each repeat or none at all.

    A figure the peer gives too has its ratio; that of repeat by repeat is what its range speaks of.
    """
    gap = differences(repeats, peers)
    made: list[dict[str, Any]] = []
    for figure in repeats[0].figures:
        metric = figure["metric"]
        ours = [_value(case, metric) for case in repeats]
        if "peer" in figure:
            theirs: list[float] = [_value(case, metric, "peer") for case in repeats]
            name, agree = figure["peer_name"], figure.get("agree")
        else:
            theirs = [answer["figures"][metric] for answer in peers if metric in answer["figures"]]
            name = peers[0]["peer_name"] if theirs else None
            agree = None if not theirs or gap is None else gap <= TOLERANCE
        made.append(
            {
                "case": repeats[0].name,
                "metric": metric,
                "unit": figure["unit"],
                **compared(ours, theirs),
                "peer_name": name,
                "repeats": len(ours),
                "agree": agree,
            }
            | ({"losses_differ_by": gap} if theirs and gap is not None else {})
            | ({"notes": repeats[0].notes} if repeats[0].notes and not made else {})
        )
    return made


def _value(case: Case, metric: str, key: str = "value") -> float:
    return next(figure[key] for figure in case.figures if figure["metric"] == metric)


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Medians, and the median and range of the ratio; none where there is no peer, or it measured nothing."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=False) if other]
    return {
        "ours": rounded(statistics.median(ours)),
        "peer": rounded(statistics.median(theirs)) if theirs else None,
        "ratio": rounded(statistics.median(ratios)) if ratios else None,
        "ratio_low": rounded(min(ratios)) if ratios else None,
        "ratio_high": rounded(max(ratios)) if ratios else None,
    }


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def differences(repeats: Iterable[Case], peers: Iterable[Mapping[str, Any]]) -> float | None:
    """The largest difference of a loss, as a share of the peer's, over the steps both sides took; none where one of
    them took none."""
    found = [
        abs(one - other) / abs(other)
        for case, answer in zip(repeats, peers, strict=False)
        for one, other in zip(case.losses, answer.get("losses", ()), strict=False)
    ]
    return rounded(max(found)) if found else None


def table(cases: Iterable[Mapping[str, Any]]) -> str:
    """For people."""
    rows: list[str] = []
    for each in cases:
        ratio = "-" if each["ratio"] is None else f"{each['ratio']:.3g}x"
        beside = "" if each["peer"] is None else f"{each['peer']:>12,.4g} {ratio:>8}  {each['peer_name']}"
        rows.append(f"{each['case']:50} {each['metric']:40} {each['ours']:>12,.4g} {each['unit']:8} {beside}".rstrip())
    return "\n".join(rows)
