"""What flows through Fairlead: records, batches, outputs, metrics, and the protocols between the rooms.

Shape legend, used in every docstring:

    B rows   T tokens of a row   S sequences of a batch   P pairs (S = 2P)   V vocabulary   H hidden

Token alignment. Index ``t`` always speaks about ``input_ids[:, t]``: ``logprobs[:, t]`` is its log-probability given
what precedes it and ``values[:, t]`` the value *before* emitting it. Every per-token tensor is [B, T].

A row is a forest of runs. A run is a stretch of tokens; its parent is the run it continues; runs stand in depth-first
order. A packed row holds many runs without parents; a preference pair is a prompt run with two children.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Literal, NotRequired, Protocol, Self, TypedDict, TypeVar

import torch
from torch import Tensor


class Message(TypedDict):
    """One turn of a conversation; ``role`` is system, user, assistant or tool."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    """What the assistant thought before it answered, where the data set keeps it apart."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """As transformers' chat templates take them: {"type": "function", "function": {"name", "arguments"}}."""
    counts: NotRequired[bool]
    """False for an assistant turn that is context only, never learned."""


Conversation = str | Sequence[Message]
"""A prompt: plain text (one user turn), or the turns before the response."""


# --- records: what a data set holds --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; every token counts."""

    text: str


Tools = tuple[Mapping[str, Any], ...]
"""Function descriptions (JSON schema), handed to the chat template."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response worth imitating. A ``Message`` where it is more than text: a tool call, or reasoning kept apart."""

    prompt: Conversation
    response: str | Message
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """Two responses to one prompt; ``margin`` says by how much ``chosen`` is better, in units of the reward."""

    prompt: Conversation
    chosen: str
    rejected: str
    margin: float | None = None
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Ranking:
    """Responses to one prompt, best first; ``scores``, as many and falling, where the data set has them. Equal scores
    are ties."""

    prompt: Conversation
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """One response and whether it is a good one. The prompt may be empty: a review and its sentiment."""

    prompt: Conversation
    response: str
    label: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to sample from; ``columns`` are the row's other fields, handed to the reward."""

    prompt: Conversation
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools: Tools = ()


Record = Text | Demonstration | Preference | Ranking | Labelled | Prompt


# --- batches: what a model call takes ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows of runs. ``visible(i, j) = j <= i < subtree_end[j]`` says which token attends to which."""

    input_ids: Tensor
    """[B, T] token ids."""
    position_ids: Tensor
    """[B, T] a child run continues its parent's positions."""
    subtree_end: Tensor
    """[B, T] exclusive end of the token's subtree, in the row; 0 for padding, which nothing sees."""
    previous: Tensor
    """[B, T] index in the row of the token this one is predicted from; -1 for none."""
    loss_mask: Tensor
    """[B, T] bool: the tokens that count. Never true where ``previous`` is -1."""
    sequence_ids: Tensor
    """[B, T] 0..S-1; -1 for padding and for runs shared by several sequences."""
    sequence_ends: Tensor
    """[S] index of each sequence's last token in the flattened [B * T]."""
    counts: dict[str, float]
    """How much of each unit the batch holds: token, sequence, pair ..."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], kw_only=True)
    """What `Pass.prepare` found over all micro-batches of the step, for losses that couple them."""

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        statistics = {name: value.to(device, non_blocking=True) for name, value in self.statistics.items()}
        return replace(self, **moved, statistics=statistics)

    @property
    def num_sequences(self) -> int:
        return self.sequence_ends.shape[0]

    @property
    def num_tokens(self) -> int:
        """Real tokens: neither padding nor counted twice where a prompt is shared."""
        return int((self.subtree_end > 0).sum())


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceBatch(TokenBatch):
    """Pairs of sequences of one prompt; of a ranking every pair that is no tie. ``counts`` also holds ``pair`` and
    ``chosen_token``."""

    chosen: Tensor
    """[P] sequence index of the chosen response."""
    rejected: Tensor
    """[P] sequence index of the rejected response."""
    margin: Tensor | None = None
    """[P] or none."""
    reference_logprobs: Tensor | None = None
    """[B, T] log-probabilities of the reference, zero off the mask; none where no reference is used."""


@dataclass(frozen=True, slots=True, eq=False)
class RankingBatch(PreferenceBatch):
    """Rankings: the responses to one prompt stand side by side, the best first."""

    group: Tensor = field(kw_only=True)
    """[S] which ranking a sequence belongs to, 0..G-1; ``counts`` also holds ``ranking``."""
    level: Tensor = field(kw_only=True)
    """[S] place in the ranking, from 0 for the best; equal places are ties."""
    rating: Tensor | None = None
    """[S] the score the data set gives, or none."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledBatch(TokenBatch):
    """Single responses, each good or bad."""

    label: Tensor
    """[S] bool"""
    reference_logprobs: Tensor | None = None
    """[B, T] as of pairs."""
    mismatched: LabelledBatch | None = None
    """The same prompts, each with a response to another one."""


@dataclass(frozen=True, slots=True, eq=False)
class RolloutBatch(TokenBatch):
    """Sampled responses and what was computed about them when the round began; [B, T] are zero off the mask."""

    behaviour_logprobs: Tensor
    """[B, T] log-probabilities of the policy that sampled, at the sampling temperature."""
    reference_logprobs: Tensor
    """[B, T]"""
    values: Tensor
    """[B, T] value before emitting the token, when the round began."""
    advantages: Tensor
    """[B, T]"""
    returns: Tensor
    """[B, T] target of the value."""
    scores: Tensor
    """[S] what the reward source returned."""
    finished: Tensor
    """[S] bool: the response ended by itself and was not cut."""


class Outputs:
    """What a model call returns; asking for what was not computed is an error of the programmer."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def has(self, name: str) -> bool:
        return name in self._tensors

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise AttributeError(f"this pass did not compute {name!r}; its Pass.needs lists {sorted(self._tensors)}")
        return self._tensors[name]

    @property
    def logprobs(self) -> Tensor:
        """[B, T] natural log; zero off the mask."""
        return self._get("logprobs")

    @property
    def entropy(self) -> Tensor:
        """[B, T] nats; zero off the mask."""
        return self._get("entropy")

    @property
    def values(self) -> Tensor:
        """[B, T] zero off the mask."""
        return self._get("values")

    @property
    def scores(self) -> Tensor:
        """[S] the reward head at each sequence's last token."""
        return self._get("scores")

    @property
    def collision(self) -> Tensor:
        """[B, T] log of the probability that two draws agree; zero off the mask; without gradient."""
        return self._get("collision")

    @property
    def mean_logit(self) -> Tensor:
        """[B, T] mean of the logits over the vocabulary; zero off the mask; without gradient."""
        return self._get("mean_logit")


# --- metrics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mean:
    """A sum and what it is a sum of: the only metric type. Adds across micro-batches and processes."""

    sum: Tensor | float
    count: Tensor | float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; nan when nothing was counted."""
        count = float(self.count)
        return float(self.sum) / count if count else float("nan")


Metrics = dict[str, Mean]


# --- algorithms ----------------------------------------------------------------------------------------------------

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


Prepare = Callable[[Call, Sequence[Any]], Sequence[Any]]
"""The micro-batches of a step, with ``statistics`` filled in."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward of one role; ``needs`` names the fields of ``Outputs`` to compute."""

    role: str
    terms: tuple[Term, ...]
    needs: frozenset[str]
    temperature: float = 1.0
    prepare: Prepare | None = None
    """Asked before the first backward pass of a step, for what depends on all of its micro-batches."""


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

    def take_metrics(self) -> dict[str, float]:
        """What the source measured since the last call (a rollout's scores, say); emptied by the call."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response. Per-token lists speak about ``response_ids``."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Ends with the end-of-sequence token when ``finished``."""
    behaviour_logprobs: tuple[float, ...]
    finished: bool
    text: str
    """The response as a person reads it: special tokens left out, spaces around it stripped."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a response. ``top_k = 0`` and ``top_p = 1`` draw from the whole distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Sampler(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, key: tuple[int | str, ...], first_item: int = 0
    ) -> list[Rollout]:
        """One response a prompt; the draws of prompt ``i`` depend on ``key`` and ``first_item + i`` alone."""
        ...


class Reward(Protocol):
    name: str

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """A finite score for each rollout, judged by text."""
        ...


# --- observers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """What an observer is told after each optimizer step."""

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    tokens: int
    """Real tokens trained on since the run began."""
    seconds: float
    """Seconds of training since the run began, earlier processes of the same run counted in."""


class Observer(Protocol):
    """Told of every step; may raise to stop the run. Never changes what is trained."""

    def after_step(self, progress: Progress) -> None: ...

    def close(self) -> None:
        """Called once, also when the run fails."""
        ...


class Sink(Protocol):
    """Takes metrics to a tracker. A sink that cannot start raises; a failing log line never stops the run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


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
