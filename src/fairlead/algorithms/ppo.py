"""Proximal policy optimisation (Schulman et al. 2017) with a per-token KL to the reference in the reward.

Each round: sample a response to each prompt, score it by text, shape the reward with the KL, estimate advantages by
GAE, then take several epochs of minibatch steps on a clipped surrogate and a clipped value loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.pack import best_fit, micro_batches, rollout_batch
from fairlead.data.render import Tree
from fairlead.errors import CheckpointError, ConfigError
from fairlead.ops.kl import k1, k3
from fairlead.ops.masked import masked_sum, whiten
from fairlead.ops.policy import clipped_surrogate, clipped_value_loss, is_clipped
from fairlead.ops.returns import gae, shaped_rewards
from fairlead.ops.sampling import permutation, stream_key
from fairlead.rollout.experience import Collector, Experience, measure_tokens
from fairlead.rollout.native import NativeSampler
from fairlead.rollout.rewards import open_reward
from fairlead.rollout.store import RolloutStore
from fairlead.types import (
    Algorithm,
    Mean,
    Metrics,
    Outputs,
    Pass,
    Prompt,
    Reward,
    RolloutBatch,
    Sampling,
    Term,
    TokenBatch,
)


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
    those of a reward that stands on the same base."""

    @model_validator(mode="after")
    def _go_together(self) -> ValueSettings:
        if self.trunk != "policy" and not self.trunk_gradient:
            raise ValueError("trunk_gradient=false speaks of the policy's trunk, but trunk names another")
        if (self.trunk == "layers") != (self.num_layers is not None):
            raise ValueError("trunk=layers and num_layers are given together")
        if self.start == "reward" and self.trunk not in ("adapter", "model"):
            raise ValueError("start=reward needs trunk=adapter or trunk=model")
        return self


class Settings(Section):
    reward: str | None = None
    """A reward run or folder, or `module:function` with trlX's signature (samples, prompts, outputs, **columns)."""
    watch: dict[str, str] = Field(default_factory=dict[str, str])
    """More rewards by name, measured on the held-out prompts and never optimised."""
    rollout_size: int = Field(default=128, ge=1)
    """Prompts of one round."""
    rollout_rows: int = Field(default=64, ge=1)
    """Prompts decoded together and saved as one chunk."""
    epochs: int = Field(default=4, ge=1)
    """Passes over each round's responses; train.batch_size is the minibatch."""
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    kl_coef: float = Field(default=0.05, ge=0)
    """Price of one nat of KL to the reference, in units of the reward."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    clip_range: float = Field(default=0.2, gt=0)
    value_clip_range: float | None = Field(default=0.2, gt=0)
    value_coef: float = Field(default=0.1, ge=0)
    whiten_advantages: bool = True
    """Advantages of a round are scaled to mean zero and unit variance over all its tokens."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Taken off the score of a response that was cut at max_new_tokens."""
    value: ValueSettings = ValueSettings()
    num_eval_prompts: int = Field(default=64, ge=1)
    """Held-out prompts sampled at each evaluation."""


def policy_term(outputs: Outputs, batch: RolloutBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Clipped surrogate summed over response tokens; unit ``token``."""
    mask, clip_range = batch.loss_mask, settings.clip_range
    inputs = outputs.logprobs, batch.behaviour_logprobs, batch.advantages
    loss = masked_sum(clipped_surrogate(*inputs, clip_range=clip_range), mask)
    tokens = batch.counts["token"]
    drift = k3(batch.behaviour_logprobs, outputs.logprobs.detach())
    return loss, {
        "policy/clip_fraction": Mean(masked_sum(is_clipped(*inputs, clip_range=clip_range).float(), mask), tokens),
        "policy/approx_kl": Mean(masked_sum(drift, mask), tokens),
        "policy/entropy": Mean(masked_sum(outputs.entropy.detach(), mask), tokens),
        "policy/ratio": Mean(masked_sum((outputs.logprobs.detach() - batch.behaviour_logprobs).exp(), mask), tokens),
    }


def value_term(outputs: Outputs, batch: RolloutBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Clipped squared error of the values summed over response tokens; unit ``token``."""
    loss = clipped_value_loss(outputs.values, batch.values, batch.returns, value_clip_range=settings.value_clip_range)
    error = masked_sum((outputs.values.detach() - batch.returns) ** 2, batch.loss_mask)
    return masked_sum(loss, batch.loss_mask), {"value/error": Mean(error, batch.counts["token"])}


def passes(settings: Settings) -> tuple[Pass, ...]:
    """One pass where the value reads the policy's trunk, two where it has one of its own."""
    policy = Term("policy", "token", partial(policy_term, settings=settings))
    value = Term("value", "token", partial(value_term, settings=settings), settings.value_coef)
    seen = frozenset({"logprobs", "entropy"})
    if settings.value.trunk != "policy":
        return (
            Pass("policy", (policy,), seen, settings.temperature),
            Pass("value", (value,), frozenset({"values"})),
        )
    return (Pass("policy", (policy, value), seen | {"values"}, settings.temperature),)


class RolloutSource:
    """Rounds of experience as a source of optimizer steps; its state is the step and the current round's hash."""

    def __init__(self, stage: Stage, collector: Collector, prompts: list[Prompt]) -> None:
        self._settings: Settings = stage.settings
        self._stage, self._collector, self._prompts = stage, collector, prompts
        train = stage.recipe.train
        self._round_size = min(self._settings.rollout_size, len(prompts))
        self._batch_size = train.batch_size
        self._minibatches = math.ceil(self._round_size / train.batch_size)
        self._steps_per_round = self._settings.epochs * self._minibatches
        rounds = max(1, round(train.epochs * len(prompts) / self._round_size))
        self.num_steps = train.steps if train.steps is not None else rounds * self._steps_per_round
        self._step, self._digest, self._metrics = 0, "", dict[str, float]()

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        while self._step < self.num_steps:
            number, within = divmod(self._step, self._steps_per_round)
            experience, digest = self._collector.collect(number, self._round_prompts(number))
            if within and digest != self._digest:
                raise CheckpointError(f"round {number} of the rollouts is not the one the checkpoint was made with")
            self._digest = digest
            tokens, sequences, measured = advantages(experience, self._settings)
            self._metrics = {} if within else measured
            for position in range(within, self._steps_per_round):
                if self._step == self.num_steps:
                    return
                self._step += 1
                self._remake = partial(self._minibatch, number, position, experience, tokens, sequences)
                yield self._remake()

    def remake(self) -> list[TokenBatch]:
        return self._remake()

    def _minibatch(
        self,
        number: int,
        position: int,
        experience: Experience,
        tokens: Mapping[str, list[Tensor]],
        sequences: Mapping[str, Tensor],
    ) -> list[TokenBatch]:
        epoch, index = divmod(position, self._minibatches)
        seed = self._stage.recipe.seed
        order = permutation(stream_key(seed, "minibatch", number, epoch), len(experience.trees))
        chosen = order[index * self._batch_size : (index + 1) * self._batch_size]
        packed = self._stage.packed
        sizes = [experience.trees[i].num_tokens for i in chosen]
        budget = self._stage.budget.tokens
        groups = best_fit(sizes, budget) if packed else micro_batches(sizes, budget, packed=False)
        picked = [[chosen[i] for i in group] for group in groups]
        return [
            rollout_batch(
                [experience.trees[i] for i in group],
                {name: [rows[i] for i in group] for name, rows in tokens.items()},
                {name: values[group] for name, values in sequences.items()},
                packed=packed,
                pad_id=self._stage.pad_id,
            )
            for group in picked
        ]

    def _round_prompts(self, number: int) -> list[Prompt]:
        """The next prompts of an endless walk, each epoch of it in its own keyed order."""
        count, chosen = len(self._prompts), list[Prompt]()
        at = number * self._round_size
        while len(chosen) < self._round_size:
            epoch, position = divmod(at, count)
            order = permutation(stream_key(self._stage.recipe.seed, "prompts", epoch), count)
            part = order[position : position + self._round_size - len(chosen)]
            chosen += [self._prompts[i] for i in part]
            at += len(part)
        return chosen

    def after_step(self, _: Mapping[str, float]) -> dict[str, float]:
        metrics, self._metrics = self._metrics, {}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "rollout": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._digest = int(state["step"]), str(state["rollout"])


def advantages(
    experience: Experience, settings: Settings
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor], dict[str, float]]:
    """Per-token tensors, per-sequence tensors and metrics of a round: KL-shaped rewards, GAE, whitening."""
    policy, reference = experience.tokens["behaviour_logprobs"], experience.tokens["reference_logprobs"]
    lengths = torch.tensor([len(row) for row in policy])
    inside = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    dense = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    kl = k1(dense(policy), dense(reference))
    scores = experience.scores - settings.missing_eos_penalty * (~experience.finished).float()
    rewards = shaped_rewards(scores, kl, lengths, kl_coef=settings.kl_coef)
    values = dense(experience.tokens["values"])
    advantage, returns = gae(rewards, values, lengths, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
    error = returns[inside] - values[inside]
    metrics = {
        "objective/scores": float(experience.scores.mean()),
        "objective/kl": float(kl.sum(1).mean()),
        "objective/rlhf_reward": float(rewards.sum(1).mean()),
        "rollout/length": float(lengths.float().mean()),
        "rollout/finished": float(experience.finished.float().mean()),
        "rollout/sampler_difference": _largest_difference(experience),
        "value/explained_variance": 1 - float(error.var() / returns[inside].var().clamp(min=1e-12)),
    }
    if settings.whiten_advantages:
        advantage = whiten(advantage, inside)
    rows = [len(row) for row in policy]
    ragged = {
        "advantages": [row[:length] for row, length in zip(advantage, rows, strict=True)],
        "returns": [row[:length] for row, length in zip(returns, rows, strict=True)],
        "behaviour_logprobs": policy,
        "reference_logprobs": reference,
        "values": experience.tokens["values"],
    }
    return ragged, {}, metrics


def _largest_difference(experience: Experience) -> float:
    """Largest |log-prob of the sampler - log-prob of the trainer| over the round's tokens."""
    sampled, trained = experience.tokens["sampled_logprobs"], experience.tokens["behaviour_logprobs"]
    return max(float((a - b).abs().max()) for a, b in zip(sampled, trained, strict=True))


def source(stage: Stage) -> RolloutSource:
    settings: Settings = stage.settings
    prompts, counts = stage.renderer.prompts(list(stage.records))
    stage.count("train", counts)
    collector = Collector(
        sampler=NativeSampler(stage.models, stage.renderer, rows=settings.rollout_rows),
        reward=_reward(stage),
        models=stage.models,
        renderer=stage.renderer,
        store=RolloutStore(stage.folder / "rollouts"),
        sampling=_sampling(settings),
        seed=stage.recipe.seed,
        rows=settings.rollout_rows,
        budget=lambda: stage.budget.tokens,
    )
    return RolloutSource(stage, collector, [prompt for prompt, _ in prompts])


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    """Score, watched scores, KL to the reference and length of one response to each held-out prompt."""
    settings: Settings = stage.settings
    prompts, counts = stage.renderer.prompts(list(stage.eval_records))
    stage.count("eval", counts)
    chosen = [prompt for prompt, _ in prompts][: settings.num_eval_prompts]
    sampler = NativeSampler(stage.models, stage.renderer, rows=settings.rollout_rows)
    rewards = {"score": _reward(stage)} | {
        name: open_reward(where, stage.renderer, device=stage.models.device, models=stage.models)
        for name, where in settings.watch.items()
    }

    def measure() -> dict[str, float]:
        key = (stage.recipe.seed, "evaluation")
        rollouts = sampler.generate(chosen, sampling=_sampling(settings), key=key)
        trees = [Tree(rollout.prompt_ids, (rollout.response_ids,)) for rollout in rollouts]
        tokens = measure_tokens(stage.models, trees, temperature=settings.temperature, budget=stage.budget.tokens)
        pairs = zip(tokens["behaviour_logprobs"], tokens["reference_logprobs"], strict=True)
        scores = {name: reward(rollouts).values for name, reward in rewards.items()}
        return {
            **{f"eval/{name}": sum(values) / len(values) for name, values in scores.items()},
            "eval/kl": sum(float(k1(a, b).sum()) for a, b in pairs) / len(rollouts),
            "eval/length": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
            "eval/finished": sum(r.finished for r in rollouts) / len(rollouts),
        }

    return measure


def _sampling(settings: Settings) -> Sampling:
    return Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature)


def _reward(stage: Stage) -> Reward:
    where = stage.objects.get("reward", stage.settings.reward)
    if where is None:
        raise ConfigError("no reward to optimise", hint="set ppo.reward to a reward run or to module:function")
    return open_reward(where, stage.renderer, device=stage.models.device, models=stage.models)


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
