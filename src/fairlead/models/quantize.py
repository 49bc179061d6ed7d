"""A frozen base in 8 or 4 bits, by bitsandbytes: what transformers is asked for, what is refused, and what training
adapters on it needs. Knows no adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairlead.config import QuantizeSection
from fairlead.errors import ConfigError, ModelError
from fairlead.models.precision import fast_at_bf16

CLASSES = ("Linear8bitLt", "Linear4bit")


def bits_and_bytes(section: QuantizeSection, device: torch.device) -> Any:
    """transformers' settings. Output heads stay as they are, of which log-probabilities are made.

    Raises ConfigError where bitsandbytes is missing, and ModelError where it cannot do this on the device.
    """
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise ConfigError(
            f"model.quantize={section.bits}bit needs bitsandbytes, which is not installed: {error}",
            hint="pip install 'fairlead[quant]'",
        ) from error
    _try(section, device)
    if section.bits == 8:  # it says at every product that it casts to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.type,
        bnb_4bit_use_double_quant=section.double,
        bnb_4bit_compute_dtype=compute_dtype(section, device),
    )


def compute_dtype(section: QuantizeSection, device: torch.device) -> torch.dtype:
    if section.compute_dtype != "auto":
        return getattr(torch, section.compute_dtype)
    return torch.bfloat16 if fast_at_bf16(device) else torch.float32


def stored(config: Any) -> Mapping[str, Any] | None:
    """How the weights of a checkpoint are quantised on disk, by its configuration; none where they are not."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else found.to_dict()


def refuse_stored(origin: str, found: Mapping[str, Any], section: QuantizeSection | None) -> None:
    """Raises ModelError for a checkpoint that is quantised in another way than ``section`` says."""
    method = str(found.get("quant_method", "unknown"))
    bits = 8 if found.get("load_in_8bit") else 4
    if method != "bitsandbytes":
        raise ModelError(
            f"{origin} is quantised already, by {method}, which is not supported",
            hint="give the unquantised model, and model.quantize=4bit or 8bit",
        )
    same = section is not None and section.bits == bits
    if same and section is not None and bits == 4:
        same = section.type == found["bnb_4bit_quant_type"] and section.double == found["bnb_4bit_use_double_quant"]
    if not same:
        form = "" if bits == 8 else f" model.quantize.type={found['bnb_4bit_quant_type']}"
        form += "" if bits == 8 else f" model.quantize.double={str(found['bnb_4bit_use_double_quant']).lower()}"
        raise ModelError(
            f"{origin} is stored in {bits} bits, "
            + ("and model.quantize is not given" if section is None else "in another form than model.quantize asks"),
            hint=f"model.adapter=lora model.quantize.bits={bits}{form}, or give the unquantised model",
        )


def is_quantised(model: Any) -> bool:
    return any(type(module).__name__ in CLASSES for module in model.modules())


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Set the type in which 4-bit layers multiply."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype, module.compute_type_is_set = dtype, True


def prepare_quantised(model: Any) -> None:
    """Freeze the base and have its norms compute in fp32.

    As peft's `prepare_model_for_kbit_training`, but embeddings and heads stay in their type, which is that of the
    stream of hidden states, and checkpointing is not switched on. Under non-reentrant checkpointing no input need
    require gradients. bitsandbytes repacks 4-bit weights on some CPUs at the first call without gradients, after which
    no gradient passes through them: that is switched off.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
        elif "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False)):
            _in_fp32(module, model.dtype)


def _in_fp32(module: nn.Module, stream: torch.dtype) -> None:
    if torch.promote_types(stream, torch.float32) == stream:
        return
    module.float()
    module.register_forward_pre_hook(lambda _, given: tuple(t.float() if isinstance(t, Tensor) else t for t in given))
    back: Callable[..., Any] = lambda _, __, result: result.to(stream)  # noqa: E731
    module.register_forward_hook(back)


def _try(section: QuantizeSection, device: torch.device) -> None:
    """One layer forward and backward: bitsandbytes names what it lacks only when it is used."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    given: dict[str, Any] = {"bias": False}
    if section.bits == 8:
        layer: Any = Linear8bitLt(64, 64, has_fp16_weights=False, **given)
    else:
        kind = compute_dtype(section, device)
        layer = Linear4bit(64, 64, compute_dtype=kind, compress_statistics=section.double,
                                  quant_type=section.type, **given)  # fmt: skip
    try:
        x = torch.ones(2, 64, device=device, requires_grad=True)
        layer.requires_grad_(False).to(device)(x).sum().backward()
    # What a missing kernel, library or operator raises differs by device and by version of bitsandbytes.
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError, TypeError) as error:
        raise ModelError(
            f"bitsandbytes cannot compute in {section.bits} bits on {device}: {str(error).splitlines()[0]}",
            hint="leave model.quantize out, or use another device",
        ) from error
