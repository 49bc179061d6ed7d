"""Special tokens that a recipe adds: the tokenizer knows them, the embeddings grow, plain transformers loads both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fairlead.config import AdapterSection, ModelSection, ScratchSection
from fairlead.data.pack import token_batch
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, ModelError
from fairlead.models.export import save_model
from fairlead.models.load import add_tokens, load_base, prepare, tokenizer_for
from fairlead.models.roles import Models
from fairlead.types import Demonstration
from tests.tiny import CPU, base, tokenizer

TOKENS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base of as many embeddings as its tokenizer has tokens."""
    start = base()
    start.model.resize_token_embeddings(len(tokenizer()))
    start.model.config._attn_implementation = "sdpa"
    start.model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(folder: Path, seed: int = 0, **settings: Any) -> Any:
    section = ModelSection(path=str(folder), **settings)
    made, template = tokenizer_for(section, ())
    return load_base(section, made, template, seed=seed, device=CPU)


def test_a_model_with_added_tokens_is_trained_saved_and_loaded_in_plain_transformers(
    saved: Path, tmp_path: Path
) -> None:
    number = len(tokenizer())
    found = opened(saved, add_tokens=TOKENS)
    assert found.notes == (f"2 tokens added: the embeddings grow from {number} to {number + 2} rows",)
    made = Models(found, ("policy",))
    render = Renderer(found.tokenizer, template="chatml", max_length=64)
    batch = token_batch(render.trees([Demonstration("why?", "so")])[0], packed=True, pad_id=0)
    before = made.causal.get_input_embeddings().weight[-2:].detach().clone()
    with made.use("policy"):
        (-made(batch, frozenset({"logprobs"})).logprobs.sum()).backward()
    gradient = made.causal.get_input_embeddings().weight.grad
    assert gradient[-2:].abs().sum(1).min() > 0
    with torch.no_grad():
        made.causal.get_input_embeddings().weight -= 0.1 * gradient
    save_model(made, tmp_path / "model", template="chatml", eos=render.eos)

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    its: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config.vocab_size == loaded.get_input_embeddings().weight.shape[0] == len(its) == number + 2
    assert its.tokenize("<|im_start|>a<|im_end|>") == ["<|im_start|>", "a", "<|im_end|>"]
    assert its.convert_tokens_to_ids(list(TOKENS)) == [number, number + 1]
    assert loaded.generation_config.eos_token_id == [number + 1, its.eos_token_id]
    assert not torch.equal(loaded.get_input_embeddings().weight[-2:], before)
    # a later stage that names the tokens too changes nothing
    again = opened(tmp_path / "model", add_tokens=TOKENS)
    assert (again.notes, len(again.tokenizer)) == ((), number + 2)
    assert torch.equal(again.model.get_input_embeddings().weight, loaded.get_input_embeddings().weight)


def test_new_embeddings_begin_about_the_mean_and_depend_on_the_seed_alone(saved: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(saved)
    old = plain.get_input_embeddings().weight
    state = torch.random.get_rng_state()
    first, second = (opened(saved, seed=3, add_tokens=TOKENS).model.get_input_embeddings().weight for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, second)
    assert torch.equal(first[:-2], old)
    torch.testing.assert_close(first[-2:], old.mean(0).expand(2, -1), atol=1e-3, rtol=0)


def test_tokens_that_the_tokenizer_has_are_not_added_again(saved: Path) -> None:
    found = opened(saved, add_tokens=("<eos>", "<new>"))
    assert len(found.tokenizer) == len(tokenizer()) + 1


def test_a_model_from_scratch_is_built_with_the_added_tokens() -> None:
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    section = ModelSection(scratch=ScratchSection(**sizes), add_tokens=TOKENS)  # pyright: ignore[reportArgumentType]
    made, template = tokenizer_for(section, ["some text"] * 3)
    found = load_base(section, made, template, seed=0, device=CPU)
    assert found.tokenizer.tokenize("a<|im_end|>")[-1] == "<|im_end|>"
    assert found.model.get_input_embeddings().weight.shape[0] >= len(made)
    assert found.notes == ()


def test_adapters_with_new_tokens_are_refused_but_not_with_known_ones(saved: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"adapters leave the embeddings of new tokens untrained\nhint: add the tokens"
    ):
        opened(saved, add_tokens=TOKENS, adapter=AdapterSection())
    opened(saved, add_tokens=("<eos>",), adapter=AdapterSection())


def test_a_tokenizer_that_is_larger_for_another_reason_is_still_refused(saved: Path) -> None:
    start = base()
    start.model.resize_token_embeddings(len(tokenizer()))
    other = AutoTokenizer.from_pretrained(saved)
    add_tokens(other, ModelSection(path=str(saved), add_tokens=("<x>", "<y>")))
    with pytest.raises(ModelError, match="give the tokenizer that belongs to the model"):
        prepare(start.model, other, None, CPU, added=("<y>",))
