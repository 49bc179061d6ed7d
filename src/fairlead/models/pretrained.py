"""Weights as transformers reads them: safetensors or .bin, whole or in shards, of a folder or a hub id; in 8 or 4 bits
where asked. What a checkpoint lacks is refused and never made up, and code that lies beside it is never run. Knows no
roles and no tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from fairlead.config import QuantizeSection
from fairlead.errors import ModelError
from fairlead.models import quantize

NO_CODE = (
    "use a model of a family that transformers itself knows; what a repository's own code would do, nobody can say"
)
Kind = Literal["causal language model", "sequence classifier"]


def read_config(origin: str, kind: Kind = "causal language model") -> Any:
    """The configuration alone. Raises ModelError where there is none, or of an architecture that is not known."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(origin, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise no_model(origin, kind, error) from error


def read_model(
    origin: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    section: QuantizeSection | None = None,
    kind: Kind = "causal language model",
) -> Any:
    """The model on ``device``, each tensor moved there as it is read: no second copy of the weights is ever held.

    Args:
        dtype: of what is not quantised.
        section: quantise to 8 or 4 bits while reading; a checkpoint stored quantised must be of this very form.

    Raises:
        ModelError: for what is no such model, lacks weights, or cannot be quantised as asked.
        ConfigError: where bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    made: Any = AutoModelForCausalLM if kind == "causal language model" else AutoModelForSequenceClassification
    found = quantize.stored(read_config(origin, kind))
    if found is not None:
        quantize.refuse_stored(origin, found, section)
    settings = None if section is None else quantize.bits_and_bytes(section, device)
    options: dict[str, Any] = {} if settings is None or found is not None else {"quantization_config": settings}
    try:
        model, info = made.from_pretrained(
            origin,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # each kind of damage has a class of its own
        raise no_model(origin, kind, error) from error
    if missing := sorted(info["missing_keys"]):
        head = "its head, " if any(name.startswith(("score", "classifier", "lm_head")) for name in missing) else ""
        raise ModelError(
            f"{origin} lacks {head}{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: it is no {kind}",
            hint="give the run of a reward stage, or a sequence classifier saved with its head"
            if kind == "sequence classifier"
            else "give a model saved whole",
        )
    if section is not None and found is not None:
        quantize.compute_in(model, quantize.compute_dtype(section, device))
    elif section is not None and device.type == "cpu":
        _leave_file(model)
    return model


def _leave_file(model: Any) -> None:
    """Copy what was not quantised: while one tensor lies in the mapped checkpoint, all of it stays resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def brings_code(error: Exception) -> bool:
    """Whether transformers refused because it was not allowed to run the code that lies beside a model."""
    return "trust_remote_code" in str(error)


def no_model(origin: str, kind: Kind, error: Exception) -> ModelError:
    if brings_code(error):
        return ModelError(f"{origin} brings code of its own, which is not run", hint=NO_CODE)
    if "Weights only load failed" in str(error):
        hint = "use its safetensors, or save it anew where it is trusted"
        return ModelError(f"{origin} holds a pickle that is more than tensors, which is not opened", hint=hint)
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"{origin} cannot be loaded as a {kind}: {said}",
        hint="give a folder saved by transformers or peft, or a finished run"
        if Path(origin).exists()
        else f"there is no folder {origin} here, so it was taken for a hub id: check the path, and the network",
    )
