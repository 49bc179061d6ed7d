"""The processes that train one run together. This is the form of one process, in which nothing is sent anywhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ranks:
    """One process; `fairlead.training.distributed` has the form of several, which all do the same steps, each with its
    share of the rows.

    ``share`` and ``part`` send nothing. All other methods are called by all ranks in the same order, or by none.
    """

    rank = 0
    size = 1
    is_sharded = False
    """Weights lie in shards, one a rank: all of them take each forward and backward together."""

    @property
    def is_leader(self) -> bool:
        """Of all ranks this one writes files and speaks."""
        return self.rank == 0

    # --- who does what ---

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of the items of these sizes are this rank's, in order: the largest first, each goes to who has least
        so far."""
        loads, own = [0] * self.size, list[int]()
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            to = loads.index(min(loads))
            loads[to] += sizes[index]
            if to == self.rank:
                own.append(index)
        return sorted(own)

    def part(self, number: int) -> range:
        """Which of so many items, cut into as many stretches as there are ranks, are this rank's."""
        return range(number * self.rank // self.size, number * (self.rank + 1) // self.size)

    # --- what all know afterwards ---

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, rank after rank; JSON."""
        return [value]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of each rank, rank after rank, on the CPU. Names may differ."""
        return [dict(tensors)]

    def from_leader(self, say: Callable[[], Any]) -> Any:
        """What the leader says; JSON. The others are not asked."""
        return say()

    def tensors_from_leader(self, say: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The same of tensors on the CPU."""
        return say()

    def sums(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each number added up over the ranks that have it."""
        found: dict[str, float] = {}
        for each in self.gather(dict(numbers)):
            for name, value in each.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensors of all ranks end to end, rank after rank."""
        own = {"": torch.cat(list(parts))} if parts else {}
        return torch.cat([each[""] for each in self.gather_tensors(own) if each])

    def alike(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give all ranks the leader's numbers. Raises RanksError where they have other parameters than it."""

    # --- one step ---

    def begin_step(self, step: int) -> None:
        """The step that errors name from now on."""

    @contextmanager
    def together(self) -> Generator[None]:
        """What goes wrong inside on one rank is an error of all of them."""
        yield

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of parameters that each rank holds in whole; a rank without a gradient counts as zero, and where none has one
        none will."""
