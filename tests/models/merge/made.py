"""Tiny bases and adapters of random weights, saved as transformers and peft save them, and what they answer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import base, tokenizer

TEXTS = ["why does the lamp flicker?", "Answer: the fuse is loose, or the bulb is old.", "7 * 6 = 42\n\nso it is"]
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}


def save_base(folder: Path, architecture: str = "llama", *, seed: int = 0, **options: Any) -> Path:
    """A base in several files of weights, with its tokenizer; wide enough for bitsandbytes."""
    dtype = options.pop("dtype", torch.float32)
    sizes = {"hidden_size": 64, "tie_embeddings": False} | options
    model = base(architecture, dtype, seed, **sizes).model
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def save_adapter(over: Path, folder: Path, *, task: str = "CAUSAL_LM", seed: int = 1, **settings: Any) -> Path:
    """A random adapter over a saved base, or over another adapter's merged base, that names it."""
    model = plain(over, scores=task == "SEQ_CLS")
    is_transposed = model.config.model_type == "gpt2"
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "fan_in_fan_out": is_transposed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(model, LoraConfig(task_type=task, **(given | settings)))
        scatter(wrapped, seed)
        wrapped.peft_config["default"].base_model_name_or_path = str(over)
        wrapped.save_pretrained(folder)
    return folder


def scatter(wrapped: Any, seed: int = 1) -> None:
    """Random adapters, magnitudes beside the norms, and modules trained in full."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            if "magnitude" in name:
                parameter *= 1 + noise
            elif "lora_" in name or "modules_to_save" in name:
                parameter += noise


def plain(folder: Path, *, scores: bool = False, **options: Any) -> Any:
    """As a user of transformers alone would load it."""
    if scores:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0, **options)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_adapter(over: Path | Any, adapter: Path, *, scores: bool = False) -> Any:
    """As a user of peft alone would load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = plain(over, scores=scores) if isinstance(over, Path) else over
        return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def answers(model: Any, *, scores: bool = False) -> Tensor:
    """Log-probabilities of the tokens of TEXTS, or their scores."""
    found: list[Tensor] = []
    for text in TEXTS:
        ids = tokenizer()(text, return_tensors="pt")["input_ids"].to(model.device)
        logits = model.eval()(ids).logits.float()
        if scores:
            found.append(logits[:, 0])
        else:
            found.append(logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found).cpu()


def merged_by_peft(over: Path, adapter: Path, *, scores: bool = False) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_adapter(over, adapter, scores=scores).merge_and_unload().state_dict()
