"""The optimizer and the learning-rate schedule: what they say, and nothing hidden in a scheduler's state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairlead.config import OptimSection


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

    def step(self, step: int) -> float:
        """Take optimizer step number ``step`` (from 1) and drop the gradients; returns the learning rate used."""
        rate = self._section.learning_rate * learning_rate_factor(
            step,
            self._num_steps,
            schedule=self._section.schedule,
            warmup_steps=self.warmup_steps,
            floor=self._section.min_learning_rate_ratio,
        )
        for group in self._torch.param_groups:
            group["lr"] = rate
        self._torch.step()
        self._torch.zero_grad(set_to_none=True)
        return rate

    def clip(self) -> Tensor:
        """Scale the gradients down to max_grad_norm; returns their norm before."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._section.max_grad_norm is not None and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._parameters, self._section.max_grad_norm, norm)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """The state, as ``name|field`` -> tensor."""
        return {
            f"{name}|{field}": value.contiguous()
            for name, parameter in zip(self._names, self._parameters, strict=True)
            for field, value in self._torch.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        by_name = dict(zip(self._names, self._parameters, strict=True))
        for key, value in tensors.items():
            name, _, field = key.rpartition("|")
            parameter = by_name[name]
            held = value.to(parameter.device)
            if value.shape == parameter.shape:  # fused steps walk both side by side: the same strides
                held = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            self._torch.state[parameter][field] = held


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
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.learning_rate)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)
