"""Keyed random numbers and token draws.

Every uniform is a hash of (seed, purpose, step, item, token), never a draw from a shared stream, so a text does not
depend on which rows were sampled beside it. A token is drawn with two independent uniforms: a block of the vocabulary
by inverse CDF over the blocks' sums, then a token inside the block. Rounding that differs with the batch moves a
boundary of a flat CDF of V tokens far more often than one of these two short ones.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 64
"""Tokens of a block of the vocabulary."""
CANDIDATES = 256
"""Likeliest tokens that are ordered before the whole vocabulary is."""


def stream_key(*parts: int | str) -> int:
    """A 63-bit key from numbers and words, equal in every process and version of Python."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_uniform(key: int, items: Tensor, tokens: Tensor, draw: int) -> Tensor:
    """Uniforms in [0, 1) as float64, one for each (item, token). int64 tensors of one shape -> the same shape."""
    state = _mix(_mix(_mix(items + _signed(key)) + tokens) + draw)
    return ((state >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def permutation(key: int, length: int) -> list[int]:
    """A keyed shuffle of range(length)."""
    index = torch.arange(length)
    order = torch.argsort(keyed_uniform(key, index, torch.zeros_like(index), 0), stable=True)
    return cast(Any, order).tolist()


def token_uniforms(key: int, items: Tensor, tokens: Tensor) -> Tensor:
    """The two uniforms that draw each (item, token), stacked: [...] -> [2, ...]."""
    return torch.stack([keyed_uniform(key, items, tokens, draw) for draw in (0, 1)])


def sample_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from softmax(logits). ``logits`` [R, V] (already divided by the temperature; -inf: never),
    ``uniforms`` [2, R] -> (token ids [R], their log-probabilities [R] in max(fp32, input dtype))."""
    rows, vocabulary = logits.shape
    probs = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    blocks = -(-vocabulary // BLOCK)
    if blocks * BLOCK != vocabulary:
        probs = torch.nn.functional.pad(probs, (0, blocks * BLOCK - vocabulary))
    blocked = probs.view(rows, blocks, BLOCK)
    block = _inverse_cdf(blocked.sum(2), uniforms[0])
    inside = blocked[torch.arange(rows, device=logits.device), block]
    token = block * BLOCK + _inverse_cdf(inside, uniforms[1])
    return token, probs.gather(1, token[:, None])[:, 0].log()


def kept_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What `keep_top` left: the ids of one row after the other [M], and how many are each row's [R]."""
    left = logits > -torch.inf
    return left.nonzero()[:, 1], left.sum(1)


def keep_top(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits with all but the kept tokens at -inf: the ``top_k`` largest (0: all), and of those the fewest that hold
    ``top_p`` of the probability. [R, V] -> [R, V]"""
    if top_k and top_k < logits.shape[1]:
        floor = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return _nucleus(logits, top_p) if top_p < 1.0 else logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens decide it in most rows; the others are sorted whole. Of equal ones the first are kept."""
    total = logits.logsumexp(1, keepdim=True)
    values = logits.topk(min(CANDIDATES, logits.shape[1]), dim=1).values
    number, floor, is_enough = _fewest(values, total, top_p)
    rest = (~is_enough).nonzero()[:, 0]
    if len(rest):
        number[rest], floor[rest], _ = _fewest(logits[rest].sort(dim=1, descending=True).values, total[rest], top_p)
    kept = logits >= floor
    surplus = kept.sum(1) - number
    if bool(surplus.any()):
        equal = logits == floor
        kept &= ~equal | (equal.cumsum(1) <= (equal.sum(1) - surplus)[:, None])
    return logits.masked_fill(~kept, -torch.inf)


def _fewest(ordered: Tensor, total: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [R, N] in falling order, whose exponentials sum to that of ``total`` [R, 1]: how many hold ``top_p``
    [R], the last of them [R, 1], and whether N are enough [R]."""
    probs = (ordered - total).exp()
    reached = probs.cumsum(1)
    number = (reached - probs < top_p).sum(1)
    return number, ordered.gather(1, number[:, None] - 1), reached[:, -1] >= top_p


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the interval of the cumulated ``weights`` [R, N] that ``uniforms`` [R] fall into -> [R]. Its weight is
    never zero."""
    cumulated = weights.cumsum(1, dtype=torch.float64)
    total = cumulated[:, -1:]
    below = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, below, right=True)[:, 0]


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap. Steele, Lea, Flood (2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
