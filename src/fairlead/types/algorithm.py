"""What an algorithm is: passes, their terms, and a source of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from fairlead.types.batches import TokenBatch
from fairlead.types.outputs import Metrics, Outputs
from fairlead.types.ranks import Ranks
from fairlead.types.records import Record

B = TypeVar("B", bound=TokenBatch, contravariant=True)


class LossFn(Protocol[B]):
    """Sums a per-example loss over its mask; the loop divides by the global count of the term's unit."""

    def __call__(self, outputs: Outputs, batch: B, /) -> tuple[Tensor, Metrics]: ...


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of the loss: ``weight * fn(...) / (global count of unit)``."""

    name: str
    unit: str
    fn: LossFn[Any]
    weight: float = 1.0


class Call(Protocol):
    def __call__(self, batch: TokenBatch, needs: frozenset[str], /, *, role: str | None = None) -> Outputs:
        """A forward without gradients, of the role of the pass or another."""
        ...


Prepare = Callable[[Call, Sequence[Any], Ranks], Sequence[Any]]
"""This process's micro-batches of a step, with ``statistics`` of all processes' filled in."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward of one role; ``needs`` names the fields of ``Outputs`` to compute."""

    role: str
    terms: tuple[Term, ...]
    needs: frozenset[str]
    temperature: float = 1.0
    prepare: Prepare | None = None
    """Asked before the first backward pass of a step, for what depends on all of its micro-batches."""
    uniform: bool = False
    """Its loss weighs all counted tokens alike, which saves computing their logits twice."""
    batch: type[TokenBatch] = TokenBatch
    """The micro-batches it is for, where a step holds several kinds."""


class Source(Protocol):
    """Yields the micro-batches of one optimizer step after the other, from where its state says."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps from the start of the run to its end."""
        ...

    def __iter__(self) -> Iterator[list[TokenBatch]]: ...

    def remake(self) -> list[TokenBatch]:
        """The micro-batches of the last step again, within the token budget as it is now."""
        ...

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Told what the step measured; returns what the source itself measured since the last call (a rollout's
        scores, say)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """How the optimizer takes a step, where the source has a say in it."""

    rate: float = 1.0
    """Times the scheduled learning rate."""
    fresh: bool = False
    """It forgets its state first."""


@runtime_checkable
class Rounds(Protocol):
    """A source that walks in rounds, each of which may begin the optimizer anew, and which may end before its planned
    number of steps."""

    @property
    def pace(self) -> Pace:
        """Of the step whose micro-batches came last."""
        ...

    @property
    def ended(self) -> str:
        """Why the run ends early, in words; empty where it does not."""
        ...


C = TypeVar("C")
ReferenceUse = Literal["live", "first", "moving"]
"""live: at any time, and it never changes; first: before the first step alone, so the model as it was loaded serves and
no copy is kept; moving: at any time, and it follows the policy."""


@dataclass(frozen=True, slots=True)
class Algorithm(Generic[C]):
    """An algorithm is passes and a batch source; both are given a ``fairlead.algorithms.stage.Stage``."""

    name: str
    settings: type[C]
    """The pydantic model of the recipe's section that bears the algorithm's name."""
    record: Callable[[C], type[Record]]
    """The kind of record it learns from."""
    roles: Callable[[C], Iterable[str]]
    """The roles the run needs, of policy, reference, reward, value."""
    passes: Callable[[C], tuple[Pass, ...]]
    source: Callable[[Any], Source]
    evaluation: Callable[[Any], Callable[[], dict[str, float]]]
    """Prepares the held-out records once; each call then measures them: metrics named ``eval/...``."""
    headline: tuple[str, str, str]
    """The three metrics that matter, for the console."""
    best: str = "eval/loss"
    """The held-out metric that says which checkpoint is best; losses and perplexities are better when smaller."""
    compares: bool = True
    """Roles are compared with one another, so dropout is off in all of them."""
    reference: Callable[[C], ReferenceUse] = lambda _: "live"
    """When the reference is asked."""
