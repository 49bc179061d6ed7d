"""A data set as a source of optimizer steps: keyed shuffling, batches of a fixed number of examples, micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fairlead.data.pack import micro_batches, step_groups
from fairlead.ops.sampling import permutation, stream_key
from fairlead.types import TokenBatch

Collate = Callable[[Sequence[int]], TokenBatch]


class DatasetSource:
    """Walks over examples, epoch after epoch, each in an order keyed by (seed, epoch). Its state is the step.

    ``sizes`` are the tokens of each example; ``micro_batch_tokens`` is asked at every step; ``collate`` makes a
    micro-batch of the examples of the given indices; ``share`` says which of a step's are this process's. The last
    batch of an epoch may be smaller; the loop divides by true counts, so nothing is dropped or weighs more.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        collate: Collate,
        *,
        batch_size: int,
        micro_batch_tokens: Callable[[], int],
        packed: bool,
        seed: int,
        epochs: float,
        steps: int | None = None,
        share: Callable[[Sequence[int]], list[int]] = lambda sizes: list(range(len(sizes))),
    ) -> None:
        self._sizes, self._collate, self._packed = sizes, collate, packed
        self._batch_size, self._budget, self._seed = batch_size, micro_batch_tokens, seed
        self._steps_per_epoch = math.ceil(len(sizes) / batch_size)
        self.num_steps = steps if steps is not None else max(1, round(epochs * self._steps_per_epoch))
        self._share = share
        self._step = 0
        self._last: Sequence[int] = ()

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        while self._step < self.num_steps:
            epoch, position = divmod(self._step, self._steps_per_epoch)
            order = permutation(stream_key(self._seed, "order", epoch), len(self._sizes))
            while self._step < self.num_steps and position < self._steps_per_epoch:
                chosen = order[position * self._batch_size : (position + 1) * self._batch_size]
                position += 1
                self._step += 1
                yield self.batch(chosen)

    def batch(self, indices: Sequence[int]) -> list[TokenBatch]:
        """This process's micro-batches of one step."""
        sizes, self._last = [self._sizes[i] for i in indices], indices
        groups = step_groups(sizes, self._budget(), packed=self._packed, share=self._share)
        return [self._collate([indices[i] for i in group]) for group in groups]

    def remake(self) -> list[TokenBatch]:
        return self.batch(self._last)

    def in_order(self, first: int = 0, last: int | None = None) -> Iterator[TokenBatch]:
        """Every example from ``first`` to before ``last`` once, in the order given: for evaluation."""
        for group in micro_batches(self._sizes[first:last], self._budget(), packed=self._packed):
            yield self._collate([first + i for i in group])

    def read(self) -> list[int]:
        """The examples that all steps together read, in the order of the data."""
        if self.num_steps >= self._steps_per_epoch:
            return list(range(len(self._sizes)))
        order = permutation(stream_key(self._seed, "order", 0), len(self._sizes))
        return sorted(order[: self.num_steps * self._batch_size])

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
