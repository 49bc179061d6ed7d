"""What every engine makes of `Sampling`: how logits become what is drawn from, where a response ends at the latest, and
the rollout of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairlead.data.render import Renderer
from fairlead.ops.sampling import keep_top, keyed_uniform
from fairlead.rollout.stops import stop_length, text_before
from fairlead.types import Prompt, Rollout, Sampling

LIMIT_DRAW = 2
"""Of a response's own limit, beside the two draws of each token."""


@dataclass(slots=True)
class Response:
    """What was drawn for one item."""

    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    kept: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    """Where tokens were cut: what each one was drawn from."""
    stopped: bool = False
    """The last token completes a stop string."""


def cuts(sampling: Sampling) -> bool:
    """Whether tokens are drawn from less than the vocabulary."""
    return sampling.top_k > 0 or sampling.top_p < 1.0


def limits(key: int, items: Tensor, sampling: Sampling) -> Tensor:
    """Tokens after which each response ends [R]: all alike, or drawn from ``shortest_limit`` to ``max_new_tokens``."""
    shortest = sampling.max_new_tokens if sampling.shortest_limit is None else sampling.shortest_limit
    uniforms = keyed_uniform(key, items, torch.zeros_like(items), LIMIT_DRAW)
    return shortest + (uniforms * (sampling.max_new_tokens - shortest + 1)).long()


def shaped(logits: Tensor, sampling: Sampling, eos: int, early: int) -> Tensor:
    """Logits [R, V], changed in place, as they are drawn from; in the first ``early`` rows a response cannot end."""
    if sampling.temperature != 1.0:
        logits.div_(sampling.temperature)
    if early:
        logits[:early, eos] = -torch.inf
    return keep_top(logits, top_k=sampling.top_k, top_p=sampling.top_p) if cuts(sampling) else logits


def ended(renderer: Renderer, sampling: Sampling, ids: list[int], limit: int) -> Response:
    """What of the tokens of a row is its response: up to the first end of sequence, stop string, or the limit."""
    ids = ids[:limit]
    if renderer.eos in ids:
        ids = ids[: ids.index(renderer.eos) + 1]
    length = stop_length(renderer, sampling.stop, ids) if sampling.stop else None
    return Response(ids[:length], stopped=length is not None)


def rollout(
    renderer: Renderer, sampling: Sampling, prompt: Prompt, prompt_ids: tuple[int, ...], drawn: Response
) -> Rollout:
    number, early = len(drawn.ids), min(len(drawn.ids), sampling.min_new_tokens)
    return Rollout(
        prompt,
        prompt_ids,
        tuple(drawn.ids),
        tuple(drawn.logprobs),
        drawn.stopped or drawn.ids[-1] == renderer.eos,
        text_before(renderer, sampling.stop, drawn.ids) if drawn.stopped else renderer.decode(drawn.ids),
        tuple(drawn.kept) if cuts(sampling) else None,
        (*[renderer.eos] * early, *[-1] * (number - early)) if early else None,
    )
