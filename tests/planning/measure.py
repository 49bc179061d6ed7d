"""Prints the planned and the measured bytes of one step of training, beyond what is held before it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.tiny import CPU, base

from fairlead.algorithms import find
from fairlead.assemble import build_models
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.planning.memory import total
from fairlead.planning.plan import plan_run
from fairlead.runner import resolve
from fairlead.training.loop import backward

MODES = {
    "full": ("model.gradient_checkpointing=false",),
    "lora": ("model.adapter.rank=8",),
    "checkpointing": ("model.gradient_checkpointing=true",),
}


def resident(field: str) -> int:
    """VmRSS, or VmHWM: the most since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(mode: str) -> tuple[int, int]:
    made = base(hidden_size=512, num_layers=8, num_heads=8, context_length=512)
    with tempfile.TemporaryDirectory() as folder:
        made.model.config.save_pretrained(folder)
        settings = ["train.micro_batch_tokens=2048", *MODES[mode]]
        recipe = resolve({"algorithm": "sft", "model": {"path": folder}}, settings).recipe
        algorithm = find("sft")
        planned = plan_run(recipe, algorithm, build_models)
    models = build_models(recipe, algorithm, made, CPU)
    passes = algorithm.passes(recipe.settings)
    backward(models, passes, [_batch(1, 16)])  # libraries take what they keep for themselves
    for parameter in models.trainable.values():
        parameter.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    backward(models, passes, [_batch(4, 512)] * 2)  # the second finds the gradients of the first
    assert planned.step is not None
    return planned.step.bytes + total(planned.parts)["gradients"], resident("VmHWM") - before


def _batch(texts: int, length: int):
    return token_batch([Tree((), ((5,) * length,))] * texts, packed=True, pad_id=0)


if __name__ == "__main__":
    print(*measure(sys.argv[1]))
