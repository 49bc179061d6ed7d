"""The decoding cache: keys and values in memory taken once, from which finished rows are removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values [R, heads, length, D] of one layer, written in place."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length, self._used = length, 0
        self._store: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = slice(self._used, self._used + key_states.shape[2])
        if self._store is None:
            self._store = _empty(key_states, self._length), _empty(value_states, self._length)
            self.is_initialized = True
        for store, states in zip(self._store, (key_states, value_states), strict=True):
            store[:, :, new] = states
        self._used = new.stop
        self.keys, self.values = (store[:, :, : self._used] for store in self._store)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._store is not None:
            keys, values = self._store
            self._store = keys.index_select(0, indices), values.index_select(0, indices)

    def get_seq_length(self) -> int:
        return self._used


def decoding_cache(network: Any, length: int, *, own: bool) -> Any:
    """``own``: the model's attention is ours and takes the whole cache; else the family's own kinds of layers."""
    if not own:
        return DynamicCache(config=network.config)
    return Cache(layers=[PreallocatedLayer(length) for _ in range(network.config.num_hidden_layers)])


def _empty(states: Tensor, length: int) -> Tensor:
    rows, heads, _, width = states.shape
    return torch.empty(rows, heads, length, width, dtype=states.dtype, device=states.device)
