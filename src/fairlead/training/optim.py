"""The optimizer and the learning-rate schedule: what they say, and nothing hidden in a scheduler's state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fairlead.config import OptimSection
from fairlead.errors import ConfigError
from fairlead.training.rules import AdamWBfloat16, Lion
from fairlead.training.stored import local


class Optimizer:
    """torch's optimizer over named parameters, its learning rate a function of the step alone."""

    def __init__(self, section: OptimSection, parameters: Mapping[str, nn.Parameter], num_steps: int) -> None:
        self._section, self._names = section, list(parameters)
        self._parameters = list(parameters.values())
        self._num_steps = num_steps
        warmup = section.warmup_steps
        self.warmup_steps = round(section.warmup_ratio * num_steps) if warmup is None else warmup
        groups = [
            {"params": [p for p in self._parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
            {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._torch = _torch_optimizer(section, [group for group in groups if group["params"]])

    def step(self, step: int, rate: float = 1.0) -> float:
        """Take optimizer step number ``step`` (from 1) at ``rate`` times its scheduled learning rate, and drop the
        gradients; returns the learning rate used."""
        rate *= self._section.learning_rate * learning_rate_factor(
            step,
            self._num_steps,
            schedule=self._section.schedule,
            warmup_steps=self.warmup_steps,
            floor=self._section.min_learning_rate_ratio,
        )
        for group in self._torch.param_groups:
            group["lr"] = rate
        self._torch.step()
        for parameter in self._parameters:  # fused and 8-bit steps write where autograd does not see it
            torch.autograd.graph.increment_version(parameter)
        self._torch.zero_grad(set_to_none=True)
        return rate

    def forget(self) -> None:
        """Drop all moments, as if no step had been taken."""
        self._torch.state.clear()

    def skip(self) -> float:
        """Drop the gradients and change nothing; returns the learning rate of such a step, zero."""
        self._torch.zero_grad(set_to_none=True)
        return 0.0

    def clip(self, loss_scale: float = 1.0) -> Tensor:
        """Scale the gradients of a loss times ``loss_scale`` back, and down to max_grad_norm; returns their norm
        before it."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if loss_scale != 1.0:
            for gradient in gradients:
                gradient.mul_(1 / loss_scale)
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore  # of sharded ones
        if self._section.max_grad_norm is not None and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._parameters, self._section.max_grad_norm, norm)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """The state, as ``name|field`` -> tensor; the code tables of 8-bit states are constants and left out."""
        return {
            f"{name}|{field}": torch.tensor(value) if isinstance(value, int) else value.contiguous()
            for name, parameter in zip(self._names, self._parameters, strict=True)
            for field, value in self._torch.state.get(parameter, {}).items()
            if isinstance(value, Tensor | int) and not field.startswith("qmap")
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        by_name = dict(zip(self._names, self._parameters, strict=True))
        places = {p: (g, i) for g, group in enumerate(self._torch.param_groups) for i, p in enumerate(group["params"])}
        for key, value in tensors.items():
            name, _, field = key.rpartition("|")
            parameter = by_name[name]
            state = self._torch.state[parameter]
            if not state and isinstance(self._torch, HasStateMaker):
                group, index = places[parameter]
                self._torch.init_state(self._torch.param_groups[group], parameter, group, index)
            if value.ndim == 0 and value.dtype == torch.int64:
                state[field] = int(value)
            elif field in state:  # bitsandbytes chose where it lies
                state[field].copy_(value)
            elif value.shape == local(parameter).shape:  # fused steps walk both side by side: the same strides
                state[field] = torch.empty_like(parameter, dtype=value.dtype)
                local(state[field]).copy_(value)
            elif value.ndim == 0 and not self._torch.defaults.get("fused"):
                state[field] = value  # a counter that is read on the CPU at every step
            else:
                state[field] = value.to(parameter.device)


@runtime_checkable
class HasStateMaker(Protocol):
    """An optimizer of bitsandbytes."""

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None: ...


def learning_rate_factor(step: int, num_steps: int, *, schedule: str, warmup_steps: int, floor: float) -> float:
    """Share of the peak learning rate at step ``step`` of 1..num_steps.

    Rises linearly over the warm-up and reaches 1 at its end; then constant, or linear or cosine down to ``floor`` at
    the last step.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    if schedule == "constant" or num_steps <= warmup_steps + 1:
        return 1.0
    done = min(1.0, (step - warmup_steps - 1) / (num_steps - warmup_steps - 1))
    shape = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * shape


def _torch_optimizer(section: OptimSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    rate, betas = section.learning_rate, section.betas
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    if section.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    if section.name == "lion":
        return Lion(groups, lr=rate, betas=betas)
    if section.name.endswith("8bit"):
        return _eight_bit(section, groups)
    if section.state_dtype == "bfloat16":
        return AdamWBfloat16(groups, lr=rate, betas=betas, eps=section.eps)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, betas=betas, eps=section.eps, fused=True)


def _eight_bit(section: OptimSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
        from bitsandbytes.optim.lion import Lion8bit, PagedLion8bit
    except ImportError as error:
        raise ConfigError(
            f"optim.name={section.name} needs bitsandbytes, which is not installed: {error}",
            hint="pip install 'fairlead[quant]', or optim.state_dtype=bfloat16 with adamw",
        ) from error
    paged = section.name.startswith("paged-")
    if paged and (place := groups[0]["params"][0].device.type) != "cuda":
        raise ConfigError(
            f"optim.name={section.name}: a GPU pages its memory to the CPU, the {place} does not",
            hint=f"optim.name={section.name.removeprefix('paged-')}",
        )
    if section.name.endswith("lion-8bit"):
        kind = PagedLion8bit if paged else Lion8bit
        return kind(groups, lr=section.learning_rate, betas=section.betas)
    kind = PagedAdamW8bit if paged else AdamW8bit
    return kind(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps)
