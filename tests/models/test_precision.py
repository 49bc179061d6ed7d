"""Types of weights and of products: what a recipe gets on a CPU, on a GPU, and where a device lacks one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairlead.config import ModelSection
from fairlead.data.pack import token_batch
from fairlead.errors import ModelError
from fairlead.models.precision import autocast_of, dtype_of, training_notes
from fairlead.models.roles import Models
from tests.tiny import CPU, TREES, base, gradients, models, scatter

HALF, BRAIN, FULL, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LOGPROBS = frozenset({"logprobs"})


def section(dtype: str, adapter: str | None = None) -> ModelSection:
    return ModelSection.model_validate({"path": "x", "dtype": dtype, "adapter": adapter})


@pytest.mark.parametrize(
    ("dtype", "adapter", "weights", "products"),
    [
        ("auto", None, FULL, None),
        ("auto", "lora", FULL, None),
        ("float32", "lora", FULL, None),
        ("float64", None, DOUBLE, None),
        ("bfloat16", None, BRAIN, None),
        ("bfloat16", "lora", BRAIN, BRAIN),
        ("float16", None, FULL, HALF),
        ("float16", "lora", HALF, HALF),
    ],
)
def test_types_on_a_cpu(dtype: str, adapter: str | None, weights: torch.dtype, products: torch.dtype | None) -> None:
    asked = section(dtype, adapter)
    assert (dtype_of(asked, CPU), autocast_of(asked, CPU)) == (weights, products)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu_that_is_fast_at_bfloat16() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU of the Ampere generation or later")
    device = torch.device("cuda")
    assert (dtype_of(section("auto"), device), autocast_of(section("auto"), device)) == (FULL, BRAIN)
    assert (dtype_of(section("auto", "lora"), device), autocast_of(section("auto", "lora"), device)) == (BRAIN, BRAIN)


def test_a_type_that_the_device_cannot_compute_in_is_refused() -> None:
    """This torch was built without one of the two."""
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(
        ModelError, match=rf"model\.dtype=bfloat16: the device {missing} cannot compute in it"
    ) as caught:
        dtype_of(section("bfloat16"), torch.device(missing))
    assert caught.value.hint == "model.dtype=auto"


def test_training_all_weights_in_half_precision_is_said_aloud() -> None:
    (note,) = training_notes(section("bfloat16"), BRAIN)
    assert "all weights are trained in bfloat16: updates smaller than 1/256 of a weight are lost" in note
    assert torch.tensor(1.0, dtype=BRAIN) + 1 / 257 == 1  # the figure is true
    assert torch.tensor(1.0, dtype=BRAIN) + 1 / 255 > 1
    assert training_notes(section("bfloat16", "lora"), BRAIN) == ()
    assert training_notes(section("auto"), FULL) == ()


@pytest.mark.parametrize("kind", [BRAIN, HALF])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_autocast_gives_the_log_probabilities_of_fp32(kind: torch.dtype, architecture: str) -> None:
    found: list[torch.Tensor] = []
    for autocast in (None, kind):
        made = models(("policy",), architecture=architecture, autocast=autocast)
        scatter(made)
        with made.use("policy"):
            logprobs = made(token_batch(TREES, packed=True, pad_id=0), LOGPROBS).logprobs
            logprobs.sum().backward()
        found.append(logprobs.detach())
        assert {p.dtype for p in made.trainable.values()} == {FULL}
        assert {gradient.dtype for gradient in gradients(made).values()} == {FULL}
        assert logprobs.dtype == FULL
    difference = (found[0] - found[1]).abs().max().item()
    assert 0 < difference < {BRAIN: 3e-2, HALF: 4e-3}[kind]


@pytest.mark.parametrize("kind", [BRAIN, HALF])
def test_adapters_are_fp32_over_a_base_of_any_type(kind: torch.dtype) -> None:
    adapter = section("auto", "lora").adapter
    made = Models(base(dtype=kind), ("policy",), adapter=adapter, autocast=kind)
    plain = Models(base(dtype=FULL), ("policy",), adapter=adapter)
    batch, found = token_batch(TREES, packed=True, pad_id=0), list[Any]()
    for each in (made, plain):
        scatter(each)
        with each.use("policy"):
            found.append(each(batch, LOGPROBS).logprobs)
            found[-1].sum().backward()
        assert {p.dtype for p in each.trainable.values()} == {FULL}
        assert {gradient.dtype for gradient in gradients(each).values()} == {FULL}
    assert made.causal.dtype == kind
    assert (found[0] - found[1]).abs().max().item() < {BRAIN: 5e-2, HALF: 1e-2}[kind]
