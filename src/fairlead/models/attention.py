"""Attention over forests of runs, registered with transformers, and the table of families that honour it.

One forest, four ways to compute: `sdpa`, one scaled-dot-product call for each run against its path; `flex` and `flash`
on GPUs; `eager`, the dense mask written out. None but the last holds a mask of the row. A family that is not in the
table falls back to padded rows with its own attention.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairlead.errors import ConfigError, ModelError
from fairlead.models import gpu_attention
from fairlead.types import TokenBatch

NAME = "fairlead"
FAMILIES = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
"""`model_type`s whose attention layers pass a forward keyword on and need nothing but the mask and a soft cap."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of tokens of one row whose every token sees ``path``, and those of the stretch up to itself."""

    row: int
    span: Span
    path: tuple[Span, ...]


@dataclass(eq=False)
class Forest:
    """What the tokens of a batch see; what a way of computing derives from it is made once and serves every layer."""

    previous: Tensor
    """[B, T], with the next two as in the batch."""
    subtree_end: Tensor
    position_ids: Tensor
    way: str = "auto"
    """`model.attention`."""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict[tuple[int, int | None], Tensor])
    _blocks: dict[int | None, Any] = field(default_factory=dict[int | None, Any])

    @classmethod
    def of(cls, batch: TokenBatch, way: str = "auto") -> Forest:
        return cls(batch.previous, batch.subtree_end, batch.position_ids, way)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        rows = zip(self.previous.tolist(), self.subtree_end.tolist(), strict=True)
        return tuple(s for row, (previous, ends) in enumerate(rows) for s in _row_segments(row, previous, ends))

    @cached_property
    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """For each row the sizes of the pieces at whose borders every span begins and ends."""
        height, width = self.previous.shape
        borders: list[set[int]] = [{0, width} for _ in range(height)]
        for s in self.segments:
            borders[s.row] |= {at for span in (s.span, *s.path) for at in span}
        return tuple(tuple(b - a for a, b in pairwise(sorted(row))) for row in borders)

    @cached_property
    def shared(self) -> bool:
        """Whether any run has several continuations."""
        before = torch.arange(self.previous.shape[1], device=self.previous.device) - 1
        return bool(((self.previous >= 0) & (self.previous != before)).any())

    @cached_property
    def varlen(self) -> gpu_attention.Varlen:
        """The segments as sequences of queries and keys in the flattened batch."""
        width = self.previous.shape[1]
        found = [
            (
                (s.row * width + s.span[0], s.row * width + s.span[1]),
                [(s.row * width + a, s.row * width + b) for a, b in s.path],
            )
            for s in self.segments
        ]
        return gpu_attention.Varlen.of(found, self.previous.device)

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

    def dense(self, window: int | None) -> Tensor:
        """[B, 1, T, T] bool, the definition written out; padding sees itself. Raises ModelError above 4096 tokens."""
        width = self.previous.shape[1]
        if width > 4096:
            raise ModelError(
                f"a dense mask of {width} x {width} tokens; rows above 4096 cannot take it",
                hint="model.attention=auto",
            )
        index = torch.arange(width, device=self.previous.device)
        mask = (index[:, None] >= index) & (index[:, None] < self.subtree_end[:, None])
        if window is not None:
            mask &= self.position_ids[:, :, None] - self.position_ids[:, None] < window
        return (mask | torch.eye(width, dtype=torch.bool, device=mask.device)).unsqueeze(1)

    def blocks(self, window: int | None) -> Any:
        """The BlockMask of flex attention."""
        if window not in self._blocks:
            self._blocks[window] = gpu_attention.block_mask(self.subtree_end, self.position_ids, window)
        return self._blocks[window]

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


NATIVE = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
"""`model.attention` -> transformers' own name, for families outside the table."""


def install(model: Any, way: str, device: torch.device) -> bool:
    """Give a model the attention of this module; where its family is not in the table, its own of the ``way`` asked
    for, and False: rows must be padded. Raises ConfigError for a way that device or family cannot take."""
    require_device(way, device)
    kind = model.config.model_type
    if kind in FAMILIES:
        register()
        model.set_attn_implementation(NAME)
    elif way != "auto" and model.config._attn_implementation != NATIVE[way]:
        with contextlib.suppress(ValueError, ImportError):  # some families refuse, others only warn
            model.set_attn_implementation(NATIVE[way])
        if model.config._attn_implementation != NATIVE[way]:
            raise ConfigError(f"model.attention={way}: {kind} does not have it", hint="model.attention=auto")
    return kind in FAMILIES


def require_device(way: str, device: torch.device) -> None:
    """Raise ConfigError where `model.attention` names what the device, or this installation, cannot do."""
    reason = hint = ""
    if way == "flex" and device.type != "cuda":
        reason, hint = "torch has no backward pass of flex attention there", "model.attention=auto"
    elif way == "flash" and device.type != "cuda":
        reason, hint = "flash-attn runs on CUDA devices only", "model.attention=auto"
    elif way == "flash" and not has_flash():
        reason, hint = "flash-attn is not installed", "pip install flash-attn, or model.attention=flex"
    if reason:
        raise ConfigError(f"model.attention={way} on {device}: {reason}", hint=hint)


def has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Forest | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query`` [B, heads, T, D], ``key``, ``value`` [B, key heads, T', D] -> [B, T, heads, D].

    With ``forest``, over its runs. Without it (decoding) ``attention_mask`` [B, 1, T, T'] bool says what is seen, and a
    sliding window counts from the end of the keys. ``softcap``: scores become cap * tanh(score / cap).
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary tables may have widened them under autocast
    if forest is None:
        return decode(query, key, value, attention_mask, scaling, sliding_window, softcap).transpose(1, 2), None
    way = _way(forest, value, dropout)
    how: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
    if way == "flex":
        return gpu_attention.flex(query, key, value, forest.blocks(sliding_window), **how).transpose(1, 2), None
    if way == "flash":
        how |= {"dropout": dropout, "window": sliding_window}
        return gpu_attention.flash(query, key, value, forest.varlen, **how).transpose(1, 2), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if way == "eager":
        mask = forest.dense(sliding_window)
        out = explicit_attention(query, key, value, mask, dropout, scaling, softcap)
    else:
        out = _by_segments(query, key, value, forest, dropout, scaling, sliding_window, softcap)
    return out.transpose(1, 2), None


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Against a cache, whose keys the queries end: [B, heads, T, D], keys as in `forest_attention` -> [B, heads, T,
    D]."""
    if window is not None and mask is not None:
        ages = torch.arange(key.shape[2] - 1, -1, -1, device=key.device)
        offsets = torch.arange(query.shape[2] - 1, -1, -1, device=key.device)
        mask = mask & (ages[None] - offsets[:, None] < window)
    rows, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    if tokens == 1:  # heads that share keys are as good as several queries of one head: no key is repeated
        query = query.reshape(rows, key.shape[1], groups, width)
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = _attend(query, key, value, mask, 0.0, scaling, softcap)
    return out.reshape(rows, heads, tokens, width)


def _way(forest: Forest, value: Tensor, dropout: float) -> str:
    """How a forest is computed: what was asked for, or the fastest way there is for these heads."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    if forest.way == "auto":
        if value.device.type != "cuda" or value.dtype == torch.float64:
            return "sdpa"
        if half and not forest.shared and has_flash():
            return "flash"
        return "flex" if value.shape[-1] >= gpu_attention.LEAST_WIDTH and not dropout else "sdpa"
    if forest.way == "flash" and not half:
        raise ModelError(
            f"model.attention=flash computes in float16 and bfloat16, this model in {str(value.dtype)[6:]}",
            hint="model.dtype=auto or bfloat16, or model.attention=flex",
        )
    if forest.way == "flex" and (dropout or value.shape[-1] < gpu_attention.LEAST_WIDTH):
        raise ModelError(
            f"model.attention=flex takes heads of {gpu_attention.LEAST_WIDTH} dimensions or more and no dropout; this "
            f"model has {value.shape[-1]} and {dropout}",
            hint="model.attention=auto",
        )
    return forest.way


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    causal: bool = False,
) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout, scale=scaling
        )
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return explicit_attention(query, key, value, mask, dropout, scaling, softcap)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """The definition, with all scores at once, softmax in max(fp32, dtype): what a soft cap needs off GPUs."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    queries, keys, values = (forest.pieces(states) for states in (query, key, value))
    out_rows: list[list[Tensor]] = [[] for _ in forest.cuts]
    for index, segment in enumerate(forest.segments):
        row, spans = segment.row, (*segment.path, segment.span)
        mask = forest.mask(index, window)
        out_rows[row].append(
            _attend(
                _join(queries[row], (segment.span,)),
                _join(keys[row], spans),
                _join(values[row], spans),
                mask,
                dropout,
                scaling,
                softcap,
                causal=mask is None,
            )
        )
    width = query.shape[2]
    rows = [F.pad(row, (0, 0, 0, width - row.shape[2])) for row in (torch.cat(parts, dim=2) for parts in out_rows)]
    return torch.cat(rows)


def _join(pieces: dict[int, tuple[Tensor, int]], spans: tuple[Span, ...]) -> Tensor:
    found: list[Tensor] = []
    for start, end in spans:
        while start < end:
            piece, start = pieces[start]
            found.append(piece)
    return torch.cat(found, dim=2) if len(found) > 1 else found[0]


def register() -> None:
    """Make the attention known to transformers under NAME; needed once, before a model is built with it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forest_attention)
