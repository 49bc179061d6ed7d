"""REINFORCE with a leave-one-out baseline (Ahmadian et al., "Back to Basics", 2024): no value model; a response is
compared with the others to the same prompt, and the whole response is one action."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from fairlead.algorithms.groups import GroupSettings, group_passes, group_roles, spread_advantages
from fairlead.algorithms.online import evaluation, rollout_source
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped
from fairlead.algorithms.stage import Stage
from fairlead.ops.returns import leave_one_out
from fairlead.rollout.experience import Experience
from fairlead.types import Algorithm, Prompt


class Settings(GroupSettings):
    num_samples: int = Field(default=4, ge=2)
    epochs: int = Field(default=1, ge=1)
    """Passes over each round's responses; train.batch_size prompts, with all their responses, are a minibatch."""
    normalize_advantages: bool = False
    """Advantages of a round are scaled to mean zero and unit variance over its responses."""


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings) -> Estimate:
    """Each response's reward, KL included, less the mean of the others'."""
    rewards = shaped.rewards.sum(1)
    advantages = leave_one_out(rewards.view(-1, experience.num_samples)).flatten()
    if settings.normalize_advantages and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / advantages.std().clamp(min=1e-8)
    return spread_advantages(advantages, experience, settings)


def source(stage: Stage) -> RolloutSource:
    return rollout_source(stage, partial(estimate, settings=stage.settings))


ALGORITHM = Algorithm(
    name="rloo",
    settings=Settings,
    record=lambda _: Prompt,
    roles=group_roles,
    passes=group_passes,
    source=source,
    evaluation=evaluation,
    headline=("objective/scores", "objective/kl", "eval/score"),
    best="eval/score",
)
