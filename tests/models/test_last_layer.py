"""The last layer's MLP, computed where its result is read, gives what the whole layer gives there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fairlead.data.pack import preference_batch, token_batch
from fairlead.data.render import Tree
from fairlead.models import roles
from fairlead.models.attention import FAMILIES
from fairlead.models.last_layer import last_mlp_at, read_places
from fairlead.models.roles import Models
from tests.families import prepared
from tests.tiny import TREES, gradients, models, relative_error


@contextmanager
def whole(*_: Any) -> Iterator[None]:
    yield


def measured(made: Models, role: str, needs: frozenset[str], *, packed: bool) -> dict[str, Tensor]:
    """Outputs and gradients."""
    batch = token_batch(TREES, packed=packed, pad_id=0)
    for parameter in made.trainable.values():
        parameter.grad = None
    with made.use(role):
        outputs = made(batch, needs)
        found = {name: getattr(outputs, name) for name in needs}
        torch.stack([(each**2).sum() for each in found.values()]).sum().backward()
    return {name: each.detach() for name, each in found.items()} | gradients(made)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_family_has_the_outputs_and_gradients_of_the_whole_layer(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Models(prepared(architecture, torch.float64), ("policy", "value"))
    needs = frozenset({"logprobs", "values"})
    found = measured(made, "policy", needs, packed=True)
    monkeypatch.setattr(roles, "last_mlp_at", whole)
    assert relative_error(found, measured(made, "policy", needs, packed=True)) < 1e-6


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_read_the_ends_alone(packed: bool, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = models(("reward",), dtype=torch.float64, lora=lora)
    found = measured(made, "reward", frozenset({"scores"}), packed=packed)
    monkeypatch.setattr(roles, "last_mlp_at", whole)
    assert relative_error(found, measured(made, "reward", frozenset({"scores"}), packed=packed)) < 1e-12


def test_the_places_are_those_before_counted_tokens_and_the_ends() -> None:
    """A prompt of three tokens and two answers: 0 1 2 | 3 4 | 5 6 7."""
    batch = preference_batch([Tree((5, 6, 7), ((8, 9), (4, 5, 1)))], packed=True, pad_id=0)
    assert read_places(batch, tokens=True, ends=False).tolist() == [2, 3, 5, 6]
    assert read_places(batch, tokens=False, ends=True).tolist() == [4, 7]
    assert read_places(batch, tokens=True, ends=True).tolist() == [2, 3, 4, 5, 6, 7]


def test_the_mlp_sees_those_tokens_alone_and_is_itself_again_afterwards() -> None:
    made, rows = models(("policy",)), list[int]()
    mlp = made.causal.get_decoder().layers[-1].mlp
    mlp.down_proj.register_forward_hook(lambda _module, _given, out: rows.append(out.shape[0]))
    states, before = torch.randn(1, 10, 32), mlp.forward
    with last_mlp_at(made.causal, torch.tensor([2, 7]), 10):
        found = mlp(states)
    assert rows == [2]
    torch.testing.assert_close(found[0, [2, 7]], mlp(states)[0, [2, 7]])
    assert not found[0, [0, 1, 3, 4, 5, 6, 8, 9]].any()
    assert mlp.forward == before


def test_where_most_tokens_are_read_nothing_changes() -> None:
    made = models(("policy",))
    mlp, states = made.causal.get_decoder().layers[-1].mlp, torch.randn(1, 10, 32)
    with last_mlp_at(made.causal, torch.arange(9), 10):
        assert mlp(states)[0, 9].any()
