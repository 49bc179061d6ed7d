"""Training never holds logits of a whole batch: no tensor of a step comes near [B, T, V]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import CPU, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from fairlead.algorithms import dpo, ppo, sft
from fairlead.data.pack import preference_batch, token_batch
from fairlead.data.render import Tree
from fairlead.ops import logprobs
from fairlead.training.loop import backward


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_step_never_materialises_the_logits_of_its_rows(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fairlead.config import ScratchSection
    from fairlead.models.load import build, prepare
    from fairlead.models.roles import Models

    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 40_000)
    sizes = ScratchSection(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, context_length=256)
    model = build(sizes, tokenizer(), 0, torch.float32)
    model.resize_token_embeddings(5000, mean_resizing=False)
    made = Models(prepare(model, tokenizer(), None, CPU), ("policy",), compared=False)
    trees = [Tree((5, 6, 7), (tuple(range(8, 108)), tuple(range(9, 109))))] * 2
    if algorithm == "sft":
        batch, passes = token_batch(trees, packed=True, pad_id=0), sft.passes(sft.Settings())
    else:
        batch = preference_batch(trees, packed=True, pad_id=0, reference_logprobs=[torch.zeros(100)] * 4)
        passes = dpo.passes(dpo.Settings())
    full = int(batch.loss_mask.sum()) * 5000
    with Largest() as seen:
        backward(made, passes, [batch])
    assert seen.numel == 5000 * 16  # the embedding's gradient: larger than any chunk of logits
    assert seen.numel < full / 20


def test_a_rollout_is_measured_without_logits_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny import models

    from fairlead.rollout.experience import measure_tokens

    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3200)
    made = models(("policy", "reference", "value"))
    trees = [Tree((5, 6, 7), (tuple(range(8, 108)),))] * 4
    with Largest() as seen:
        measure_tokens(made, trees, temperature=ppo.Settings().temperature, budget=4096)
    assert seen.numel < 400 * 320 / 2
