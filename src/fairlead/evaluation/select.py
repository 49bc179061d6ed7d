"""Selects of scored samples what is learned from, as a round of training does, and writes it as demonstrations. What is
discarded on the way is kept in a file of its own, with its reason."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from fairlead.data.sources import write_jsonl
from fairlead.errors import ConfigError, DataError
from fairlead.evaluation.asked import Settings, asked, require_jsonl
from fairlead.rollout.rewards.returned import TELLING
from fairlead.rollout.samples import numbers_of, read_samples, shares_of
from fairlead.rollout.screen import open_judge
from fairlead.rollout.select import SelectSettings, select


def select_file(scored: str | Path, settings: Settings = (), *, out: str | Path) -> dict[str, Any]:
    """Rank the samples of a file that `fairlead score` wrote, and write those that are kept to ``out``, whole or not at
    all, and those discarded to ``OUT.discarded.jsonl`` where there are any.

    ``settings`` are those of `SelectSettings`; texts are cleaned before they are scored, so `clean` is none here. A
    sample that was discarded, then or by `discard` now, has no rank. Returns the numbers of prompts, samples and those
    selected, the share of prompts that have none left, and mean scores: of the selected, and of the first of each
    prompt, which is what the model does without selection. Raises TrainingError where too many prompts have none left,
    DataError for rows without a score and for scores that are all the same.
    """
    require_jsonl(out)
    own: SelectSettings = asked("select", settings, SelectSettings).settings
    if own.clean:
        raise ConfigError("clean changes texts, and these are scored", hint="give clean to fairlead score")
    rows = read_samples(scored)
    if missing := [i for i, row in enumerate(rows, start=1) if "score" not in row]:
        raise DataError(f"{scored}: row {missing[0]} has no score", hint="score the samples first: fairlead score")
    judge, numbers = open_judge(own.discard), numbers_of(rows)
    reasons = [row.get("discarded") or judge(i, row["response"]) for i, row in enumerate(rows)]
    keys = torch.tensor(
        [torch.nan if reason else row["score"] for row, reason in zip(rows, reasons, strict=True)], dtype=torch.float64
    )
    keep, empty = select(keys, numbers, own, shares_of(reasons))
    known = ~keys.isnan()
    _require_difference(keys[known], int(keep.sum()), str(scored))
    firsts = keys[torch.tensor([0, *accumulate(numbers[:-1])])]
    write_jsonl(out, [row for row, is_kept in zip(rows, keep.tolist(), strict=True) if is_kept])
    _write_discarded(Path(out), [{**row, "discarded": why} for row, why in zip(rows, reasons, strict=True) if why])
    return {
        "scored": str(scored),
        "out": str(out),
        "prompts": len(numbers),
        "samples": len(rows),
        "selected": int(keep.sum()),
        "prompts_without": empty,
        "discarded": dict(Counter(reason for reason in reasons if reason)),
        "scores": {
            "selected": float(keys[keep].mean()),
            "first": float(firsts[~firsts.isnan()].mean()) if bool((~firsts.isnan()).any()) else None,
            "all": float(keys[known].mean()),
        },
    }


def describe(result: dict[str, Any]) -> str:
    """What was done, in a line."""
    discarded = "; ".join(f"{number:,} {reason}" for reason, number in result["discarded"].items())
    scores = result["scores"]
    return (
        f"{result['selected']:,} of {result['samples']:,} samples of {result['prompts']:,} prompts selected, "
        f"{result['prompts_without']:.0%} of the prompts have none; discarded: {discarded or 'none'}; mean score "
        f"{scores['selected']:.3g} of the selected, {scores['all']:.3g} of all"
    )


def _require_difference(scores: torch.Tensor, kept: int, place: str) -> None:
    if kept < len(scores) and len(scores) >= TELLING and bool((scores == scores[0]).all()):
        raise DataError(
            f"{place}: all {len(scores)} scores are {float(scores[0]):g}, so the first samples would be selected",
            hint="a reward that tells the responses apart",
        )


def _write_discarded(out: Path, rows: list[dict[str, Any]]) -> None:
    path = out.with_suffix(".discarded.jsonl")
    if rows:
        write_jsonl(path, rows)
    else:
        path.unlink(missing_ok=True)
