"""DPO on the policy's own responses: of several to each prompt a reward makes a pair, and the pair is learned by any
loss of the family. With one short round a step it is online DPO (Guo et al. 2024), with long rounds, several passes
over each and the round's start as reference it is iterative DPO (Xiong et al. 2024; LMFlow)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fairlead.algorithms.dpo import LossSettings, loss_pass
from fairlead.algorithms.online import SamplingSettings, collecting, evaluation
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped, Shaper, Unshaped
from fairlead.algorithms.stage import Stage
from fairlead.data.pack import preference_batch
from fairlead.data.render import Tree
from fairlead.ops.sampling import permutation, stream_key
from fairlead.rollout.experience import Experience
from fairlead.rollout.screen import ScreenSettings, share_empty
from fairlead.types import Algorithm, Pass, PreferenceBatch, Prompt, Support

Way = Literal["max_min", "max_max", "max_random", "random"]


class Settings(LossSettings, SamplingSettings, ScreenSettings):
    num_samples: int = Field(default=2, ge=2)
    """Responses to each prompt of a round."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each round's pairs; train.batch_size pairs are a step."""
    pairs: Way = "max_min"
    """Which two of a prompt's responses are its pair: the best and the worst, the best two, the best and any other, or
    any two. A tie makes none."""
    reference: Literal["start", "round"] = "start"
    """start: the model the run began with; round: the policy as it was when the round began, which needs no second
    model."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Taken off the score of a response that was cut at its limit."""


def pair(keys: Tensor, way: Way, key: int) -> tuple[int, int] | None:
    """(chosen, rejected) of the responses to one prompt by their ``keys`` [K], nan for one that was discarded; of
    equals the first is the better one. ``key`` draws what is random. None for a tie, and where fewer than two are
    left."""
    left = [i for i, value in enumerate(map(float, keys)) if not math.isnan(value)]
    if len(left) < 2:
        return None
    ranked = sorted(left, key=lambda i: -float(keys[i]))
    if way == "random":
        first, second = sorted(permutation(key, len(ranked))[:2])
    else:
        first, second = 0, {"max_min": -1, "max_max": 1, "max_random": 1 + permutation(key, len(ranked) - 1)[0]}[way]
    chosen, rejected = ranked[first], ranked[second]
    return (chosen, rejected) if keys[chosen] > keys[rejected] else None


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings, seed: int) -> Estimate:
    """The pair of each prompt, with what its loss reads of both: their scores and the reference's
    log-probabilities."""
    scores, numbers = shaped.scores, [len(tree.responses) for tree in experience.trees]
    empty = share_empty(~scores.isnan(), numbers, settings, experience.discarded)
    found = [
        pair(keys, settings.pairs, stream_key(seed, "pairs", experience.number, prompt))
        for prompt, keys in enumerate(experience.by_prompt(scores))
    ]
    made = [(start, each) for start, each in zip(accumulate(numbers, initial=0), found, strict=False) if each]
    chosen, rejected = (torch.tensor([start + each[side] for start, each in made], dtype=torch.long) for side in (0, 1))
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[chosen] = keep[rejected] = True
    reference = "reference_logprobs" if settings.reference == "start" else "behaviour_logprobs"
    metrics = {"online_dpo/pairs": len(chosen) / len(found), "online_dpo/prompts_without": empty}
    if settings.reference == "round":
        metrics["rewards/fresh_reference"] = 1.0
    if len(chosen):
        metrics |= {
            "online_dpo/chosen_scores": float(scores[chosen].mean()),
            "online_dpo/rejected_scores": float(scores[rejected].mean()),
        }
    tokens = {"scores": list(scores[:, None]), "reference_logprobs": experience.tokens[reference]}
    return Estimate(tokens, metrics, keep)


def collate(
    trees: Sequence[Tree],
    tokens: Mapping[str, Sequence[Tensor]],
    *,
    packed: bool,
    pad_id: int,
    support: Support | None = None,
) -> PreferenceBatch:
    """Pairs, the better response of each told by its score."""
    batch = preference_batch(trees, packed=packed, pad_id=pad_id, reference_logprobs=tokens["reference_logprobs"])
    scores = torch.cat(list(tokens["scores"])).view(-1, 2)
    first, better = 2 * torch.arange(len(trees)), scores.argmax(1)
    lengths = torch.tensor([[len(response) for response in tree.responses] for tree in trees])
    counts = batch.counts | {"chosen_token": float(lengths.gather(1, better[:, None]).sum())}
    return replace(
        batch,
        chosen=first + better,
        rejected=first + 1 - better,
        margin=scores.amax(1) - scores.amin(1),
        counts=counts,
        support=support,
    )


def passes(settings: Settings) -> tuple[Pass, ...]:
    """At the sampling temperature, and over what could be drawn: the distribution that the reward has judged."""
    return (loss_pass(settings, temperature=settings.temperature),)


def source(stage: Stage) -> RolloutSource:
    settings: Settings = stage.settings
    prompts, collector = collecting(stage)
    shaper = Shaper(Unshaped(missing_eos_penalty=settings.missing_eos_penalty))
    chosen = partial(estimate, settings=settings, seed=stage.recipe.seed)
    return RolloutSource(stage, collector, prompts, shaper, chosen, collate=collate)


def roles(settings: Any) -> tuple[str, ...]:
    return ("policy", "reference") if settings.reference == "start" else ("policy",)


ALGORITHM = Algorithm(
    name="online_dpo",
    settings=Settings,
    record=lambda _: Prompt,
    roles=roles,
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("online_dpo/chosen_scores", "rewards/margins", "eval/score"),
    best="eval/score",
)
