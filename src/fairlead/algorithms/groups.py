"""What the algorithms without a value model share: one pass, a reference only where its KL is charged, and the choice
of the responses that are learned from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fairlead.algorithms.mixed import mixed_pass
from fairlead.algorithms.online import OnlineSettings, learned_from
from fairlead.algorithms.policy import policy_terms
from fairlead.algorithms.rounds import Estimate
from fairlead.rollout.experience import Experience
from fairlead.types import Pass, RolloutBatch


class GroupSettings(OnlineSettings):
    drop: tuple[Literal["alike", "unfinished"], ...] = ()
    """Responses that are not learned from: those to a prompt whose responses all score alike, those cut at their limit
    (DAPO)."""


def group_roles(settings: GroupSettings) -> tuple[str, ...]:
    return ("policy", "reference") if settings.kl_coef else ("policy",)


def group_passes(settings: GroupSettings) -> tuple[Pass, ...]:
    terms, needs = policy_terms(settings, settings.max_new_tokens)
    mixed = [] if settings.mixed is None else [mixed_pass(settings.mixed)]
    return (Pass("policy", terms, needs, settings.temperature, batch=RolloutBatch), *mixed)


def spread_advantages(advantages: Tensor, experience: Experience, settings: GroupSettings) -> Estimate:
    """One advantage a response [S], the same at each of its tokens."""
    rows = [advantage.repeat(length) for advantage, length in zip(advantages, experience.lengths, strict=True)]
    keep = kept(experience, settings)
    alike = ~_told_apart(experience)
    metrics = {
        "rollout/alike": float(alike.float().mean()),
        **({} if keep is None else {"rollout/dropped": 1 - float(keep.float().mean())}),
    }
    return Estimate({"advantages": rows, **learned_from(experience, settings)}, metrics, keep)


def kept(experience: Experience, settings: GroupSettings) -> Tensor | None:
    """[S] bool: the responses that are learned from; none: all."""
    keep = torch.ones(len(experience.scores), dtype=torch.bool)
    if "alike" in settings.drop:
        keep &= _told_apart(experience).repeat_interleave(experience.num_samples)
    if "unfinished" in settings.drop:
        keep &= experience.finished
    return None if bool(keep.all()) else keep


def _told_apart(experience: Experience) -> Tensor:
    """[P] bool: the scores of the prompt's responses differ."""
    scores = experience.scores.view(-1, experience.num_samples)
    return scores.amax(1) > scores.amin(1)
