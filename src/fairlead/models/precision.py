"""In which types weights lie and layers multiply: what a recipe asks, and what its device can. Loads nothing."""

from __future__ import annotations

from typing import cast

import torch

from fairlead.config import ModelSection
from fairlead.errors import ModelError


def dtype_of(section: ModelSection, device: torch.device) -> torch.dtype:
    """Type of the weights as they are loaded.

    `auto` keeps trained weights in fp32; a frozen base under an adapter is bf16 where the device is fast at it. Weights
    that are trained are never fp16: their updates would be lost in it. Raises ModelError for a type the device lacks.
    """
    if section.dtype == "auto":
        return torch.bfloat16 if section.adapter is not None and fast_at_bf16(device) else torch.float32
    asked = cast(torch.dtype, getattr(torch, section.dtype))
    _try(asked, device)
    return torch.float32 if asked == torch.float16 and section.adapter is None else asked


def autocast_of(section: ModelSection, device: torch.device) -> torch.dtype | None:
    """Type in which layers multiply, where it is not that of the weights trained. bf16 weights that are trained are
    computed with as they are."""
    if section.dtype == "float16":
        return torch.float16
    if section.dtype == "auto":
        return torch.bfloat16 if fast_at_bf16(device) else None
    return torch.bfloat16 if section.dtype == "bfloat16" and section.adapter is not None else None


def fast_at_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def training_notes(section: ModelSection, dtype: torch.dtype) -> tuple[str, ...]:
    """What a person should know of training weights of this type."""
    if section.adapter is not None or dtype not in (torch.bfloat16, torch.float16):
        return ()
    return (
        f"all weights are trained in {str(dtype).removeprefix('torch.')}: updates smaller than "
        f"1/{round(2 / torch.finfo(dtype).eps)} of a weight are "
        "lost to rounding; model.dtype=auto keeps weights and optimizer states in float32",
    )


def _try(dtype: torch.dtype, device: torch.device) -> None:
    """A product, a norm and their gradients: what every model does."""
    try:
        x = torch.ones(16, 16, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.layer_norm(x @ x, (16,)).sum().backward()
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ModelError(
            f"model.dtype={str(dtype).removeprefix('torch.')}: the device {device} cannot compute in it "
            f"({str(error).splitlines()[0]})",
            hint="model.dtype=auto",
        ) from error
