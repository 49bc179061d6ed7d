"""Update rules that torch lacks: Lion, and AdamW with its states in bfloat16. Knows neither schedules nor names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023, algorithm 2):

    c = b1 m + (1 - b1) g;  p <- p - lr (sign(c) + decay p);  m <- b2 m + (1 - b2) g
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.to(p.dtype)
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                momentum = self.state[p]["exp_avg"]
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(momentum.lerp(gradient, 1 - beta1).sign_(), alpha=-rate)
                momentum.lerp_(gradient, 1 - beta2)


class AdamWBfloat16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) computed in fp32, its two moments kept in bfloat16.

    The moments are rounded up or down at random, with the chances that keep their mean: rounded to the nearest, a
    change below 1/256 of them would never be made. The draws come from torch's generator of the device.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, gradient = self.state[p], p.grad.float()
                if not state:
                    state |= {key: torch.zeros_like(p, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
                    state["step"] = 0
                state["step"] += 1
                first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
                second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                p.mul_(1 - rate * group["weight_decay"])
                p.addcdiv_(first.to(p.dtype), root.to(p.dtype), value=-rate / (1 - beta1 ** state["step"]))
                state["exp_avg"].copy_(round_at_random(first))
                state["exp_avg_sq"].copy_(round_at_random(second))


def round_at_random(values: Tensor) -> Tensor:
    """fp32 to one of the two nearest bfloat16, its mean the value: noise below the 16 bits that are cut off."""
    bits = values.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
