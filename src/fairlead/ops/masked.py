"""Sums, moments and per-sequence reductions over the tokens that count, and over those alone."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``values`` [...] where ``mask`` [...] is true, without letting a nan off the mask through -> []."""
    return torch.where(mask, values, 0.0).sum()


def sequence_sums(values: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum of per-token ``values`` [B, T] over each sequence's counted tokens -> [S]."""
    zeros = values.new_zeros(num_sequences)
    return zeros.index_add(0, sequence_ids[mask], values[mask])


def whiten(values: Tensor, mask: Tensor, *, center: bool = True) -> Tensor:
    """``values`` scaled to unit variance over the mask, centred if asked; zero off the mask. [B, T] -> [B, T].

    The variance is the biased one. A mask of fewer than two tokens, or values all alike (to the rounding of their
    mean), leaves the scale at 1.
    """
    count = mask.sum().clamp(min=1)
    mean = masked_sum(values, mask) / count
    variance = masked_sum((values - mean) ** 2, mask) / count
    rounding = (16 * torch.finfo(values.dtype).eps * mean) ** 2
    scale = torch.where(variance > rounding.clamp(min=1e-16), variance, torch.ones_like(variance)).rsqrt()
    shifted = values - mean if center else values
    return torch.where(mask, shifted * scale, 0.0)
