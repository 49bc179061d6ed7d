"""The decoding cache: keys and values in memory taken once. A prompt is read once for all its samples; a row that
finishes gives its place to the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

Place = Callable[[Tensor], Tensor]
"""States of the prompts as the model gives them, to those of the rows [rows, heads, width, D], which end together."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values [rows, heads, length, D] of one layer, written in place."""

    def __init__(self, length: int, place: Place) -> None:
        super().__init__()
        self._length, self._place = length, place
        self._rows, self._used = 0, 0
        self._store: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        given = (key_states, value_states)
        if not self._store:  # prompts, which see themselves alone
            for states in map(self._place, given):
                rows, heads, width, size = states.shape
                store = states.new_empty(rows, heads, self._length, size)
                store[:, :, :width] = states
                self._store.append(store)
                self._rows, self._used, self.is_initialized = rows, width, True
            return given
        for store, states in zip(self._store, given, strict=True):
            store[: self._rows, :, self._used] = states[:, :, 0]
        self._used += 1
        self.keys, self.values = (store[: self._rows, :, : self._used] for store in self._store)
        return self.keys, self.values

    def move(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Copy some rows into the places of others, and keep the first ``rows``."""
        self._rows = rows
        for store in self._store:
            store[targets] = store[sources]

    def get_seq_length(self) -> int:
        return self._used


class PreallocatedCache(Cache):
    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row ``indices[i]`` was. Only rows that change are copied; `survivors` makes them few, and
        none of them a source."""
        targets = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for layer in self.layers:
            layer.move(indices[targets], targets, len(indices))  # pyright: ignore[reportAttributeAccessIssue]


def decoding_cache(network: Any, length: int, place: Place | None) -> Any:
    """With ``place`` the model's attention is ours and takes the whole cache; else the family's own kinds of layers."""
    if place is None:
        return DynamicCache(config=network.config)
    return PreallocatedCache([PreallocatedLayer(length, place) for _ in range(network.config.num_hidden_layers)])


def survivors(done: Tensor) -> Tensor:
    """``done`` [R] bool -> the rows that go on, in an order in which those stay that can, and the last ones fill the
    gaps."""
    left = len(done) - int(done.sum())
    order = torch.arange(left, device=done.device)
    order[done[:left]] = (~done[left:]).nonzero()[:, 0] + left
    return order
