"""Writes a trained role as plain transformers or peft would: nothing of ours is needed to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.errors import ModelError
from fairlead.models.adapters import save_adapter
from fairlead.models.attention import NAME
from fairlead.models.heads import labels_of
from fairlead.models.identity import weights_sha256
from fairlead.models.load import META
from fairlead.models.roles import Models


def save_model(models: Models, folder: Path, *, template: str, eos: int | None = None) -> None:
    """The trained role: all its weights as a causal language model, or as a sequence classifier with its heads; or its
    adapter as peft saves it, a reward's with its heads. What a value has of its own stands beside. ``folder`` is
    written as a whole by the caller's rename. ``eos`` ends a response, where it is not the tokenizer's end of sequence:
    generation stops at either."""
    folder.mkdir(parents=True)
    causal, role = models.causal, models.main
    score = models.heads["reward"].get_parameter("linear.weight") if role == "reward" else None
    if models.is_peft:
        save_adapter(models.network, role, folder, score=score)
    elif score is not None:
        _classifier(models, score).save_pretrained(folder)
    else:
        _plain_config(causal.config)
        causal.save_pretrained(folder)
        causal.config._attn_implementation = NAME if models.forest else causal.config._attn_implementation
    if "value" in models.heads:
        _save_value(models, folder)
    models.tokenizer.save_pretrained(folder)
    if role == "policy" and causal.generation_config is not None:
        ends = [models.tokenizer.eos_token_id] if eos is None else [eos, models.tokenizer.eos_token_id]
        causal.generation_config.eos_token_id = ends[0] if len(set(ends)) == 1 else ends
        causal.generation_config.save_pretrained(folder)
    meta: dict[str, Any] = {"template": template, "role": role}
    if role == "reward" and models.reward_heads is not None:
        meta["heads"] = models.reward_heads.as_dict()
    if models.is_peft:
        meta["base"] = {
            "path": models.origin or causal.name_or_path or None,
            "sha256": models.origin and weights_sha256(models.origin),
            "quantize": models.quantize and models.quantize.model_dump(),
        }
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n", "utf-8")


def _save_value(models: Models, folder: Path) -> None:
    """The value's head, and in ``value/`` the adapter or the layers it has of its own."""
    from safetensors.torch import save_file

    weights = {k: v.contiguous() for k, v in models.heads["value"].state_dict().items()}
    save_file(weights, folder / "value_head.safetensors")
    owner = next((n for n in (models.network, models.value) if "value" in getattr(n, "peft_config", ())), None)
    if owner is not None:
        save_adapter(owner, "value", folder / "value")
    elif models.value is not None:
        (folder / "value").mkdir()
        trained = {n: p for n, p in models.named_parameters() if n in models.trainable}
        own = {n.removeprefix("value."): p for n, p in trained.items() if n.startswith("value.")}
        save_file({n: p.detach().contiguous() for n, p in own.items()}, folder / "value" / "layers.safetensors")


def _plain_config(config: Any) -> None:
    """What others read must not name our attention."""
    config._attn_implementation = "sdpa"
    config.use_cache = True


def _classifier(models: Models, score: Tensor) -> Any:
    """A transformers sequence classifier whose labels are the heads of the reward role."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    causal = models.causal
    settings = causal.config.to_dict() | labels_of(models.reward_heads) | {"use_cache": True}
    settings["pad_token_id"] = models.tokenizer.pad_token_id
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(model_type, **settings)
    try:
        classifier = AutoModelForSequenceClassification.from_config(config).to(causal.dtype)
    except ValueError as error:
        raise ModelError(f"transformers has no sequence classifier for {model_type}: {error}") from error
    classifier.base_model.load_state_dict(causal.base_model.state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(score)
    return classifier
