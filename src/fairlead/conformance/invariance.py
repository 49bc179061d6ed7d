"""One gradient however a step is laid out: micro-batches, padding, packing and shared prompts. The step is the real
source's; every layout is compared with one packed micro-batch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.conformance.case import Rows, prompts
from fairlead.conformance.pairs import PAIRS, pair_rows
from fairlead.conformance.policies import TREE
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
    rewarded: bool = False
    mixed: Rows = field(default_factory=list)
    """Text learned beside the rows."""


PAIRED = {"train.batch_size": 64}
ROUND = {"max_new_tokens": TREE.length, "rollout_size": "all", "rollout_rows": 64, "num_samples": 4, "kl_coef": 0.1}


def _online(name: str, algorithm: str, **more: Any) -> Layouts:
    settings = {f"{algorithm}.{key}": value for key, value in ROUND.items()}
    return Layouts(name, algorithm, {"train.batch_size": 12, **settings}, TREE, prompts(TREE, 4), rewarded=True, **more)


ALL: dict[str, Layouts] = {
    each.name: each
    for each in (
        Layouts("sft", "sft", PAIRED, PAIRS, pair_rows("demonstrations")[::6]),
        Layouts("dpo", "dpo", PAIRED, PAIRS, pair_rows()[::6]),
        Layouts("dpo-sft", "dpo", {**PAIRED, "dpo.loss": {"sigmoid": 1.0, "sft": 0.5}}, PAIRS, pair_rows()[::6]),
        Layouts("dpo-aot", "dpo", {**PAIRED, "dpo.loss": "aot"}, PAIRS, pair_rows()[::6]),
        Layouts("kto", "kto", PAIRED, PAIRS, pair_rows("labels")[::9]),
        Layouts("bco", "bco", PAIRED, PAIRS, pair_rows("labels")[::9]),
        Layouts("reward", "reward", PAIRED, PAIRS, pair_rows()[::6]),
        _online("rloo", "rloo"),
        _online("ppo", "ppo"),
        _online("ppo-ptx", "ppo", mixed=[{"text": text} for text in TREE.texts if text]),
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
        settings, reward = (
            {**each.settings, **layout, **_text(each, folder)},
            each.task.reward if each.rewarded else None,
        )
        one = staged(each.task, each.algorithm, settings, each.rows, folder, dtype=dtype, reward=reward)
        step = next(one.steps())
        one.move()
        found = one.gradients(step)
        if wanted is None:
            wanted = found
        else:
            largest = max(largest, apart(found, wanted))
    return largest


def _text(each: Layouts, folder: Path) -> dict[str, Any]:
    """The settings of what is mixed in, written to a file."""
    if not each.mixed:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, each.mixed)), "utf-8")
    return {f"{each.algorithm}.mixed": {"path": str(folder / "text.jsonl"), "coef": 0.5, "batch_size": 8}}


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest ||difference|| / ||wanted|| of a tensor. Biases of keys aside, which softmax cannot see."""
    assert found.keys() == wanted.keys()
    seen = [name for name in wanted if not name.endswith("k_proj.bias") and float(wanted[name].norm()) > 0]
    assert all(float(found[name].norm()) == 0 for name in wanted if float(wanted[name].norm()) == 0)
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in seen)
