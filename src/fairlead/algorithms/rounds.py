"""Rounds of experience as a source of optimizer steps: sample, score, shape, estimate, then epochs of minibatches.

Its state is the step, the round and the place in it, with the hash of the round's file, so that every optimizer step is
one a run can continue at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fairlead.algorithms.mixed import MixedSource
from fairlead.algorithms.shaping import Shaped, Shaper
from fairlead.algorithms.stage import Stage
from fairlead.data.pack import best_fit, micro_batches, rollout_batch
from fairlead.data.render import Tree
from fairlead.errors import CheckpointError, TrainingError
from fairlead.ops.sampling import permutation, stream_key
from fairlead.rollout.experience import Collector, Experience
from fairlead.rollout.samples import round_prompts
from fairlead.types import Prompt, TokenBatch

EMPTY_ROUNDS = 10
"""Rounds without anything to learn from, one after the other, that end a run."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an algorithm makes of a round: for each response its advantages and what else its loss reads, [length]."""

    tokens: Mapping[str, Sequence[Tensor]]
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    keep: Tensor | None = None
    """[S] bool: the responses that are learned from; none: all."""


Estimator = Callable[[Experience, Shaped], Estimate]
Collate = Callable[..., TokenBatch]
"""As `rollout_batch`."""


@dataclass(frozen=True, slots=True)
class _Round:
    number: int
    experience: Experience
    estimate: Estimate
    prompts: list[int]
    """Those of which a response is learned from."""
    metrics: dict[str, float]


class RolloutSource:
    """``train.batch_size`` prompts, with all their responses, are a minibatch."""

    def __init__(
        self,
        stage: Stage,
        collector: Collector,
        prompts: list[Prompt],
        shaper: Shaper,
        estimate: Estimator,
        *,
        mixed: MixedSource | None = None,
        warm_up: int = 0,
        collate: Collate = rollout_batch,
    ) -> None:
        """In the first ``warm_up`` steps no advantage counts: the value alone learns."""
        settings, train = stage.settings, stage.recipe.train
        self._stage, self._collector, self._prompts = stage, collector, prompts
        self._shaper, self._estimate, self._mixed, self._warm_up = shaper, estimate, mixed, warm_up
        self._round_size: int = min(settings.rollout_size, len(prompts))
        self._batch_size, self._epochs = train.batch_size, settings.epochs
        self._collate = collate
        self._guard: float | None = getattr(settings, "ratio_guard", None)
        self._target_kl: float | None = getattr(settings, "target_kl", None)
        rounds = max(1, round(train.epochs * len(prompts) / self._round_size))
        steps = self._epochs * math.ceil(self._round_size / self._batch_size)
        self.num_steps: int = train.steps if train.steps is not None else rounds * steps
        self._step = self._number = self._position = 0
        self._digest, self._metrics, self._is_over = "", dict[str, float](), False

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        empty = 0
        while self._step < self.num_steps:
            current = self._begin(self._number)
            steps = self._epochs * math.ceil(len(current.prompts) / self._batch_size)
            empty = 0 if steps else empty + 1
            if empty == EMPTY_ROUNDS:
                raise TrainingError(
                    f"{EMPTY_ROUNDS} rounds of {self._round_size} prompts gave no response to learn from",
                    hint="a reward that tells the responses to a prompt apart, more responses a prompt, or drop=[]",
                )
            while self._position < steps and not self._is_over and self._step < self.num_steps:
                position = self._position
                self._step, self._position = self._step + 1, position + 1
                self._remake = partial(self._minibatch, current, position)
                yield self._remake()
            if self._position >= steps or self._is_over:
                self._shaper.finish_round()
                self._number, self._position, self._is_over = self._number + 1, 0, False

    def remake(self) -> list[TokenBatch]:
        return self._remake()

    def _begin(self, number: int) -> _Round:
        prompts = round_prompts(self._prompts, self._round_size, number, self._stage.recipe.seed)
        experience, digest = self._collector.collect(number, prompts)
        if self._position and digest != self._digest:
            raise CheckpointError(f"round {number} of the rollouts is not the one the checkpoint was made with")
        self._digest = digest
        shaped = self._shaper(experience)
        estimate = self._estimate(experience, shaped)
        keep = torch.ones(len(experience.scores), dtype=torch.bool) if estimate.keep is None else estimate.keep
        if estimate.keep is not None:
            self._collector.store.select(number, keep.tolist())
        kept: Any = keep.view(-1, experience.num_samples).any(1).nonzero()[:, 0]
        seconds = {f"performance/seconds_{phase}": taken for phase, taken in self._collector.seconds.items()}
        metrics = measured(experience) | shaped.metrics | dict(estimate.metrics) | seconds
        if not self._position:
            self._metrics |= metrics
        return _Round(number, experience, estimate, kept.tolist(), metrics)

    def _minibatch(self, current: _Round, position: int) -> list[TokenBatch]:
        epoch, index = divmod(position, math.ceil(len(current.prompts) / self._batch_size))
        seed, experience = self._stage.recipe.seed, current.experience
        order = permutation(stream_key(seed, "minibatch", current.number, epoch), len(current.prompts))
        chosen = [current.prompts[i] for i in order[index * self._batch_size : (index + 1) * self._batch_size]]
        parts = [self._kept(current, prompt) for prompt in chosen]
        sizes, packed, budget = [tree.num_tokens for tree, _ in parts], self._stage.packed, self._stage.budget.tokens
        groups = best_fit(sizes, budget) if packed else micro_batches(sizes, budget, packed=False)
        tokens = current.estimate.tokens
        if self._step <= self._warm_up:
            tokens = {**tokens, "advantages": [torch.zeros_like(row) for row in tokens["advantages"]]}
        batches: list[TokenBatch] = []
        for group in groups:
            responses = [i for at in group for i in parts[at][1]]
            batches.append(
                self._collate(
                    [parts[at][0] for at in group],
                    {name: [rows[i] for i in responses] for name, rows in tokens.items()},
                    packed=packed,
                    pad_id=self._stage.pad_id,
                    support=experience.support_of(responses),
                )
            )
        return batches + (self._mixed.batches(self._step - 1) if self._mixed is not None else [])

    def _kept(self, current: _Round, prompt: int) -> tuple[Tree, list[int]]:
        """A prompt with those of its responses that are learned from, and their indices."""
        tree, number = current.experience.trees[prompt], current.experience.num_samples
        responses, keep = range(prompt * number, (prompt + 1) * number), current.estimate.keep
        chosen = [i for i in responses if keep is None or bool(keep[i])]
        return Tree(tree.prompt, tuple(tree.responses[i - prompt * number] for i in chosen)), chosen

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        too_far = self._target_kl is not None and metrics["policy/approx_kl"] > self._target_kl
        too_different = self._guard is not None and not metrics["policy/ratio"] <= self._guard
        self._is_over = too_far or too_different
        measured, self._metrics = self._metrics, {}
        return measured | ({"policy/round_ended_early": 1.0} if self._is_over else {})

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "round": self._number,
            "position": self._position,
            "is_over": self._is_over,
            "rollout": self._digest,
            "shaping": self._shaper.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._number, self._position = int(state["step"]), int(state["round"]), int(state["position"])
        self._is_over, self._digest = bool(state["is_over"]), str(state["rollout"])
        self._shaper.load_state_dict(state["shaping"])


def measured(experience: Experience) -> dict[str, float]:
    """What a person watches of a round's responses."""
    lengths, tokens = experience.lengths, experience.tokens
    told = {
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/finished": float(experience.finished.float().mean()),
        **{f"rollout/{name}": value for name, value in experience.measured.items()},
    }
    if "behaviour_logprobs" not in tokens:
        return told
    pairs = zip(tokens["sampled_logprobs"], tokens["behaviour_logprobs"], strict=True)
    differences = torch.cat([(ours - theirs).abs() for ours, theirs in pairs])
    differences = differences[~differences.isnan()]  # of texts that were cleaned
    return told | {
        "rollout/sampler_difference": float(differences.max()) if len(differences) else 0.0,
        "rollout/sampler_difference_mean": float(differences.mean()) if len(differences) else 0.0,
        "policy/entropy": float(torch.cat(tokens["entropy"]).mean()),
    }
