"""Activations kept for the backward pass in the CPU's memory instead of the GPU's. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes; what is smaller stays where it is."""


def offloaded(parameters: Iterable[Tensor], smallest: int = SMALLEST) -> torch.autograd.graph.saved_tensors_hooks:
    """A context for the forward pass. As torch's `save_on_cpu`, but weights, which are saved too, are not copied."""
    weights = {_local(parameter).untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        device = tensor.device
        if tensor.nbytes < smallest or tensor.untyped_storage().data_ptr() in weights:
            return device, tensor
        kept = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
        return device, kept.copy_(tensor)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, kept = packed
        return kept.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _local(parameter: Any) -> Tensor:
    """Of a sharded weight, which itself lies nowhere, this rank's part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
