"""What the loop refuses, and what it takes from a source that has a say in its pace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import TREES, base, models, scatter

from fairlead.algorithms.terms import nll
from fairlead.config import AdapterSection, OptimSection
from fairlead.data.pack import token_batch
from fairlead.errors import TrainingError
from fairlead.models.roles import Models
from fairlead.training.loop import Clock, backward, evaluate, run
from fairlead.training.optim import Optimizer
from fairlead.types import Pace, Pass, Progress, Term, TokenBatch

PASSES = (Pass("policy", (Term("nll", "token", nll),), frozenset({"logprobs"})),)


def test_a_batch_in_which_every_token_is_masked_is_refused_by_name() -> None:
    batch = token_batch(TREES, packed=True, pad_id=0)
    masked = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), counts={**batch.counts, "token": 0.0})
    made = models(("policy",))
    with pytest.raises(TrainingError, match=r"step 7: .*nothing to learn from \(no token counts\)"):
        backward(made, PASSES, [masked], step=7)
    assert backward(made, PASSES, [masked, batch])["loss"] > 0


class Paced:
    """Steps on one batch, each with a pace of its own."""

    ended = ""

    def __init__(self, *paces: Pace) -> None:
        self._paces, self.num_steps, self.pace = paces, len(paces), Pace()

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        for pace in self._paces:
            self.pace = pace
            yield self.remake()

    def remake(self) -> list[TokenBatch]:
        return [token_batch(TREES, packed=True, pad_id=0)]

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Kept:
    """An observer that keeps the losses, the learning rates, and Adam's number of steps so far."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self.losses, self.rates, self.counts = optimizer, list[float](), list[float](), list[int]()

    def after_step(self, progress: Progress) -> None:
        self.losses.append(progress.metrics["loss"])
        self.rates.append(progress.metrics["learning_rate"])
        counted = {int(value) for key, value in self._optimizer.tensors().items() if key.endswith("|step")}
        self.counts += counted

    def close(self) -> None: ...


def _trained(made: Models, *paces: Pace, rate: float = 0.01) -> Kept:
    source = Paced(*paces)
    section = OptimSection(learning_rate=rate, schedule="constant", warmup_ratio=0.0)
    optimizer = Optimizer(section, made.trainable, source.num_steps)
    kept = Kept(optimizer)
    run(made, PASSES, source, optimizer, [kept], Clock(), seed=0, measure=lambda _: {})
    return kept


def test_a_source_has_a_say_in_the_rate_of_a_step_and_in_what_the_optimizer_remembers() -> None:
    kept = _trained(models(("policy",)), Pace(), Pace(rate=0.5), Pace(rate=0.25, fresh=True), Pace())
    assert kept.rates == pytest.approx([0.01, 0.005, 0.0025, 0.01])
    assert kept.counts == [1, 2, 1, 2]


def _with_dropout() -> Models:
    made = Models(base(), ("policy",), adapter=AdapterSection(rank=4, dropout=0.5), compared=False)
    scatter(made)
    return made


def test_each_step_has_a_dropout_of_its_own_and_every_run_the_same() -> None:
    """At a rate that moves nothing: what differs between steps is what was dropped."""
    first, again = (_trained(_with_dropout(), Pace(), Pace(), Pace(), rate=1e-30).losses for _ in range(2))
    assert len(set(first)) == 3 and first == again


def test_held_out_losses_are_those_without_dropout() -> None:
    batch = [token_batch(TREES, packed=True, pad_id=0)]
    found = evaluate(made := _with_dropout(), PASSES, batch)
    plain = Models(base(), ("policy",), adapter=AdapterSection(rank=4), compared=False)
    scatter(plain)
    assert found["loss"] == backward(plain, PASSES, batch)["loss"] and made.training
