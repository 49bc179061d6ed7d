"""Whether merged weights answer as the adapter did: both compute a fixed list of texts in fp32, and the differences are
measured. Loads one model at a time, through plain transformers, bitsandbytes and peft."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.config import QuantizeSection
from fairlead.models.merge.deltas import Delta
from fairlead.models.quantize import bits_and_bytes

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""Largest |difference| allowed, by the dtype that is written. Both sides compute in fp32 (and a quantised base is
dequantised on both), so the difference is the rounding of the weights: 11 bits in fp16, 8 in bf16."""
LENGTH = 128
"""Tokens of a text at most."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two models over the same tokens (or texts, where they score)."""

    largest: float
    mean: float
    number: int

    def as_dict(self) -> dict[str, Any]:
        """Numbers that are not finite as null: JSON has none."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How bitsandbytes made the base that an adapter was trained on."""

    settings: Mapping[str, Any]
    section: QuantizeSection | None
    """None where the base is stored quantised: there are no original weights."""
    dtype: torch.dtype
    """Of the weights before."""


def texts() -> list[str]:
    """The passages of texts.txt, all in the public domain."""
    return resources.files("fairlead.models.merge").joinpath("texts.txt").read_text("utf-8").strip().split("\n\n")


def load(folder: Path, *, scores: bool, device: str, quantised: Quantisation | None = None, **options: Any) -> Any:
    """A causal language model, or a sequence classifier where it scores, in fp32 or as bitsandbytes makes it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    dtype = torch.float32
    if quantised is not None:
        dtype = quantised.dtype
        if quantised.section is not None:
            options["quantization_config"] = bits_and_bytes(quantised.section, torch.device(device))
    model: Any = auto.from_pretrained(folder, dtype=dtype, device_map={"": device}, trust_remote_code=False, **options)
    return model.eval()


def adapted(
    base: Path, deltas: Sequence[Delta], target: Any, *, scores: bool, quantised: Quantisation | None, device: str
) -> Any:
    """The base with its adapters, as peft computes them: the last one on, those before it merged by peft.

    ``quantised``: the base goes through bitsandbytes and is dequantised before its first forward pass (which, on some
    CPUs, packs the weights anew). ``target`` is the configuration of what was merged.
    """
    from peft import PeftModel

    options: dict[str, Any] = {"num_labels": target.num_labels, "pad_token_id": target.pad_token_id} if scores else {}
    model = load(base, scores=scores, device=device, quantised=quantised, **options)
    if quantised is not None:
        model = model.dequantize(dtype=torch.float32).float()
    rows = target.get_text_config().vocab_size
    if model.get_input_embeddings().weight.shape[0] != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied embeddings, which are kept apart here
        for delta in deltas:
            model = PeftModel.from_pretrained(model, delta.folder)
            if delta is not deltas[-1]:
                model = model.merge_and_unload()
    return model.eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, *, scores: bool) -> Tensor:
    """[N] fp32 on the CPU: the log-probability of every token of the texts but the first, or each text's score."""
    device = next(model.parameters()).device
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
    found: list[Tensor] = []
    for text in texts():
        cut = tokenizer(text, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
        ids = torch.tensor([cut], device=device)
        logits = model(ids).logits.float()
        if scores:
            found.append(logits.flatten())
        else:
            found.append(logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).flatten())
    return torch.cat(found).cpu()


def difference(first: Tensor, second: Tensor) -> Difference:
    gap = (first.double() - second.double()).abs()
    return Difference(float(gap.max()), float(gap.mean()), gap.numel())
