"""Rows that share prompts and are packed give the gradients of separate padded rows."""

from __future__ import annotations

import pytest
import torch

from fairlead.config import AdapterSection
from fairlead.data.pack import by_response, token_batch
from fairlead.errors import ModelError
from fairlead.models.attention import FAMILIES, Forest
from fairlead.models.roles import Models
from tests.families import prepared
from tests.tiny import TREES, base, gradients, models, relative_error, scatter, separate

NEEDS = frozenset({"logprobs", "entropy", "values"})
CASTS = {"cohere"}
"""Families with a norm of their own that casts to fp32; the others' fp64 gradients agree to rounding."""


def _measure(architecture: str, dtype: torch.dtype, *, packed: bool, checkpointing: bool = True, lora: bool = True):
    adapter = AdapterSection(rank=4) if lora else None
    made = Models(prepared(architecture, dtype), ("policy", "value"), adapter=adapter,
                  gradient_checkpointing=checkpointing)  # fmt: skip
    scatter(made) if lora else scatter_heads(made)
    batch = token_batch(TREES if packed else separate(TREES), packed=packed, pad_id=0)
    with made.use("policy"):
        outputs = made(batch, NEEDS)
        loss = outputs.logprobs.sum() + 0.3 * outputs.entropy.sum() + (outputs.values**2).sum()
        loss.backward()
    return [row.detach() for row in by_response(outputs.logprobs, batch)], gradients(made)


def scatter_heads(made) -> None:
    with torch.no_grad():
        for parameter in made.heads.parameters():
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_a_forest_under_checkpointing_and_peft_has_the_gradients_of_separate_rows(architecture: str) -> None:
    logprobs, got = _measure(architecture, torch.float64, packed=True)
    expected, wanted = _measure(architecture, torch.float64, packed=False)
    bound = 1e-6 if architecture in CASTS else 1e-12
    assert max(float((a - b).abs().max()) for a, b in zip(logprobs, expected, strict=True)) < bound
    assert relative_error(got, wanted) < bound


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("lora", [True, False])
def test_in_fp32_the_gradients_agree_within_one_in_a_hundred_thousand(architecture: str, lora: bool) -> None:
    _, got = _measure(architecture, torch.float32, packed=True, lora=lora)
    _, wanted = _measure(architecture, torch.float32, packed=False, lora=lora)
    assert relative_error(got, wanted) < 1e-5


def test_checkpointing_changes_no_gradient_but_by_rounding() -> None:
    """Without it the last MLP computes fewer rows at once."""
    _, with_it = _measure("llama", torch.float64, packed=True, checkpointing=True)
    _, without = _measure("llama", torch.float64, packed=True, checkpointing=False)
    assert relative_error(with_it, without) < 1e-13


def test_forest_logprobs_are_those_of_plain_transformers_on_each_sequence() -> None:
    made = models(("policy",), architecture="llama")
    batch = token_batch(TREES, packed=True, pad_id=0)
    with torch.no_grad(), made.use("policy"):
        rows = by_response(made(batch, frozenset({"logprobs"})).logprobs, batch)
    plain = base("llama").model
    plain.set_attn_implementation("eager")
    for tree, got in zip(separate(TREES), rows, strict=True):
        ids = torch.tensor([[*tree.prompt, *tree.responses[0]]])
        with torch.no_grad():
            wanted = plain(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(got, wanted[max(len(tree.prompt) - 1, 0) :], atol=1e-5, rtol=0)


def test_a_dense_mask_of_a_long_row_is_refused() -> None:
    batch = token_batch([separate(TREES)[0]] * 400, packed=True, pad_id=0)
    with pytest.raises(ModelError, match="4096"):
        Forest.of(batch).dense(None)
