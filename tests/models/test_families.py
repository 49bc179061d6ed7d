"""For a tiny random model of each family: our rows give what plain transformers gives for each sequence by itself, the
sampler draws from what the trainer scores, adapters load in plain peft. Gradients: test_gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairlead.config import AdapterSection, ModelSection
from fairlead.data.pack import by_response, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.models.attention import FAMILIES
from fairlead.models.export import save_model
from fairlead.models.load import load_base
from fairlead.models.roles import Models
from fairlead.rollout.native import NativeSampler
from fairlead.types import Prompt, Sampling
from tests.families import CONFIGS, plain, prepared
from tests.tiny import CPU, TREES, scatter, separate, tokenizer

LOGPROBS = frozenset({"logprobs"})


def _ours(made: Models, trees: list[Tree], temperature: float = 1.0) -> list[Tensor]:
    """Log-probabilities of each response, prompts shared and rows packed where the family takes them so."""
    batch = token_batch(trees, packed=made.forest, pad_id=0)
    with torch.no_grad(), made.use("policy"):
        return by_response(made(batch, LOGPROBS, temperature).logprobs, batch)


def _plain(model: Any, tree: Tree) -> Tensor:
    ids = torch.tensor([[*tree.prompt, *tree.responses[0]]])
    with torch.no_grad():
        logprobs = model(ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)[0, :-1]
    return logprobs.gather(1, ids[0, 1:, None])[:, 0][max(len(tree.prompt) - 1, 0) :]


def test_every_family_of_the_table_is_tested() -> None:
    assert set(CONFIGS) > FAMILIES


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("kernel", ["auto", "none"])
def test_logprobs_are_those_of_plain_transformers_on_each_sequence(family: str, kernel: str) -> None:
    """In fp64, where the plain families' own rounding to fp32 is the difference that is left."""
    made = Models(prepared(family, torch.float64, kernel=kernel), ("policy",))
    model = plain(family, torch.float64)
    for tree, got in zip(separate(TREES), _ours(made, TREES), strict=True):
        torch.testing.assert_close(got, _plain(model, tree), atol=2e-5 if kernel == "auto" else 1e-6, rtol=0)


def test_a_family_that_takes_no_forest_falls_back_to_padded_rows_and_says_so() -> None:
    """GPT-Neo counts the window of its local layers by place in the row, not by position."""
    base = prepared("gpt_neo")
    assert not base.forest
    assert any("gpt_neo" in note and "rows are padded" in note for note in base.notes)
    assert not any("padded" in note for note in prepared("llama").notes)


@pytest.mark.parametrize("family", ["cohere", "gemma2", "gemma3_text", "granite", "gpt_neo", "mistral", "opt"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_the_trainers_where_logits_are_capped_or_scaled(
    family: str, temperature: float
) -> None:
    made = Models(prepared(family, torch.float64), ("policy",))
    sampler = NativeSampler(made, Renderer(tokenizer(), template="question-answer", max_length=200))
    prompts = [Prompt(text) for text in ("why?", "Question: why does the lamp flicker?", "a")]
    rollouts = sampler.generate(prompts, sampling=Sampling(12, temperature=temperature), key=(0,))
    trees = [Tree(rollout.prompt_ids, (rollout.response_ids,)) for rollout in rollouts]
    for rollout, wanted in zip(rollouts, _ours(made, trees, temperature), strict=True):
        got = torch.tensor(rollout.behaviour_logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_trained_adapter_loads_in_plain_peft_with_the_same_logprobs(family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain(family).save_pretrained(tmp_path / "base")
    section = ModelSection(path=str(tmp_path / "base"), adapter=AdapterSection(rank=2))
    made = Models(load_base(section, tokenizer(), None, seed=0, device=CPU), ("policy",), adapter=section.adapter)
    scatter(made, 0.05)
    save_model(made, tmp_path / "run", template="plain")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")
    model = plain(family)
    changed = 0.0
    for tree, got in zip(separate(TREES), _ours(made, TREES), strict=True):
        torch.testing.assert_close(got, _plain(loaded, tree), atol=2e-5, rtol=1e-5)
        changed = max(changed, float((got - _plain(model, tree)).abs().max()))
    assert changed > 0.01
