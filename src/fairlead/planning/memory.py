"""Bytes of a run by role and component. Exact for what is exact (weights, gradients, optimizer states, keys and values,
rollouts); the working memory of a step is that of `trace`. Knows the models and the recipe, not the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fairlead.config import OptimSection, QuantizeSection
from fairlead.models.adapters import is_linear
from fairlead.models.roles import Models

HEADS = "heads."
_MARK = "quantised_bytes"
"""Attribute of a layer on the meta device."""
BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one when these are quantised again."""
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
"""Values of an 8-bit optimizer state that share a scale, and the smallest tensor whose state is in 8 bits."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one role holds through the whole run, in bytes but for the counts."""

    role: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    """Held from the first backward pass of a step to its end."""
    states: Mapping[str, int]
    """Optimizer state by field."""


def parts(models: Models, optim: OptimSection) -> list[Part]:
    """Every parameter under one role, the network's first: ``base`` below adapters, else the role that is trained; an
    adapter or head under its role's name; ``reference`` and ``value`` for models, or layers, of their own."""
    sizes = parameter_sizes(models)
    trainable = {id(p) for p in models.trainable.values()}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in sorted(models.named_parameters(), key=lambda item: not item[0].startswith("network.")):
        found.setdefault(_role(name, models), []).append(parameter)
    result: list[Part] = []
    for role, held in found.items():
        states: dict[str, int] = {}
        learned = [p for p in held if id(p) in trainable]
        for parameter in learned:
            for field, size in state_bytes(optim, tuple(parameter.shape), parameter.dtype).items():
                states[field] = states.get(field, 0) + size
        result.append(
            Part(
                role,
                sum(sizes[id(p)][0] for p in held),
                sum(p.numel() for p in learned),
                sum(sizes[id(p)][1] for p in held),
                sum(p.nbytes for p in learned),
                states,
            )
        )
    return result


def _role(name: str, models: Models) -> str:
    if name.startswith(HEADS):
        return f"{name.split('.')[1]} head"
    if not name.startswith("network."):
        return name.split(".")[0]
    if models.is_peft:
        for adapter in models.network.peft_config:
            if f".{adapter}." in name:
                return f"{adapter} adapter"
        return "base"
    return models.main


def parameter_sizes(models: nn.Module) -> dict[int, tuple[int, int]]:
    """id of each parameter -> how many numbers it stands for, and the bytes that hold them, scales included."""
    sizes: dict[int, tuple[int, int]] = {}
    for module in models.modules():
        for parameter in module.parameters(recurse=False):
            sizes.setdefault(id(parameter), (parameter.numel(), parameter.nbytes))
        found: Any = module
        if hasattr(module, _MARK):
            sizes[id(found.weight)] = found.weight.numel(), getattr(module, _MARK)
        elif type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not found.weight.is_floating_point():
            sizes[id(found.weight)] = found.in_features * found.out_features, found.weight.nbytes + _scales(found)
    return sizes


def mark_quantised(model: Any, section: QuantizeSection) -> None:
    """Note on each layer of a model without weights what it will take when it is quantised; the head never is."""
    for module in model.modules():
        if is_linear(module) and module is not model.get_output_embeddings():
            rows, columns = module.get_parameter("weight").shape
            if type(module).__name__ == "Conv1D":  # GPT-2 keeps its matrices the other way round
                rows, columns = columns, rows
            setattr(module, _MARK, quantised_bytes(rows, columns, section))


def _scales(layer: Any) -> int:
    """Bytes beside the weight of a layer that bitsandbytes has quantised."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return (layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB).nbytes
    inner = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
    return sum(tensor.nbytes for tensor in (state.absmax, state.code, *inner))


def quantised_bytes(rows: int, columns: int, section: QuantizeSection) -> int:
    """Bytes that hold a matrix [rows, columns] as bitsandbytes stores it.

    8 bits: a byte a weight and an fp32 scale a row (Dettmers et al. 2022). 4 bits: half a byte a weight and a scale for
    each block of BLOCK, in fp32; or, ``double``, in one byte, with an fp32 scale for each OUTER_BLOCK of them and an
    fp32 mean (Dettmers et al. 2023); beside these the tables of the 16 and the 256 codes.
    """
    number = rows * columns
    if section.bits == 8:
        return number + 4 * rows
    blocks, codes = math.ceil(number / BLOCK), 16 * 4
    packed = math.ceil(number / 2)
    if not section.double:
        return packed + 4 * blocks + codes
    return packed + blocks + 4 * math.ceil(blocks / OUTER_BLOCK) + 4 + codes + 256 * 4


def state_bytes(optim: OptimSection, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each field of the optimizer's state for a parameter; the code tables of 8-bit states, 2 kB that all
    parameters share, aside."""
    name, number = optim.name.removeprefix("paged-"), math.prod(shape)
    if name == "sgd":
        return {}
    if name.endswith("-8bit"):
        fields = {"adamw-8bit": "12", "lion-8bit": "1"}[name]
        if number < SMALLEST_8BIT:
            return {f"state{field}": 4 * number for field in fields}
        scales = 4 * math.ceil(number / BLOCK_8BIT)
        return {f"state{field}": number for field in fields} | {f"absmax{field}": scales for field in fields}
    if name == "lion":
        return {"exp_avg": number * dtype.itemsize}
    if name == "adafactor" and len(shape) > 1:  # of a matrix its rows' and columns' means alone
        rows, columns = number // shape[-1], number // shape[-2]
        return {"row_var": rows * dtype.itemsize, "col_var": columns * dtype.itemsize, "step": 4}
    if name == "adafactor":
        return {"variance": number * dtype.itemsize, "step": 4}
    if optim.state_dtype == "bfloat16":
        return {"exp_avg": 2 * number, "exp_avg_sq": 2 * number}
    return {"exp_avg": number * dtype.itemsize, "exp_avg_sq": number * dtype.itemsize, "step": 4}


def cache_bytes(config: Any, *, rows: int, length: int, dtype: torch.dtype) -> int:
    """Keys and values of ``rows`` sequences of ``length`` tokens in every layer."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * key_heads * width * rows * length * dtype.itemsize


def total(parts: Iterable[Part]) -> dict[str, int]:
    parts = list(parts)
    return {
        "weights": sum(part.weights for part in parts),
        "gradients": sum(part.gradients for part in parts),
        "optimizer": sum(sum(part.states.values()) for part in parts),
    }


def available(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on the device, and all there are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    import psutil

    memory = psutil.virtual_memory()
    return memory.available, memory.total
