"""Roles on one base: switching loses no gradient, training one leaves the others' bytes, heads are counted."""

from __future__ import annotations

import copy

import pytest
import torch

from fairlead.config import AdapterSection
from fairlead.data.pack import token_batch
from fairlead.errors import ModelError
from fairlead.models.adapters import targets
from fairlead.models.roles import Models
from tests.tiny import TREES, base, gradients, models, relative_error, scatter

LOGPROBS, VALUES = frozenset({"logprobs"}), frozenset({"values"})


def _batch():
    return token_batch(TREES, packed=True, pad_id=0)


def test_switching_roles_keeps_every_trainable_parameter_trainable() -> None:
    made = models(("policy", "reference", "value"), lora=True, value_trunk="adapter")
    for role in ("policy", "reference", "value", "policy"):
        with made.use(role):
            pass
    assert all(parameter.requires_grad for parameter in made.trainable.values())


def test_gradients_of_each_role_equal_those_of_a_model_of_its_own() -> None:
    both = models(("policy", "value"), lora=True, value_trunk="adapter")
    with both.use("policy"):
        both(_batch(), LOGPROBS).logprobs.sum().backward()
    with both.use("value"):
        (both(_batch(), VALUES).values ** 2).sum().backward()
    alone = copy.deepcopy(models(("policy", "value"), lora=True, value_trunk="adapter"))
    with alone.use("policy"):
        alone(_batch(), LOGPROBS).logprobs.sum().backward()
    policy = gradients(alone)
    for parameter in alone.trainable.values():
        parameter.grad = None
    with alone.use("value"):
        (alone(_batch(), VALUES).values ** 2).sum().backward()
    value = gradients(alone)
    assert not policy.keys() & value.keys()
    assert relative_error(gradients(both), policy | value) < 1e-6


@pytest.mark.parametrize("trunk", ["adapter", "detached"])
def test_training_the_value_leaves_the_policys_bytes(trunk: str) -> None:
    made = models(("policy", "value"), lora=True, value_trunk=trunk)
    optimizer = torch.optim.SGD(list(made.trainable.values()), lr=0.1)
    before = {name: parameter.clone() for name, parameter in made.trainable.items()}
    role = "value" if trunk == "adapter" else "policy"
    with made.use(role):
        ((made(_batch(), VALUES).values - 1) ** 2).sum().backward()
    optimizer.step()
    changed = {name for name, parameter in made.trainable.items() if not torch.equal(parameter, before[name])}
    assert changed
    assert all("heads.value" in name or ".value." in name for name in changed)


def test_on_a_shared_trunk_the_values_loss_reaches_the_policys_adapter() -> None:
    made = models(("policy", "value"), lora=True, value_trunk="shared")
    scatter(made)
    with made.use("policy"):
        (made(_batch(), VALUES).values ** 2).sum().backward()
    assert any(".policy." in name and float(gradient.abs().sum()) > 0 for name, gradient in gradients(made).items())


@pytest.mark.parametrize("lora", [True, False])
def test_the_reference_is_the_policy_before_training_and_stays(lora: bool) -> None:
    adapter = AdapterSection(rank=4) if lora else None
    made = Models(base(), ("policy", "reference"), adapter=adapter)
    batch = _batch()

    def logprobs(role: str) -> torch.Tensor:
        with torch.no_grad(), made.use(role):
            return made(batch, LOGPROBS).logprobs

    start = logprobs("reference")
    torch.testing.assert_close(logprobs("policy"), start, atol=0, rtol=0)
    scatter(made, 0.1)
    assert float((logprobs("policy") - start).abs().max()) > 1e-3
    torch.testing.assert_close(logprobs("reference"), start, atol=0, rtol=0)


def test_heads_are_counted_among_the_trainable_parameters() -> None:
    made = models(("policy", "value"), lora=True)
    adapters = sum(p.numel() for n, p in made.trainable.items() if ".lora_" in n)
    counts = made.parameter_counts()
    assert counts["heads"] == {"value": 33}
    assert counts["trainable"] == adapters + 33


def test_asking_for_what_a_pass_did_not_compute_says_so() -> None:
    made = models(("policy",))
    with made.use("policy"):
        outputs = made(_batch(), LOGPROBS)
    with pytest.raises(AttributeError, match="did not compute 'values'"):
        _ = outputs.values


def test_a_target_that_matches_nothing_lists_the_layers_there_are() -> None:
    with pytest.raises(ModelError, match="no layer is named wq") as error:
        targets(base().model, AdapterSection(targets=("wq", "q_proj")))
    assert "q_proj" in str(error.value)
    assert "lm_head" not in str(error.value)


def test_an_unknown_role_and_a_value_adapter_without_lora_are_refused() -> None:
    made = models(("policy",))
    with pytest.raises(ModelError, match="no role 'judge'"), made.use("judge"):
        pass
    with pytest.raises(ModelError, match=r"needs model\.adapter"):
        Models(base(), ("policy", "value"), value_trunk="adapter")


def test_dropout_is_off_where_roles_are_compared() -> None:
    made = Models(base(), ("policy", "reference"), adapter=AdapterSection(rank=4, dropout=0.5))
    scatter(made)
    with torch.no_grad(), made.use("policy"):
        first, second = (made(_batch(), LOGPROBS).logprobs for _ in range(2))
    assert torch.equal(first, second)
