"""What a model call returns, and what is measured of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(init=False, slots=True, eq=False)
class Outputs:
    """What a model call returns; asking for what was not computed is an error of the programmer."""

    _tensors: dict[str, Tensor]

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    @property
    def nothing(self) -> Tensor:
        """Zero, of which all that was computed gets a gradient of zero. []"""
        return torch.stack([(values * 0).sum() for values in self._tensors.values() if values.requires_grad]).sum()

    def has(self, name: str) -> bool:
        return name in self._tensors

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise AttributeError(f"this pass did not compute {name!r}; its Pass.needs lists {sorted(self._tensors)}")
        return self._tensors[name]

    @property
    def logprobs(self) -> Tensor:
        """[B, T] natural log; zero off the mask."""
        return self._get("logprobs")

    @property
    def entropy(self) -> Tensor:
        """[B, T] nats; zero off the mask."""
        return self._get("entropy")

    @property
    def values(self) -> Tensor:
        """[B, T] zero off the mask."""
        return self._get("values")

    @property
    def scores(self) -> Tensor:
        """[S] the reward head at each sequence's last token; of several heads what they are combined to."""
        return self._get("scores")

    @property
    def head_scores(self) -> Tensor:
        """[S, K] each reward head."""
        return self._get("head_scores") if self.has("head_scores") else self.scores[:, None]

    @property
    def collision(self) -> Tensor:
        """[B, T] log of the probability that two draws agree; zero off the mask; without gradient."""
        return self._get("collision")

    @property
    def mean_logit(self) -> Tensor:
        """[B, T] mean of the logits over the vocabulary; zero off the mask; without gradient."""
        return self._get("mean_logit")


@dataclass(frozen=True, slots=True)
class Mean:
    """A sum and what it is a sum of: the only metric type. Adds across micro-batches and processes."""

    sum: Tensor | float
    count: Tensor | float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; nan when nothing was counted."""
        count = float(self.count)
        return float(self.sum) / count if count else float("nan")


Metrics = dict[str, Mean]
