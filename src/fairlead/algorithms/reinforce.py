"""REINFORCE++ (Hu et al. 2025): PPO's clipped surrogate without a value model; the advantage of a token is what is
rewarded from there on, KL included, less the round's mean over its spread."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from fairlead.algorithms.groups import GroupSettings, group_passes, group_roles, kept, learned_from
from fairlead.algorithms.online import evaluation, rollout_source
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped
from fairlead.algorithms.stage import Stage
from fairlead.errors import ConfigError
from fairlead.ops.masked import whiten
from fairlead.ops.returns import group_centred, rewards_to_go
from fairlead.rollout.experience import Experience
from fairlead.types import Algorithm, Prompt


class Settings(GroupSettings):
    gamma: float = Field(default=1.0, ge=0, le=1)
    group_baseline: bool = False
    """The mean score of the prompt's responses is taken off first (REINFORCE++-baseline)."""


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings) -> Estimate:
    rewards = shaped.rewards
    if settings.group_baseline:
        scores = shaped.scores.view(-1, experience.num_samples)
        rewards = rewards.clone()
        last = shaped.lengths - 1
        rewards[range(len(last)), last] += (group_centred(scores, scale=False) - scores).flatten()
    advantages = whiten(rewards_to_go(rewards, gamma=settings.gamma), shaped.inside)
    tokens = {"advantages": shaped.ragged(advantages), **learned_from(experience, settings)}
    return Estimate(tokens, {}, kept(experience, settings))


def source(stage: Stage) -> RolloutSource:
    settings: Settings = stage.settings
    if settings.group_baseline and settings.num_samples < 2:
        raise ConfigError(
            f"reinforce.group_baseline=true compares the responses to a prompt, and num_samples={settings.num_samples}",
            hint="reinforce.num_samples=4",
        )
    return rollout_source(stage, partial(estimate, settings=settings))


ALGORITHM = Algorithm(
    name="reinforce",
    settings=Settings,
    record=lambda _: Prompt,
    roles=group_roles,
    passes=group_passes,
    source=source,
    evaluation=evaluation,
    headline=("objective/scores", "objective/kl", "eval/score"),
    best="eval/score",
)
