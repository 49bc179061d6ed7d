"""What a data set holds: one kind of record for each way to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict


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
    finished: bool = True
    """False for a sampled response that was cut at its limit: no end is learned."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two responses to one prompt; ``margin`` says by how much ``chosen`` is better, in units of the reward."""

    prompt: Conversation
    chosen: str
    rejected: str
    margin: float | None = None
    tools: Tools = ()
    finished: tuple[bool, bool] = (True, True)
    """Of chosen and rejected; False for a sampled response that was cut at its limit, which has no end."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Responses to one prompt, best first; ``scores``, as many and falling, where the data set has them. Equal scores
    are ties. One response alone is rated, not ranked."""

    prompt: Conversation
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    attributes: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict[str, tuple[float | None, ...]])
    """Scores of each response by what is judged (helpful, harmless ...), none where one was not."""


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
    answer: str | Message | None = field(default=None, compare=False)
    """A good answer, where the row it was taken from holds one; what a policy thinks of it is measured."""


Record = Text | Demonstration | Preference | Ranking | Labelled | Prompt
