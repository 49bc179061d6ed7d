"""Rounds of experience as a source of optimizer steps: sample, score, shape, estimate, then epochs of minibatches.

Its state is the step, the round and the place in it, with the hash of the round's file, so that every optimizer step is
one a run can continue at. A round may begin the optimizer anew, or be the last.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from fairlead.algorithms.mixed import MixedSource
from fairlead.algorithms.plateau import Plateau, level
from fairlead.algorithms.shaping import Shaped, Shaper
from fairlead.algorithms.stage import Stage
from fairlead.data.pack import rollout_batch, step_groups
from fairlead.data.render import Tree
from fairlead.errors import CheckpointError, TrainingError
from fairlead.ops.sampling import permutation, stream_key
from fairlead.rollout.experience import Collector, Experience
from fairlead.rollout.samples import round_prompts
from fairlead.types import Pace, Prompt, TokenBatch

EMPTY_ROUNDS = 10
"""Rounds without anything to learn from, one after the other, that end a run."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an algorithm makes of a round: for each response its advantages and what else its loss reads, [length]."""

    tokens: Mapping[str, Sequence[Tensor]]
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    keep: Tensor | None = None
    """[S] bool: the responses that are learned from, or [epochs, S] for each pass its own; none: all."""
    experience: Experience | None = None
    """What all of this speaks about, where it is more than the round."""


Estimator = Callable[[Experience, Shaped], Estimate]
Collate = Callable[..., TokenBatch]
"""As `rollout_batch`."""


@dataclass(frozen=True, slots=True)
class _Round:
    number: int
    experience: Experience
    estimate: Estimate
    passes: list[dict[int, list[int]]]
    """Of each pass the prompts that have responses to learn from, each with these."""


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
        self._round_size = len(prompts) if settings.rollout_size == "all" else min(settings.rollout_size, len(prompts))
        self._batch_size, self._epochs = train.batch_size, settings.epochs
        self._collate = collate
        self._guard: float | None = getattr(settings, "ratio_guard", None)
        self._target_kl: float | None = getattr(settings, "target_kl", None)
        self._rounds = max(1, round(train.epochs * len(prompts) / self._round_size))
        steps = self._epochs * math.ceil(self._round_size / self._batch_size)
        self.num_steps: int = train.steps if train.steps is not None else self._rounds * steps
        self.ended = ""
        self._step = self._number = self._position = 0
        self._digest, self._metrics, self._is_over, self._is_last = "", dict[str, float](), False, False
        self._plateau = Plateau(settings.plateau)

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        empty = 0
        while self._step < self.num_steps:
            current = self._begin(self._number)
            steps = sum(self._steps(current))
            self._end_with(current, steps)
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
        if estimate.keep is not None and estimate.experience is None:
            self._collector.store.select(number, [bool(kept) for kept in estimate.keep])
        if not self._position:
            mean, margin = level(experience.by_prompt(experience.scores))
            self.ended = self.ended or self._plateau.after_round(mean, margin)
            seconds = {f"performance/seconds_{phase}": taken for phase, taken in self._collector.seconds.items()}
            self._metrics |= measured(experience) | shaped.metrics | dict(estimate.metrics) | seconds
            self._metrics |= {"objective/scores_margin": margin, "rollout/round": float(number)}
        held = estimate.experience or experience
        return _Round(number, held, estimate, _learned(held, estimate.keep, self._epochs))

    def _steps(self, current: _Round) -> list[int]:
        """Of each pass."""
        return [math.ceil(len(prompts) / self._batch_size) for prompts in current.passes]

    def _end_with(self, current: _Round, steps: int) -> None:
        """Where a round is the last one, the run ends with its steps: fewer than planned where not all is learned."""
        is_planned = self._stage.recipe.train.steps is None and current.number >= self._rounds - 1
        self._is_last = bool(steps) and (bool(self.ended) or (is_planned and current.estimate.keep is not None))
        if self._is_last:
            self.num_steps = min(self.num_steps, self._step - self._position + steps)

    @property
    def pace(self) -> Pace:
        settings = self._stage.settings
        return Pace(settings.round_decay**self._number, settings.optimizer == "fresh" and self._position == 1)

    def _minibatch(self, current: _Round, position: int) -> list[TokenBatch]:
        starts = [0, *accumulate(self._steps(current))]
        epoch = bisect_right(starts, position) - 1
        index = position - starts[epoch]
        seed, experience, learned = self._stage.recipe.seed, current.experience, current.passes[epoch]
        prompts = list(learned)
        order = permutation(stream_key(seed, "minibatch", current.number, epoch), len(prompts))
        chosen = [prompts[i] for i in order[index * self._batch_size : (index + 1) * self._batch_size]]
        flat = [response for tree in experience.trees for response in tree.responses]
        parts = [
            (Tree(experience.trees[prompt].prompt, tuple(flat[i] for i in learned[prompt])), learned[prompt])
            for prompt in chosen
        ]
        sizes, packed, budget = [tree.num_tokens for tree, _ in parts], self._stage.packed, self._stage.budget.tokens
        groups = step_groups(sizes, budget, packed=packed, share=self._stage.ranks.share)
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

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        too_far = self._target_kl is not None and metrics["policy/approx_kl"] > self._target_kl
        too_different = self._guard is not None and not metrics["policy/ratio"] <= self._guard
        self._is_over = too_far or too_different
        if self._is_over and self._is_last:
            self.num_steps = self._step
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
            "plateau": self._plateau.state_dict(),
            "num_steps": self.num_steps if self._is_last and self._is_over else None,
            "ended": self.ended,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._number, self._position = int(state["step"]), int(state["round"]), int(state["position"])
        self._is_over, self._digest = bool(state["is_over"]), str(state["rollout"])
        self._shaper.load_state_dict(state["shaping"])
        self._plateau.load_state_dict(state["plateau"])
        self.num_steps, self.ended = state["num_steps"] or self.num_steps, str(state["ended"])


def _learned(experience: Experience, keep: Tensor | None, epochs: int) -> list[dict[int, list[int]]]:
    """Of each pass the prompts with those of their responses that are learned from."""
    first = [0, *accumulate(len(tree.responses) for tree in experience.trees)]
    flags = torch.ones(first[-1], dtype=torch.bool) if keep is None else keep

    def of(row: list[bool]) -> dict[int, list[int]]:
        found = {p: [i for i in range(start, end) if row[i]] for p, (start, end) in enumerate(pairwise(first))}
        return {prompt: responses for prompt, responses in found.items() if responses}

    rows: Any = cast(Any, flags).tolist()
    return [of(row) for row in rows] if flags.ndim == 2 else [of(rows)] * epochs


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
    pairs = zip(tokens["sampled_logprobs"], tokens.get("trainer_logprobs", tokens["behaviour_logprobs"]), strict=True)
    differences = torch.cat([(sampler - trainer).abs() for sampler, trainer in pairs])
    differences = differences[~differences.isnan()]  # of texts that were cleaned, or not measured twice
    return told | {
        "rollout/sampler_difference": float(differences.max()) if len(differences) else 0.0,
        "rollout/sampler_difference_mean": float(differences.mean()) if len(differences) else 0.0,
        "policy/entropy": float(torch.cat(tokens["entropy"]).nanmean()),
    }
