"""Attention over forests of runs, registered with transformers, and the table of families that honour it.

Each run is one scaled-dot-product call against its path: nothing is spent on what a token cannot see, and no dense
mask of the row exists. A family that is not in the table falls back to padded rows with its own attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairlead.types import TokenBatch

NAME = "fairlead"
FAMILIES = frozenset(
    {
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma3_text",
        "opt",
        "gpt2",
        "gpt_neox",
        "phi",
        "phi3",
        "smollm3",
        "olmo2",
    }
)
"""`model_type`s whose attention layers pass a forward keyword on and need nothing but the mask."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of tokens of one row whose every token sees ``path``, and those of the stretch up to itself."""

    row: int
    span: Span
    path: tuple[Span, ...]


@dataclass(slots=True, eq=False)
class Forest:
    """The segments of a batch; masks are made once and serve every layer."""

    segments: tuple[Segment, ...]
    cuts: tuple[tuple[int, ...], ...]
    """For each row the sizes of the pieces at whose borders every span begins and ends."""
    position_ids: Tensor
    """[B, T]"""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict[tuple[int, int | None], Tensor])

    @classmethod
    def of(cls, batch: TokenBatch) -> Forest:
        width = batch.input_ids.shape[1]
        segments: list[Segment] = []
        cuts: list[tuple[int, ...]] = []
        for row, (previous, ends) in enumerate(zip(batch.previous.tolist(), batch.subtree_end.tolist(), strict=True)):
            found = _row_segments(row, previous, ends)
            borders = {0, width} | {at for s in found for span in (s.span, *s.path) for at in span}
            ordered = sorted(borders)
            cuts.append(tuple(b - a for a, b in pairwise(ordered)))
            segments += found
        return cls(tuple(segments), tuple(cuts), batch.position_ids)

    def mask(self, index: int, window: int | None) -> Tensor | None:
        """[queries, keys] bool for a segment; none where plain causal attention is meant."""
        segment = self.segments[index]
        start, end = segment.span
        positions = self.position_ids[segment.row]
        if not segment.path and (window is None or end - start <= window):
            return None
        if (index, window) not in self._masks:
            size, seen = end - start, sum(b - a for a, b in segment.path)
            mask = torch.ones(size, seen + size, dtype=torch.bool, device=positions.device).tril(seen)
            if window is not None:
                keys = torch.cat([positions[a:b] for a, b in (*segment.path, segment.span)])
                mask &= positions[start:end, None] - keys[None] < window
            self._masks[index, window] = mask
        return self._masks[index, window]

    def pieces(self, states: Tensor) -> list[dict[int, tuple[Tensor, int]]]:
        """``states`` [B, heads, T, D] cut once: for each row, start -> (piece [1, heads, size, D], end).

        One split has one backward; a slice for every span would fill and add a whole tensor for each.
        """
        rows: list[dict[int, tuple[Tensor, int]]] = []
        for row, sizes in zip(states.split(1), self.cuts, strict=True):
            found: dict[int, tuple[Tensor, int]] = {}
            at = 0
            for piece in row.split(sizes, dim=2):
                found[at] = piece, at + piece.shape[2]
                at += piece.shape[2]
            rows.append(found)
        return rows


def _row_segments(row: int, previous: list[int], ends: list[int]) -> list[Segment]:
    """A run begins where a token does not follow the one before it; a first child goes on in its parent's segment."""
    starts: list[tuple[int, tuple[Span, ...]]] = []
    owner: list[int] = []
    for t, (before, end) in enumerate(zip(previous, ends, strict=True)):
        if not end:
            break
        if before < 0:
            starts.append((t, ()))
        elif before != t - 1:
            parent, path = starts[owner[before]]
            starts.append((t, (*path, (parent, before + 1))))
        owner.append(len(starts) - 1)
    lasts = [start for start, _ in starts[1:]] + [len(owner)]
    return [Segment(row, (start, last), path) for (start, path), last in zip(starts, lasts, strict=True)]


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    forest: Forest | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query`` [B, heads, T, D], ``key``, ``value`` [B, key heads, T', D] -> [B, T, heads, D].

    With ``forest``, by segments. Without it (decoding) ``attention_mask`` [B, 1, T, T'] bool says what is seen, and a
    sliding window counts from the end of the keys.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if forest is None:
        if sliding_window is not None and attention_mask is not None:
            ages = torch.arange(key.shape[2] - 1, -1, -1, device=key.device)
            offsets = torch.arange(query.shape[2] - 1, -1, -1, device=key.device)
            attention_mask = attention_mask & (ages[None] - offsets[:, None] < sliding_window)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2), None
    queries, keys, values = (forest.pieces(states) for states in (query, key, value))
    out_rows: list[list[Tensor]] = [[] for _ in forest.cuts]
    for index, segment in enumerate(forest.segments):
        row, spans = segment.row, (*segment.path, segment.span)
        mask = forest.mask(index, sliding_window)
        out_rows[row].append(
            F.scaled_dot_product_attention(
                _join(queries[row], (segment.span,)),
                _join(keys[row], spans),
                _join(values[row], spans),
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
            )
        )
    width = query.shape[2]
    rows = [F.pad(row, (0, 0, 0, width - row.shape[2])) for row in (torch.cat(parts, dim=2) for parts in out_rows)]
    return torch.cat(rows).transpose(1, 2), None


def _join(pieces: dict[int, tuple[Tensor, int]], spans: tuple[Span, ...]) -> Tensor:
    found: list[Tensor] = []
    for start, end in spans:
        while start < end:
            piece, start = pieces[start]
            found.append(piece)
    return torch.cat(found, dim=2) if len(found) > 1 else found[0]


def dense_mask(batch: TokenBatch) -> Tensor:
    """[B, 1, T, T] bool, the definition written out; the reference of tests. Refused above 4096 tokens."""
    width = batch.input_ids.shape[1]
    if width > 4096:
        raise ValueError(f"a dense mask of {width} x {width} tokens; rows above 4096 need forest_attention")
    index = torch.arange(width, device=batch.input_ids.device)
    causal = index[None, :, None] >= index[None, None, :]
    mask = causal & (index[None, :, None] < batch.subtree_end[:, None, :])
    return (mask | torch.eye(width, dtype=torch.bool, device=mask.device)).unsqueeze(1)


def register() -> None:
    """Make the attention known to transformers under NAME; needed once, before a model is built with it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forest_attention)
