"""One gradient however a step is laid out: micro-batches, padding, packing and shared prompts. The step is the real
source's; every layout is compared with one packed micro-batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.conformance.case import Rows
from fairlead.conformance.pairs import PAIRS, pair_rows
from fairlead.conformance.staged import staged
from fairlead.conformance.tasks import Task

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
LAYOUTS = [
    {"data.packing": packing, "train.micro_batch_tokens": tokens}
    for packing, tokens in itertools.product(("best-fit", "none"), (8192, 24))
]
"""The first is what the others are held against: all in one packed row, prompts shared."""


@dataclass(frozen=True, slots=True)
class Layouts:
    """One algorithm whose gradient must not depend on the layout."""

    name: str
    algorithm: str
    settings: Mapping[str, Any]
    task: Task
    rows: Rows


ALL: dict[str, Layouts] = {
    each.name: each
    for each in (
        Layouts("dpo", "dpo", {"train.batch_size": 64}, PAIRS, pair_rows()[::3]),
        Layouts("kto", "kto", {"train.batch_size": 64}, PAIRS, pair_rows("labels")[::5]),
    )
}


def invariance(name: str, folder: Path) -> dict[str, Any]:
    """A row: the largest difference of a tensor's gradient over all layouts, in both types."""
    each = ALL[name]
    found = {dtype: _largest(each, folder / str(dtype), dtype) for dtype in BOUNDS}
    return {
        "case": name,
        "algorithm": each.algorithm,
        "layouts": len(LAYOUTS),
        "float64": found[torch.float64],
        "float32": found[torch.float32],
        "pass": all(found[dtype] <= bound for dtype, bound in BOUNDS.items()),
    }


def _largest(each: Layouts, folder: Path, dtype: torch.dtype) -> float:
    wanted: dict[str, Tensor] | None = None
    largest = 0.0
    for layout in LAYOUTS:
        one = staged(each.task, each.algorithm, {**each.settings, **layout}, each.rows, folder, dtype=dtype)
        step = next(one.steps())
        one.move()
        found = one.gradients(step)
        if wanted is None:
            wanted = found
        else:
            largest = max(largest, apart(found, wanted))
    return largest


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest ||difference|| / ||wanted|| of a tensor. Biases of keys aside, which softmax cannot see."""
    assert found.keys() == wanted.keys()
    seen = [name for name in wanted if not name.endswith("k_proj.bias") and float(wanted[name].norm()) > 0]
    assert all(float(found[name].norm()) == 0 for name in wanted if float(wanted[name].norm()) == 0)
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in seen)
