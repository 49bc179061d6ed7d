"""Scalar heads on a trunk: the value before each token, the reward at a sequence's last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairlead.ops.sampling import stream_key


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

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.to(self.linear.weight.dtype))[..., 0]
