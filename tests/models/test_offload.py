"""Activations kept elsewhere: the same gradients, and no weight is copied."""

from __future__ import annotations

import pytest
import torch

from fairlead.data.pack import token_batch
from fairlead.models.offload import offloaded
from tests.tiny import TREES, gradients, models, scatter

LOGPROBS = frozenset({"logprobs"})


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_without(lora: bool, checkpointing: bool) -> None:
    found: list[dict[str, torch.Tensor]] = []
    batch = token_batch(TREES, packed=True, pad_id=0)
    for smallest in (None, 0):
        made = models(("policy",), lora=lora, gradient_checkpointing=checkpointing)
        scatter(made)
        with made.use("policy"):
            if smallest is None:
                logprobs = made(batch, LOGPROBS).logprobs
            else:
                with offloaded(made.parameters(), smallest):
                    logprobs = made(batch, LOGPROBS).logprobs
            logprobs.sum().backward()
        found.append(gradients(made))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_activations_are_copied_and_weights_are_not() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    states = torch.randn(3, 4, requires_grad=True) * 1
    held = torch.nn.functional.linear(states, weight)
    with offloaded([weight], 0):
        made = torch.nn.functional.linear(states, weight).grad_fn
    assert held.grad_fn is not None
    assert made is not None
    kept = [getattr(made, name) for name in dir(made) if name.startswith("_saved_") and "raw" not in name]
    places = {t.untyped_storage().data_ptr() for t in kept if isinstance(t, torch.Tensor)}
    assert weight.untyped_storage().data_ptr() in places
    assert states.untyped_storage().data_ptr() not in places


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_less_between_the_passes() -> None:
    held: list[int] = []
    for smallest in (1 << 40, 0):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, device="cuda") for _ in range(8)])
        states = torch.randn(4096, 1024, device="cuda")
        before = torch.cuda.memory_allocated()
        with offloaded(layers.parameters(), smallest):
            result = layers(states).sum()
        held.append(torch.cuda.memory_allocated() - before)
        result.backward()
    assert held[1] < held[0] / 4
