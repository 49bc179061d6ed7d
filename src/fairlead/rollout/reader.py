"""Reads prompts, then one token a row at a time, and gives the logits of what comes next. Knows nothing of draws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fairlead.models.attention import Forest
from fairlead.models.lm_head import LogitForm, last_logits
from fairlead.models.roles import Models
from fairlead.rollout.cache import Place, decoding_cache


class Reader:
    """Rows that continue prompts; of ``owner`` [R] row i continues prompt ``owner[i]``. ``length``: tokens that a row
    may read after its prompt."""

    def __init__(
        self, models: Models, network: Any, prompts: Sequence[Sequence[int]], owner: Tensor, length: int
    ) -> None:
        self._models, self._network, self._prompts = models, network, prompts
        self._owner, self._device = owner, owner.device
        lengths = torch.tensor([len(ids) for ids in prompts], device=self._device)
        self._width = max(map(len, prompts))
        self._room = self._width + length
        index = torch.arange(self._room, device=self._device)
        self._padding = self._width - lengths
        self._seen = (index >= self._padding[:, None])[owner]
        """[R, width + length]: prompts stand at the right end of their part."""
        self._positions = (lengths - 1)[owner][:, None]
        self._used = self._width
        self._form = LogitForm.of(network.config)
        self._cache: Any = None

    def prompts(self) -> Tensor:
        """Logits after each row's prompt [R, V]; each prompt is read once."""
        by_segments = self._models.forest and self._device.type == "cpu"
        hidden = self._packed_prompts() if by_segments else self._padded_prompts()
        return last_logits(self._network, hidden, self._form)[self._owner]

    def next(self, tokens: Tensor) -> Tensor:
        """Logits after one more token a row: [R] -> [R, V]."""
        self._used += 1
        self._positions = self._positions + 1
        seen = self._seen[:, : self._used]
        mask = seen[:, None, None] if self._models.forest else seen.long()
        hidden = self._trunk(tokens[:, None], self._positions, mask)
        return last_logits(self._network, hidden[:, -1], self._form)

    def keep(self, order: Tensor) -> None:
        """Row i becomes row ``order[i]``, others are dropped."""
        self._cache.batch_select_indices(order)
        self._seen, self._positions = self._seen[order], self._positions[order]

    def _packed_prompts(self) -> Tensor:
        """Last hidden states [prompts, H], without padding: one row, a run for each prompt."""
        ends = list(accumulate(map(len, self._prompts)))
        lengths = torch.tensor([len(ids) for ids in self._prompts])
        last = torch.tensor(ends)
        end = last.repeat_interleave(lengths)[None]
        index = torch.arange(ends[-1])[None]
        positions = index - (last - lengths).repeat_interleave(lengths)
        forest = Forest(torch.where(positions > 0, index - 1, -1), end, positions, "sdpa")
        # Where in the row the last tokens of each prompt stand; before its first are some others, which none sees.
        place = (last[:, None] - self._width + torch.arange(self._width)).clamp(min=0)[self._owner]
        self._cache = self._opened(lambda states: states[0][:, place].transpose(0, 1))
        ids = torch.tensor([[token for ids in self._prompts for token in ids]])
        return self._trunk(ids, positions, torch.zeros(1, 1, 1, 1, dtype=torch.bool), forest=forest)[0, last - 1]

    def _padded_prompts(self) -> Tensor:
        """The same from one row a prompt, padded on the left, which any attention takes."""
        ids = torch.tensor([[0] * (self._width - len(ids)) + list(ids) for ids in self._prompts], device=self._device)
        index = torch.arange(self._width, device=self._device)
        seen = index >= self._padding[:, None]
        positions = (index - self._padding[:, None]).clamp(min=0)
        if self._models.forest:
            self._cache = self._opened(lambda states: states[self._owner])
            return self._trunk(ids, positions, _causal(seen))[:, -1]
        self._cache = self._opened(None)
        hidden = self._trunk(ids, positions, seen.long())[:, -1]
        self._cache.batch_select_indices(self._owner)
        return hidden

    def _opened(self, place: Place | None) -> Any:
        return decoding_cache(self._network, self._room, place)

    def _trunk(self, ids: Tensor, positions: Tensor, mask: Tensor, **given: Any) -> Tensor:
        with self._models.autocast():
            return self._network.get_decoder()(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                **given,
            ).last_hidden_state


def _causal(seen: Tensor) -> Tensor:
    """[P, 1, width, width] bool from ``seen`` [P, width]; padding sees itself, so that no row is empty."""
    width = seen.shape[1]
    square = torch.ones(width, width, dtype=torch.bool, device=seen.device).tril()
    return (square & seen[:, None])[:, None] | torch.eye(width, dtype=torch.bool, device=seen.device)
