"""LoRA adapters on one base, one for each trained role, through peft. Decides what peft may not: what is trainable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fairlead.config import AdapterSection
from fairlead.errors import ModelError


def add_adapters(model: Any, section: AdapterSection, names: Sequence[str]) -> Any:
    """The model with an adapter for each name, all starting at zero effect. Raises ModelError when a target matches
    no linear layer, listing the names there are."""
    from peft import LoraConfig, get_peft_model

    wanted = targets(model, section)
    transposed = any(
        type(module).__name__ == "Conv1D" for name, module in model.named_modules() if name.rpartition(".")[2] in wanted
    )
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]  # peft divides by it, a fraction is fine
        lora_dropout=section.dropout,
        target_modules=wanted,
        fan_in_fan_out=transposed,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return wrapped


def targets(model: Any, section: AdapterSection) -> list[str]:
    """Last parts of the names of the linear layers to adapt; the output head is never one of them."""
    head = model.get_output_embeddings()
    linears = {
        name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module) and module is not head
    }
    if section.targets == "all-linear":
        return sorted(linears)
    missing = [name for name in section.targets if name not in linears]
    if missing:
        raise ModelError(
            f"model.adapter.targets: no layer is named {', '.join(missing)}",
            hint=f"linear layers of this model: {', '.join(sorted(linears))}",
        )
    return list(section.targets)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear8bitLt", "Linear4bit")


def activate(model: Any, name: str | None) -> None:
    """Make one adapter active, or none; gradients are the caller's affair, since peft changes requires_grad here."""
    tuner = model.base_model
    if name is None:
        tuner.disable_adapter_layers()
    else:
        tuner.enable_adapter_layers()
        tuner.set_adapter(name)
