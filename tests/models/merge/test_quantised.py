"""Merging from a quantised base: the weights bitsandbytes computes with, plus the adapter; or the original ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fairlead.errors import ConfigError
from fairlead.models.merge import merge
from tests.models.merge.made import answers, merged_by_peft, plain, save_adapter, save_base, with_adapter

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")

NF4: dict[str, Any] = {"bits": 4, "type": "nf4", "double": True}
FP4: dict[str, Any] = {"bits": 4, "type": "fp4", "double": False}
INT8: dict[str, Any] = {"bits": 8}


def a_run(folder: Path, adapter: Path, quantize: dict[str, Any], dtype: str = "auto") -> Path:
    """A run directory around an adapter that was trained on a quantised base."""
    shutil.copytree(adapter, folder / "model")
    recipe = {"algorithm": "sft", "model": {"adapter": {"rank": 4}, "quantize": quantize, "dtype": dtype}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return folder


def through_4_bits(weight: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    packed, state = functional.quantize_4bit(
        weight, quant_type=settings["type"], compress_statistics=settings["double"]
    )
    return functional.dequantize_4bit(packed, state)


def through_8_bits(weight: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
    """Each row in steps of its largest magnitude / 127, from fp16 (Dettmers et al. 2022)."""
    half = weight.half().float()
    scale = half.abs().amax(1, keepdim=True) / 127
    return (half / scale).round() * scale


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("settings", "through", "exact", "step"),
    [(NF4, through_4_bits, 1e-6, 1e-6), (FP4, through_4_bits, 1e-6, 1e-6), (INT8, through_8_bits, 2e-5, 1e-3)],
    ids=["nf4", "fp4", "8bit"],
)
def test_the_weights_are_those_that_the_layers_computed_with_plus_the_adapter(
    tmp_path: Path,
    architecture: str,
    settings: dict[str, Any],
    through: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor],
    exact: float,
    step: float,
) -> None:
    base = save_base(tmp_path / "base", architecture)
    adapter = save_adapter(base, tmp_path / "adapter")
    result = merge(a_run(tmp_path / "run", adapter, settings), tmp_path / "out")
    merged, original = plain(tmp_path / "out").state_dict(), plain(base).state_dict()
    added = {name: tensor - original[name] for name, tensor in merged_by_peft(base, adapter).items()}
    is_linear = {name for name, delta in added.items() if float(delta.abs().max()) > 0}
    assert len(is_linear) == (14 if architecture == "llama" else 8)
    for name, tensor in original.items():
        if name in is_linear:  # GPT-2's lie as [in, out], and bitsandbytes holds [out, in]
            turned = tensor.T.contiguous() if architecture == "gpt2" else tensor
            seen = through(turned, settings)
            tensor = (seen.T if architecture == "gpt2" else seen) + added[name]
        off = (merged[name] - tensor).abs()  # of 8 bits, a number between two steps may go to either
        assert float(off.max()) <= step, name
        assert float((off > exact).float().mean()) < 1e-3, name
    check = result["verification"]
    assert check["largest"] <= 1e-4 < check["against_original"]["largest"]
    assert (check["against"], result["into"], result["quantised"]["bits"]) == (
        "quantised",
        "quantised",
        settings["bits"],
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_merged_model_answers_as_the_adapter_on_the_quantised_base_itself(
    tmp_path: Path, architecture: str
) -> None:
    from transformers import BitsAndBytesConfig

    base = save_base(tmp_path / "base", architecture)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(a_run(tmp_path / "run", adapter, NF4), tmp_path / "out")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = plain(base, quantization_config=config)
    for module in quantised.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # which would compute in bf16
    trained_on = answers(with_adapter(quantised, adapter))
    gap = (answers(plain(tmp_path / "out")) - trained_on).abs().max()
    assert float(gap) <= 2e-2
    assert float((answers(with_adapter(base, adapter)) - trained_on).abs().max()) > 10 * float(gap)


def test_into_the_original_weights_if_asked_with_the_quantisations_error_stated(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    run = a_run(tmp_path / "run", adapter, NF4)
    result = merge(run, tmp_path / "out", into="original")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged_by_peft(base, adapter).items():
        torch.testing.assert_close(stored[name], tensor, atol=1e-6, rtol=1e-5)
    check = result["verification"]
    other = merge(run, tmp_path / "other")["verification"]
    assert check["largest"] <= 1e-4
    assert check["against_quantised"]["largest"] == pytest.approx(other["against_original"]["largest"], rel=0.01)
    with pytest.raises(ConfigError, match="--into half is not known"):
        merge(run, tmp_path / "third", into="half")


def test_an_adapter_without_its_run_says_itself_how_its_base_was_quantised(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    assert merge(adapter, tmp_path / "plain")["quantised"] is None
    (adapter / "fairlead.json").write_text(json.dumps({"base": {"quantize": NF4}}))
    merge(adapter, tmp_path / "out")
    merge(a_run(tmp_path / "run", adapter, NF4), tmp_path / "same")
    stored, same = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert all(torch.equal(stored[name], same[name]) for name in same)


def test_a_base_that_is_stored_quantised_is_dequantised(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    original = save_base(tmp_path / "original")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = tmp_path / "base"
    shutil.copytree(original, base, ignore=shutil.ignore_patterns("model*", "config.json"))
    plain(original, quantization_config=config, dtype=torch.float32).save_pretrained(base)
    adapter = save_adapter(original, tmp_path / "adapter")
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(original), str(base)))
    result = merge(adapter, tmp_path / "out")
    merge(a_run(tmp_path / "run", save_adapter(original, tmp_path / "same"), NF4), tmp_path / "wanted")
    stored, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(stored[name], tensor, atol=1e-6, rtol=0)
    assert result["quantised"]["bnb_4bit_quant_type"] == "nf4"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(ConfigError, match="is stored quantised: there are no original weights"):
        merge(adapter, tmp_path / "other", into="original")


def test_a_reward_on_a_quantised_base_keeps_its_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", task="SEQ_CLS")
    result = merge(a_run(tmp_path / "run", adapter, NF4), tmp_path / "out")
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["score.weight"], head)
    assert (result["verification"]["quantity"], result["verification"]["largest"] <= 1e-4) == ("scores", True)


def test_weights_that_were_rounded_to_bfloat16_before_they_were_quantised_are_merged_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(a_run(tmp_path / "run", adapter, NF4, dtype="bfloat16"), tmp_path / "out", dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    original = plain(base).state_dict()
    added = merged_by_peft(base, adapter)[name] - original[name]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(
        stored[name], through_4_bits(original[name].bfloat16(), NF4).float() + added, atol=1e-6, rtol=1e-5
    )
    embedding = "model.embed_tokens.weight"
    assert torch.equal(stored[embedding], original[embedding].bfloat16().float())
