"""Forest attention on GPUs: flex attention with a block mask from intervals, and flash attention over sequences of
varying length. Knows nothing of models nor of forests: intervals or sequences say what is seen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_WIDTH = 16
"""Dimensions of a head below which flex attention has no kernel."""
BLOCK = 128
"""Tokens of a block of flex attention's mask."""
GRAPHS = 64
"""That flex attention is compiled to, at most: with and without gradients, for each window, for one row and several,
one block and several, and the first length of each. Ten or twenty; above torch's own limit of 8 nothing is fused."""


@dataclass(frozen=True, slots=True)
class Varlen:
    """Sequences of queries and keys in a flattened batch; the last query of each sees its last key (lower right)."""

    queries: Tensor
    """[N] index of every real token, sequence by sequence."""
    keys: Tensor
    """[M] a shared prompt's tokens stand once for each sequence that sees them."""
    query_ends: Tensor
    """[S + 1] int32, from 0."""
    key_ends: Tensor
    longest: tuple[int, int]
    """Most queries and most keys of one sequence."""

    @classmethod
    def of(cls, sequences: Sequence[tuple[tuple[int, int], Sequence[tuple[int, int]]]], device: torch.device) -> Varlen:
        """From (span of the queries, spans seen before them)."""
        queries = [range(*span) for span, _ in sequences]
        keys = [[t for seen in (*path, span) for t in range(*seen)] for span, path in sequences]
        indices = [torch.tensor([t for part in parts for t in part], device=device) for parts in (queries, keys)]
        sizes = [[len(part) for part in parts] for parts in (queries, keys)]
        ends = [F.pad(torch.tensor(s, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)) for s in sizes]
        longest = (max(sizes[0], default=0), max(sizes[1], default=0))
        return cls(indices[0], indices[1], ends[0].to(device), ends[1].to(device), longest)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Varlen,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[B, heads, T, D] and [B, key heads, T, D] twice -> [B, heads, T, D], zero at padding."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    found = flash_attn_varlen_func(
        flat[0][plan.queries],
        flat[1][plan.keys],
        flat[2][plan.keys],
        plan.query_ends,
        plan.key_ends,
        *plan.longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    out = torch.zeros_like(flat[0]).index_put((plan.queries,), found)
    return out.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: Any, *, scaling: float | None, softcap: float | None
) -> Tensor:
    """[B, heads, T, D] and [B, key heads, T, D] twice, ``blocks`` of `block_mask` -> [B, heads, T, D]."""
    attend = _compiled() if query.is_cuda else _plain()
    return attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def block_mask(subtree_end: Tensor, position_ids: Tensor, window: int | None = None) -> Any:
    """The BlockMask of visible(i, j) = j <= i < subtree_end[j], within ``window`` positions; padding sees itself.

    From the least and greatest of each block alone, so in (T / BLOCK)^2 and not T^2 (`create_block_mask`). A block that
    may hold a visible pair is listed; one in which every pair surely is visible is listed as full.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, width = subtree_end.shape
    blocks = -(-width // BLOCK)

    def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest of each block [B, blocks]; the last one is filled with its last token."""
        filled = torch.cat([values, values[:, -1:].expand(-1, blocks * BLOCK - width)], 1).view(rows, blocks, BLOCK)
        return filled.amin(2), filled.amax(2)

    first = torch.arange(blocks, device=subtree_end.device) * BLOCK
    last = (first + BLOCK).clamp(max=width) - 1
    ends_low, ends_high = extremes(subtree_end)
    near, own = last[:, None] >= first, torch.eye(blocks, dtype=torch.bool, device=subtree_end.device)
    some = near & (first[:, None] < ends_high[:, None]) | own
    full = (first[:, None] >= last) & (last[:, None] < ends_low[:, None])
    if window is not None:
        low, high = extremes(position_ids)
        some &= (low[:, :, None] - high[:, None] < window) | own
        full &= high[:, :, None] - low[:, None] < window
    partial = some & ~full

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (i < subtree_end[b, j])
        if window is not None:
            seen &= position_ids[b, i] - position_ids[b, j] < window
        return seen | (i == j)

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(width, width)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Q, K] bool -> how many blocks of keys [B, 1, Q], and which, those first [B, 1, Q, K]."""
    order = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return blocks.sum(2, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


@functools.cache
def _cap(softcap: float) -> Any:
    """One function for each cap: a new one would be compiled anew."""

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _plain() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled() -> Any:
    """Fused; without compiling, flex attention holds every score."""
    from torch._dynamo import config

    config.cache_size_limit = max(config.cache_size_limit, GRAPHS)  # its name in all versions
    return torch.compile(_plain())
