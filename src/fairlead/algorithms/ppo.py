"""Proximal policy optimisation (Schulman et al. 2017) with a per-token KL to the reference in the reward.

Each round: sample responses to prompts, score them by text, shape the reward with the KL, estimate advantages by GAE,
then take several epochs of minibatch steps on a clipped surrogate and a clipped value loss. With one epoch, one
minibatch and nothing clipped it is advantage actor-critic (A2C).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.mixed import mixed_pass
from fairlead.algorithms.online import OnlineSettings, evaluation, learned_from, rollout_source
from fairlead.algorithms.policy import policy_terms
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped, dense
from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.ops.masked import masked_sum, whiten
from fairlead.ops.policy import clipped_value_loss
from fairlead.ops.returns import gae
from fairlead.rollout.experience import Experience
from fairlead.types import Algorithm, Mean, Metrics, Outputs, Pass, Prompt, RolloutBatch, Term


class ValueSettings(Section):
    trunk: Literal["policy", "adapter", "layers", "model"] = "policy"
    """What the value head reads: the policy's trunk, in one pass with it; an adapter of its own (needs model.adapter);
    `num_layers` last layers of its own over the policy's (needs all weights trained); or a model of its own."""
    trunk_gradient: bool = True
    """The value's loss reaches the policy's trunk."""
    num_layers: int | None = Field(default=None, ge=1)
    """With trunk: layers, how many of them."""
    start: Literal["policy", "reward"] = "policy"
    """With trunk: adapter or model, the value's adapter begins as the policy's does and its head at zero; or both as
    those of a reward that stands on the same base. With trunk: model also as a reward of all weights, of the policy's
    form and tokenizer."""
    warm_up_steps: int = Field(default=0, ge=0)
    """In the first steps the value alone learns: no advantage counts."""

    @model_validator(mode="after")
    def _go_together(self) -> ValueSettings:
        if self.trunk != "policy" and not self.trunk_gradient:
            raise ValueError("trunk_gradient=false speaks of the policy's trunk, but trunk names another")
        if (self.trunk == "layers") != (self.num_layers is not None):
            raise ValueError("trunk=layers and num_layers are given together")
        if self.start == "reward" and self.trunk not in ("adapter", "model"):
            raise ValueError("start=reward needs trunk=adapter or trunk=model")
        return self


class Settings(OnlineSettings):
    gamma: float = Field(default=1.0, ge=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    value_clip_range: float | None = Field(default=0.2, gt=0)
    value_coef: float = Field(default=0.1, ge=0)
    whiten_rewards: bool = False
    """What is rewarded at each token, KL included, is scaled to unit variance over all tokens of the round; its mean
    stays."""
    whiten_advantages: bool = True
    """Advantages of a round are scaled to mean zero and unit variance over all its tokens."""
    value: ValueSettings = ValueSettings()


def value_term(outputs: Outputs, batch: RolloutBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Clipped squared error of the values summed over response tokens; unit ``token``."""
    assert batch.values is not None and batch.returns is not None
    loss = clipped_value_loss(outputs.values, batch.values, batch.returns, value_clip_range=settings.value_clip_range)
    error = masked_sum((outputs.values.detach() - batch.returns) ** 2, batch.loss_mask)
    return masked_sum(loss, batch.loss_mask), {"values/error": Mean(error, batch.counts["token"])}


def passes(settings: Settings) -> tuple[Pass, ...]:
    """One pass where the value reads the policy's trunk, two where it has one of its own."""
    terms, needs = policy_terms(settings, settings.max_new_tokens)
    value, seen = Term("value", "token", partial(value_term, settings=settings), settings.value_coef), {"values"}
    if settings.value.trunk == "policy":
        made = [Pass("policy", (*terms, value), needs | seen, settings.temperature, batch=RolloutBatch)]
    else:
        made = [
            Pass("policy", terms, needs, settings.temperature, batch=RolloutBatch),
            Pass("value", (value,), frozenset(seen), batch=RolloutBatch),
        ]
    return (*made, *([mixed_pass(settings.mixed)] if settings.mixed is not None else []))


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings) -> Estimate:
    """Advantages and returns of a round by GAE over the shaped rewards."""
    values = dense(experience.tokens["values"])
    inside, rewards = shaped.inside, shaped.rewards
    if settings.whiten_rewards:
        rewards = whiten(rewards, inside, center=False)
    advantages, returns = gae(rewards, values, shaped.lengths, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
    error = returns[inside] - values[inside]
    explained = 1 - float(error.var() / returns[inside].var().clamp(min=1e-12)) if len(error) > 1 else 0.0
    if settings.whiten_advantages:
        advantages = whiten(advantages, inside)
    return Estimate(
        {
            "advantages": shaped.ragged(advantages),
            "returns": shaped.ragged(returns),
            "values": experience.tokens["values"],
            **learned_from(experience, settings),
        },
        {"values/explained_variance": explained},
    )


def source(stage: Stage) -> RolloutSource:
    settings: Settings = stage.settings
    return rollout_source(stage, partial(estimate, settings=settings), warm_up=settings.value.warm_up_steps)


ALGORITHM = Algorithm(
    name="ppo",
    settings=Settings,
    record=lambda _: Prompt,
    roles=lambda _: ("policy", "reference", "value"),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("objective/scores", "objective/kl", "eval/score"),
    best="eval/score",
)
