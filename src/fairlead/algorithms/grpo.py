"""Group relative policy optimisation (Shao et al., "DeepSeekMath", 2024) and what was made of it.

Dr. GRPO (Liu et al. 2025): grpo.scale=none grpo.loss_over=constant. DAPO (Yu et al. 2025): grpo.clip_range_high=0.28
grpo.loss_over=token grpo.drop=[alike, unfinished]. GSPO (Zheng et al. 2025): grpo.importance=sequence
grpo.clip_range=3e-4 grpo.clip_range_high=4e-4.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from fairlead.algorithms.groups import GroupSettings, group_passes, group_roles, spread_advantages
from fairlead.algorithms.online import evaluation, rollout_source
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped
from fairlead.algorithms.stage import Stage
from fairlead.ops.returns import group_centred
from fairlead.rollout.experience import Experience
from fairlead.types import Algorithm, Prompt


class Settings(GroupSettings):
    num_samples: int = Field(default=8, ge=2)
    epochs: int = Field(default=1, ge=1)
    """Passes over each round's responses; train.batch_size prompts, with all their responses, are a minibatch."""
    scale: Literal["group", "round", "none"] = "group"
    """What an advantage is divided by: the standard deviation of its prompt's scores, of the round's, or nothing. The
    first weighs prompts on which all responses are nearly alike more (Dr. GRPO)."""
    loss_over: Literal["token", "sequence", "constant"] = "sequence"
    """The loss is the mean over all tokens (DAPO); over responses, of their tokens' mean (GRPO); or over responses, of
    their tokens' sum / max_new_tokens (Dr. GRPO)."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the KL to the reference is charged: taken off the reward of each token, or a loss of its own."""
    kl_estimator: Literal["k1", "abs", "k2", "k3", "full"] = "k3"
    """Of the KL at a token. In the reward: k1 = log policy - log reference, its absolute value, k2 = half its square,
    or full, the exact sum over the vocabulary. In the loss: k2 or k3, weighted by policy / round's start, which gives
    the gradient of each token's KL; what a token does to the KL of those after it is charged in the reward alone."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Price of one nat of KL to the reference; 0 needs no reference."""


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings) -> Estimate:
    """Each response's reward less the mean of its prompt's, scaled."""
    rewards = shaped.rewards.sum(1).view(-1, experience.num_samples)
    advantages = group_centred(rewards, scale=settings.scale == "group").flatten()
    if settings.scale == "round":
        advantages = advantages / rewards.std().clamp(min=1e-8)
    return spread_advantages(advantages, experience, settings)


def source(stage: Stage) -> RolloutSource:
    return rollout_source(stage, partial(estimate, settings=stage.settings))


ALGORITHM = Algorithm(
    name="grpo",
    settings=Settings,
    record=lambda _: Prompt,
    roles=group_roles,
    passes=group_passes,
    source=source,
    evaluation=evaluation,
    headline=("objective/scores", "objective/scores_std", "eval/score"),
    best="eval/score",
)
