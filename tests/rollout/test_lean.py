"""Lean layers: which families have them, and that they compute what the families' own code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import CONFIGS, prepared
from tests.tiny import CPU, models, scatter, tokenizer

from fairlead.config import AdapterSection
from fairlead.data.render import Renderer
from fairlead.models.load import Base, prepare
from fairlead.models.roles import Models
from fairlead.rollout import lean as module
from fairlead.rollout.lean import is_lean, lean
from fairlead.rollout.native import NativeSampler
from fairlead.types import Prompt, Rollout, Sampling

PROMPTS = [Prompt(text) for text in ("why?", "the lamp", "Question: why does the lamp flicker?", "a")]
LEAN = {"gemma", "llama", "mistral", "qwen2", "qwen3"}


def _layers(base: Base) -> int:
    return sum(is_lean(each, base.model.config._attn_implementation) for each in base.model.modules())


def _sampled(made: Models, role: str = "policy") -> list[Rollout]:
    renderer = Renderer(tokenizer(), template="question-answer", max_length=200)
    return NativeSampler(made, renderer, role=role).generate(PROMPTS, sampling=Sampling(16), key=(0,), num_samples=2)


def _with_biases() -> Base:
    """A Llama with a bias in every linear layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = CONFIGS["llama"] | {"attention_bias": True, "mlp_bias": True, "vocab_size": 320}
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return prepare(model, tokenizer(), None, CPU)


@pytest.mark.parametrize("text", ["a", "why?"])
def test_a_prompt_read_alone_has_the_responses_it_has_beside_others_even_if_it_is_one_token(text: str) -> None:
    made = models(("policy",))
    scatter(made, 0.2)
    sampler = NativeSampler(made, Renderer(tokenizer(), template="plain", max_length=200))
    alone, beside = (
        sampler.generate([Prompt(each) for each in prompts], sampling=Sampling(8), key=(0,), num_samples=2)[:2]
        for prompts in ([text], [text, "lamp"])
    )
    assert len(alone[0].prompt_ids) == 1 or text != "a"
    assert [each.response_ids for each in alone] == [each.response_ids for each in beside]


def test_the_families_that_have_lean_layers() -> None:
    found = {family: _layers(prepared(family)) for family in CONFIGS}
    assert {family for family, number in found.items() if number} == LEAN
    assert all(number in (0, 2) for number in found.values())


@pytest.mark.parametrize(
    "made",
    [
        *(pytest.param(lambda f=family: Models(prepared(f), ("policy",)), id=family) for family in sorted(LEAN)),
        pytest.param(lambda: Models(_with_biases(), ("policy",)), id="biases"),
        pytest.param(
            lambda: Models(prepared("llama"), ("policy", "reference"), adapter=AdapterSection(rank=2)), id="adapter"
        ),
    ],
)
def test_lean_layers_draw_what_the_familys_own_do(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = made()
    if "reference" in models.roles:
        scatter(models, 0.3)
    called: list[int] = []
    own = next(m for name, m in models.causal.named_modules() if name.endswith("layers.1.mlp"))
    own.register_forward_hook(lambda _, given, __: called.append(given[0].shape[-2]))
    ours = {role: _sampled(models, role) for role in models.roles}
    assert called and 1 not in called  # prompts alone went through the family's code
    monkeypatch.setattr(module, "is_lean", lambda *_: False)
    for role, rollouts in ours.items():
        for one, other in zip(rollouts, _sampled(models, role), strict=True):
            assert one.response_ids == other.response_ids
            assert one.behaviour_logprobs == pytest.approx(other.behaviour_logprobs, abs=2e-5)
    assert called.count(1) == 15 * len(ours)


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(lambda: prepared("llama", torch.float64), id="fp64"),
        pytest.param(lambda: prepared("llama", torch.bfloat16), id="bf16"),
    ],
)
def test_in_other_types_no_layer_is_lean(base: Any) -> None:
    assert _layers(base()) == 0


def test_a_layer_with_another_forward_or_dora_is_not_lean() -> None:
    base = prepared("llama")
    with lean(base.model):
        assert all("forward" in vars(layer) for layer in base.model.model.layers)
        assert _layers(base) == 0
    assert _layers(base) == 2
    Models(base, ("policy",), adapter=AdapterSection(rank=2, method="dora"))
    assert _layers(base) == 0
