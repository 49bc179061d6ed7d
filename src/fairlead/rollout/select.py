"""Which of the responses to some prompts are learned from: ranked by a key, the best of each prompt or of all. Knows
neither what made the responses nor where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.rollout.screen import ScreenSettings, share_empty


class SelectSettings(ScreenSettings):
    collect: Literal["local", "top"] = "local"
    """local: the best of each prompt; top: the best of the whole round."""
    keep: int | None = Field(default=None, ge=1)
    """With collect: local, how many of each prompt's responses; 1 when not given."""
    share: float | None = Field(default=None, gt=0, le=1)
    """With collect: top, the share of all responses; as many as there are prompts when not given."""

    @model_validator(mode="after")
    def _one_way(self) -> SelectSettings:
        if self.collect == "local" and self.share is not None:
            raise ValueError("share is for collect=top; with collect=local, keep says how many of each prompt")
        if self.collect == "top" and self.keep is not None:
            raise ValueError("keep is for collect=local; with collect=top, share says how much of the round")
        return self


def select(
    keys: Tensor, numbers: Sequence[int], settings: SelectSettings, discarded: Mapping[str, float]
) -> tuple[Tensor, float]:
    """Which responses are kept, [S] bool, and the share of prompts that have none left. ``keys`` [S] rank them, nan for
    one that was discarded; ``numbers`` of them belong to each prompt. Of equals the first is the better one. Raises
    TrainingError, with the shares of what was ``discarded`` by reason, where more than `max_empty` have none left."""
    known = ~keys.isnan()
    empty = share_empty(known, numbers, settings, discarded)
    ranked = torch.where(known, keys, -torch.inf)
    if settings.collect == "local":
        rows = torch.nn.utils.rnn.pad_sequence(list(ranked.split(list(numbers))), True, -torch.inf)
        inside = torch.arange(rows.shape[1])[None] < torch.tensor(numbers)[:, None]
        keep = best(rows, settings.keep or 1)[inside]
    else:
        wanted = len(numbers) if settings.share is None else math.floor(settings.share * len(keys) + 1e-9)
        keep = best(ranked[None], max(1, wanted))[0]
    return keep & known, empty


def best(keys: Tensor, number: int) -> Tensor:
    """The ``number`` largest of each row, the first of equals. [R, N] -> [R, N] bool"""
    order = keys.sort(dim=1, descending=True, stable=True).indices[:, :number]
    return torch.zeros(keys.shape, dtype=torch.bool).scatter(1, order, True)
