"""The gradient of one step of an algorithm, on one rank or several, over rows whose shares differ in size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.end_to_end.rows import OWN, ROWS, SCRATCH, SETTINGS, brevity
from torch import Tensor

from fairlead.algorithms import find
from fairlead.assemble import Given, assemble
from fairlead.runner import resolve
from fairlead.training.loop import backward
from fairlead.training.stored import local, own_rows
from fairlead.types import Ranks

STEP = {"train.micro_batch_tokens": 64, "data.eval_fraction": 0, "model.dtype": "float64"}


def step(
    algorithm: str, ranks: Ranks, folder: Path, more: dict[str, Any] | None = None, rows: Any = None
) -> dict[str, Any]:
    """Gradients and metrics over all ranks, how many micro-batches each of them had, and what was sampled."""
    settings = {**SETTINGS, "model.scratch": SCRATCH, **OWN.get(algorithm, {}), **STEP, **(more or {})}
    if settings.get("model.path"):
        settings["model.scratch"] = None
    recipe, found = resolve({"algorithm": algorithm}, settings).recipe, find(algorithm)
    given = Given(data=rows or ROWS[algorithm], objects={"reward": brevity})
    stage, _ = assemble(recipe, found, given, folder, ranks=ranks)
    source = found.source(stage)
    scatter(stage.models.trainable, ranks)
    ranks.begin_step(1)
    micro_batches = next(iter(source))
    metrics = backward(stage.models, found.passes(recipe.settings), micro_batches, ranks)
    return {
        "gradients": {n: whole(p.grad).clone() for n, p in stage.models.trainable.items() if p.grad is not None},
        "metrics": metrics,
        "micro_batches": ranks.gather(len(micro_batches)),
        "texts": [path.read_text() for path in sorted(folder.glob("rounds/000/*.jsonl"))],
        "tokens": sampled(folder),
    }


@torch.no_grad()
def scatter(parameters: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Away from the reference, so that losses that couple a batch have something to couple; the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        values = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        first, last = own_rows(parameter, ranks)
        local(parameter).copy_(values[first:last] if values.ndim else values)


def whole(tensor: Any) -> Tensor:
    """A tensor of which each rank has a part, in one piece."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sampled(folder: Path) -> list[list[int]]:
    """The tokens of each response of the first round; none where none is sampled."""
    path = folder / "rounds" / "000" / "round.safetensors"
    if not path.exists():
        return []
    held = load_file(path)
    return [ids.tolist() for ids in held["response_ids"].split(held["response_lengths"].tolist())]
