"""Sampled responses, how they are drawn, and what judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fairlead.types.records import Prompt


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response. Per-token tuples speak about ``response_ids``."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Ends with the end-of-sequence token or the last token of a stop string when ``finished``."""
    behaviour_logprobs: tuple[float, ...]
    """Of the distribution drawn from: tempered, and renormalised over what could be drawn."""
    finished: bool
    text: str
    """The response as a person reads it: special tokens and stop strings left out, spaces around it stripped."""
    kept: tuple[tuple[int, ...], ...] | None = None
    """The tokens each one was drawn from (empty: the whole vocabulary); none where no token was cut by top-k or
    top-p."""
    banned: tuple[int, ...] | None = None
    """The one token that could not be drawn (the end of sequence before ``min_new_tokens``), or -1; none where no token
    was banned."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a response. ``top_k = 0`` and ``top_p = 1`` draw from the whole distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    """The end of sequence cannot be drawn before so many tokens."""
    shortest_limit: int | None = None
    """Each response has a limit of its own, drawn from here to ``max_new_tokens``, both included."""
    stop: tuple[str, ...] = ()
    """Texts that end a response where they first occur."""


class Sampler(Protocol):
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling,
        key: tuple[int | str, ...],
        first_item: int = 0,
        num_samples: int = 1,
    ) -> list[Rollout]:
        """``num_samples`` responses a prompt, those of one prompt side by side. The draws of response ``j`` to prompt
        ``i`` depend on ``key`` and ``(first_item + i) * num_samples + j`` alone."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """What a reward says about some rollouts."""

    values: tuple[float, ...]
    """A finite number for each; of a dense reward the sum over its tokens."""
    tokens: tuple[tuple[float, ...], ...] | None = None
    """Of a dense reward: one number a token of the response, whose sum is its value."""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    """Of several sources together: what each says itself, by name, before its weight."""


class Reward(Protocol):
    name: str

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        """Judges by text. Raises TrainingError, which names the source and a sample, for what is no finite number."""
        ...
