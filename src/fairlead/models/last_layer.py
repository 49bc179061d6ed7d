"""The last layer's MLP where its result is read: beyond it nothing looks at the states of a prompt's tokens, nor, for a
score, at any but the last of a response. Knows no algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fairlead.models.kernels import is_gated_mlp
from fairlead.types import TokenBatch

WORTH = 0.8
"""Share of the tokens from which on all are computed."""


def read_places(batch: TokenBatch, *, tokens: bool, ends: bool) -> Tensor:
    """Places in the flattened [B, T] whose last states are read [N]: before each counted token, and at the end of each
    sequence."""
    is_read = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    if tokens:
        rows, columns = batch.loss_mask.nonzero(as_tuple=True)
        is_read[rows * batch.input_ids.shape[1] + batch.previous[rows, columns]] = True
    if ends:
        is_read[batch.sequence_ends] = True
    return is_read.nonzero()[:, 0]


@contextmanager
def last_mlp_at(network: Any, places: Tensor, number: int) -> Iterator[None]:
    """Inside, the MLP of the network's last layer computes the tokens at ``places`` [N] of the flattened [B, T], which
    are ``number``, and gives zeros for the others. Where it is of a kind known here, and others are many enough."""
    mlp = getattr(getattr(network.get_decoder(), "layers", [None])[-1], "mlp", None)
    if mlp is None or not is_gated_mlp(mlp) or len(places) > WORTH * number:
        yield
        return
    own, forward = vars(mlp).get("forward"), mlp.forward
    mlp.forward = partial(_at, places, forward)
    try:
        yield
    finally:
        if own is None:
            del mlp.forward
        else:
            mlp.forward = own


def _at(places: Tensor, forward: Any, states: Tensor) -> Tensor:
    flat = states.flatten(0, -2)
    found = forward(flat[places])
    return found.new_zeros(len(flat), found.shape[-1]).index_copy(0, places, found).view(*states.shape[:-1], -1)
