"""Writes a trained role as plain transformers or peft would: nothing of ours is needed to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fairlead.errors import ModelError
from fairlead.models.attention import NAME
from fairlead.models.load import META
from fairlead.models.roles import Models


def save_model(models: Models, folder: Path, *, template: str, eos: int | None = None) -> None:
    """The policy as a causal language model (an adapter as peft saves it), the reward as a sequence classifier with its
    head, the value head beside the policy. ``folder`` is written as a whole by the caller's rename. ``eos`` ends a
    response, where it is not the tokenizer's end of sequence: generation stops at either."""
    folder.mkdir(parents=True)
    causal = models.causal
    role = "reward" if "reward" in models.roles else "policy"
    if role == "reward":
        _classifier(models).save_pretrained(folder)
    elif models.is_peft:
        models.network.save_pretrained(folder, selected_adapters=["policy"])
        _lift(folder / "policy", folder)
    else:
        _plain_config(causal.config)
        causal.save_pretrained(folder)
        causal.config._attn_implementation = NAME if models.forest else causal.config._attn_implementation
    if "value" in models.heads:
        from safetensors.torch import save_file

        save_file(
            {k: v.contiguous() for k, v in models.heads["value"].state_dict().items()},
            folder / "value_head.safetensors",
        )
    models.tokenizer.save_pretrained(folder)
    if role == "policy" and causal.generation_config is not None:
        ends = [models.tokenizer.eos_token_id] if eos is None else [eos, models.tokenizer.eos_token_id]
        causal.generation_config.eos_token_id = ends[0] if len(set(ends)) == 1 else ends
        causal.generation_config.save_pretrained(folder)
    (folder / META).write_text(json.dumps({"template": template, "role": role}, indent=1) + "\n", "utf-8")


def _lift(inner: Path, folder: Path) -> None:
    """peft saves an adapter in a folder of its name; move it where a plain load looks."""
    if inner.is_dir():
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()


def _plain_config(config: Any) -> None:
    """What others read must not name our attention."""
    config._attn_implementation = "sdpa"
    config.use_cache = True


def _classifier(models: Models) -> Any:
    """A transformers sequence classifier of one label that gives the scores of the reward role."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    causal = models.causal
    if models.is_peft:
        import copy

        causal = copy.deepcopy(models.network).merge_and_unload(adapter_names=["reward"])
    settings = causal.config.to_dict() | {
        "num_labels": 1,
        "id2label": {0: "reward"},
        "label2id": {"reward": 0},
        "use_cache": True,
    }
    settings["pad_token_id"] = models.tokenizer.pad_token_id
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(model_type, **settings)
    try:
        classifier = AutoModelForSequenceClassification.from_config(config).to(causal.dtype)
    except ValueError as error:
        raise ModelError(f"transformers has no sequence classifier for {model_type}: {error}") from error
    classifier.base_model.load_state_dict(causal.base_model.state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(models.heads["reward"].get_parameter("linear.weight"))
    return classifier
