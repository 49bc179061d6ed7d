"""Scalar heads on a trunk: the value before each token, the reward at a sequence's last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairlead.errors import ModelError
from fairlead.ops.sampling import stream_key


def trunk_width(model: Any) -> int:
    """Width of the last hidden states (OPT-350m's differs from its layers')."""
    head = model.get_output_embeddings()
    return int((model.get_input_embeddings() if head is None else head).weight.shape[1])


class ScalarHead(nn.Module):
    """One number from a hidden state. [..., H] -> [...], in max(fp32, its dtype).

    The reward head starts at N(0, 1 / (H + 1)) without a bias, as in Stiennon et al. (2020), so that transformers'
    sequence classifiers can hold it; the value head starts at zero.
    """

    def __init__(self, hidden_size: int, *, role: str, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=role == "value", dtype=dtype)
        generator = torch.Generator().manual_seed(stream_key(seed, "head", role))
        with torch.no_grad():
            if role == "value":
                self.linear.weight.zero_()
                self.linear.bias.zero_()
            else:
                self.linear.weight.normal_(0, (hidden_size + 1) ** -0.5, generator=generator)

    @torch.no_grad()
    def start_as(self, weight: Tensor) -> None:
        """Begin with the weights of another head, [1, H]. Raises ModelError for one of another width."""
        own = self.linear.weight
        if weight.shape != own.shape:
            raise ModelError(f"a saved score head is {tuple(weight.shape)}, this trunk takes {tuple(own.shape)}")
        own.copy_(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.to(self.linear.weight.dtype))[..., 0]
