"""Merged weights are those of peft's own merging, load in plain transformers, and answer as the adapter did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fairlead.models.merge import merge
from tests.models.merge.made import EMBEDDING, answers, merged_by_peft, plain, save_adapter, save_base, with_adapter


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_merged_policy_answers_in_plain_transformers_as_its_adapter_in_plain_peft(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    base = save_base(tmp_path / "base", architecture, tie_embeddings=tied)
    adapter = save_adapter(base, tmp_path / "adapter")
    result = merge(adapter, tmp_path / "out")
    loaded, wanted = plain(tmp_path / "out"), answers(with_adapter(base, adapter))
    torch.testing.assert_close(answers(loaded), wanted, atol=1e-5, rtol=0)
    assert float((answers(plain(base)) - wanted).abs().max()) > 0.05
    assert loaded.config.tie_word_embeddings == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    assert 0 <= result["verification"]["mean"] <= result["verification"]["largest"] <= 1e-4
    assert (result["verification"]["bound"], result["verification"]["quantity"]) == (1e-4, "log-probabilities")
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == result


FORMS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"alpha_pattern": {"layers.0.mlp.up_proj": 3, "h.1.attn.c_attn": 5}, "rank_pattern": {"c_fc": 2}},
    "embedding": {"target_modules": ["EMBEDDING"]},
    "dora on the embedding": {"target_modules": ["EMBEDDING"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding in full": {"modules_to_save": ["EMBEDDING"]},
    "embedding and head in full": {"modules_to_save": ["EMBEDDING", "lm_head"]},
    "both in full, tied": {"modules_to_save": ["EMBEDDING"], "ensure_weight_tying": True},
    "norms in full": {"modules_to_save": ["norm", "ln_f"]},
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adapter_gives_the_tensors_of_pefts_own_merging(
    tmp_path: Path, architecture: str, form: str, tied: bool
) -> None:
    base = save_base(tmp_path / "base", architecture, tie_embeddings=tied)
    settings = json.loads(json.dumps(FORMS[form]).replace("EMBEDDING", EMBEDDING[architecture]))
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    merge(adapter, tmp_path / "out")
    loaded = plain(tmp_path / "out")
    if not tied:  # peft adds to the one tensor that both names have
        for name, tensor in merged_by_peft(base, adapter).items():
            torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(answers(loaded), answers(with_adapter(base, adapter)), atol=3e-5, rtol=0)
    # what was one tensor is two only where the adapter tells them apart
    same = torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)
    assert loaded.config.tie_word_embeddings == same


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_merged_reward_is_a_sequence_classifier_with_its_head(tmp_path: Path, architecture: str) -> None:
    base = save_base(tmp_path / "base", architecture)
    adapter = save_adapter(base, tmp_path / "adapter", task="SEQ_CLS")
    result = merge(adapter, tmp_path / "out")
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    wanted = answers(with_adapter(base, adapter, scores=True), scores=True)
    torch.testing.assert_close(answers(loaded, scores=True), wanted, atol=1e-6, rtol=1e-5)
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(loaded.get_parameter("score.weight"), head)
    assert (loaded.config.num_labels, loaded.config.id2label, loaded.config.pad_token_id) == (1, {0: "reward"}, 0)
    assert result["verification"]["quantity"] == "scores"


def test_a_chain_of_adapters_is_merged_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    first = save_adapter(base, tmp_path / "runs" / "sft" / "model", seed=1, use_dora=True)
    middle: Any = with_adapter(base, first).merge_and_unload()
    middle.save_pretrained(tmp_path / "middle")
    second = save_adapter(tmp_path / "middle", tmp_path / "second", seed=2)
    settings = second / "adapter_config.json"
    named = settings.read_text().replace(str(tmp_path / "middle"), str(tmp_path / "runs" / "sft"))
    settings.write_text(named)
    result = merge(second, tmp_path / "out")
    wanted = answers(with_adapter(middle, second))
    torch.testing.assert_close(answers(plain(tmp_path / "out")), wanted, atol=1e-5, rtol=0)
    assert [Path(found["path"]) for found in result["adapters"]] == [first, second]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weights_are_rounded_once_at_the_end(tmp_path: Path, dtype: str) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    result = merge(adapter, tmp_path / "out", dtype=dtype)
    kind = getattr(torch, dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {kind}
    for name, tensor in merged_by_peft(base, adapter).items():
        wanted = tensor.to(kind)
        off = (stored[name].float() - wanted.float()).abs() > 0
        assert float(off.float().mean()) < 0.01, name  # a sum that lay beside a tie, rounded the other way
        torch.testing.assert_close(stored[name], wanted, atol=0, rtol=torch.finfo(kind).eps)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    gap = (answers(plain(tmp_path / "out", dtype=torch.float32)) - answers(with_adapter(base, adapter))).abs().max()
    assert 0 < float(gap) <= result["verification"]["bound"]


def test_a_base_in_bfloat16_stays_so_unless_told_otherwise(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    assert merge(adapter, tmp_path / "out")["dtype"] == "bfloat16"
    merge(adapter, tmp_path / "wide", dtype="float32")
    wanted = answers(with_adapter(plain(base, dtype=torch.float32), adapter))
    torch.testing.assert_close(answers(plain(tmp_path / "wide")), wanted, atol=1e-5, rtol=0)


def test_the_result_is_written_in_files_of_the_size_asked_for(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "out", shard_size=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 110_000 for path in files)
    torch.testing.assert_close(
        answers(plain(tmp_path / "out")), answers(with_adapter(base, adapter)), atol=1e-5, rtol=0
    )


def test_a_base_as_gpt2_is_published_is_read_too(tmp_path: Path) -> None:
    """One .bin file, names without the trunk's prefix, and buffers that today's model has not."""
    base = save_base(tmp_path / "base", "gpt2", tie_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter")
    wanted = answers(with_adapter(base, adapter))
    state = plain(base).state_dict()
    del state["lm_head.weight"]
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    for path in base.glob("model*"):
        path.unlink()
    torch.save(old, base / "pytorch_model.bin")
    merge(adapter, tmp_path / "out")
    torch.testing.assert_close(answers(plain(tmp_path / "out")), wanted, atol=1e-5, rtol=0)
    assert "h.0.attn.bias" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_embeddings_that_grew_for_added_tokens_are_taken_over(tmp_path: Path, tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    base = save_base(tmp_path / "base", tie_embeddings=tied)
    model = plain(base)
    model.resize_token_embeddings(330, mean_resizing=False)
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter += 0.05 * torch.randn(parameter.shape) if "lora_" in name or "embed" in name else 0
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path / "adapter", tmp_path / "out")
    loaded = plain(tmp_path / "out")
    torch.testing.assert_close(answers(loaded), answers(wrapped), atol=1e-5, rtol=0)
    assert loaded.config.vocab_size == loaded.get_input_embeddings().weight.shape[0] == 330
    assert loaded.config.tie_word_embeddings == tied


def test_what_a_later_stage_must_know_stands_beside_the_weights(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    (adapter / "fairlead.json").write_text('{"template": "hh", "role": "policy", "base": {"path": "x"}}')
    (adapter / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    save_file({"linear.weight": torch.ones(1, 64)}, adapter / "value_head.safetensors")
    merge(adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "fairlead.json").read_text()) == {"template": "hh", "role": "policy"}
    assert plain(tmp_path / "out").generation_config.eos_token_id == [7, 1]
    assert torch.equal(load_file(tmp_path / "out" / "value_head.safetensors")["linear.weight"], torch.ones(1, 64))


def test_a_whole_model_is_written_in_the_dtype_asked_for(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    result = merge(base, tmp_path / "out", dtype="bfloat16")
    assert result["adapters"] == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in plain(base).state_dict().items():
        assert torch.equal(stored[name], tensor.bfloat16())


def test_a_reward_saved_whole_keeps_its_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    classifier = plain(base, scores=True)
    classifier.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "reward")
    merge(tmp_path / "reward", tmp_path / "out")
    got = answers(plain(tmp_path / "out", scores=True), scores=True)
    torch.testing.assert_close(got, answers(classifier, scores=True), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_products_are_computed_on_a_cuda_device(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", use_dora=True)
    result = merge(adapter, tmp_path / "out", device="cuda")
    assert result["device"] == "cuda"
    torch.testing.assert_close(
        answers(plain(tmp_path / "out")), answers(with_adapter(base, adapter)), atol=1e-4, rtol=0
    )
