"""Loss scaling: the rule beside torch's, and a run that overflows and recovers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from tests.tiny import TREES, base, models
from torch import nn

from fairlead.algorithms import sft
from fairlead.config import OptimSection
from fairlead.data.pack import token_batch
from fairlead.errors import TrainingError
from fairlead.models.roles import Models
from fairlead.training.loop import Clock, run
from fairlead.training.optim import Optimizer
from fairlead.training.precision import LossScale
from fairlead.types import Progress, TokenBatch


def test_the_factor_follows_torchs_own_rule() -> None:
    torch.manual_seed(0)
    ours, interval = LossScale(1024.0), 4
    ours.interval = interval
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    skipped = 0
    for overflows in (torch.rand(60) < 0.15).tolist():
        theirs.scale(weight.sum() * (math.inf if overflows else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(finite=not overflows)
        skipped += overflows
        assert ours.value == theirs.get_scale()
    assert ours.skipped == skipped > 0


class _Same:
    """A source that yields one batch again and again."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        for _ in range(self.num_steps):
            yield [token_batch(TREES, packed=True, pad_id=0)]

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}

    def remake(self) -> list[TokenBatch]:
        return next(iter(self))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Record:
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.rows: list[Mapping[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def after_step(self, progress: Progress) -> None:
        self.rows.append(progress.metrics)
        self.weights.append({name: p.detach().clone() for name, p in self._parameters.items()})

    def close(self) -> None: ...


def train(made: Models, num_steps: int, scale: LossScale | None) -> tuple[_Record, Optimizer]:
    settings = OptimSection(learning_rate=1e-2, schedule="constant", max_grad_norm=None)
    optimizer, record = Optimizer(settings, made.trainable, num_steps), _Record(made.trainable)
    run(made, sft.passes(sft.Settings()), _Same(num_steps), optimizer, [record], Clock(), seed=0, scale=scale,
        measure=lambda _: {})  # fmt: skip
    return record, optimizer


def test_a_run_in_fp16_skips_the_steps_that_overflow_and_recovers() -> None:
    made = models(("policy",), autocast=torch.float16)
    start = {name: p.detach().clone() for name, p in made.trainable.items()}
    scale = LossScale(2.0**40)
    record, optimizer = train(made, 40, scale)
    skipped = [row["learning_rate"] == 0 for row in record.rows]
    number = sum(skipped)
    assert skipped == [True] * number + [False] * (40 - number)
    assert 0 < number < 30
    assert scale.value == 2.0 ** (40 - number)
    assert [row["loss_scale"] for row in record.rows[:number]] == [2.0 ** (39 - i) for i in range(number)]
    assert record.rows[-1]["skipped_steps"] == number
    assert all("grad_norm" not in row for row in record.rows[:number])
    assert all(torch.equal(record.weights[number - 1][name], tensor) for name, tensor in start.items())
    assert record.rows[-1]["loss"] < record.rows[0]["loss"]
    held = optimizer.tensors()
    assert {value.dtype for key, value in held.items() if "exp_avg" in key} == {torch.float32}
    assert {p.dtype for p in made.trainable.values()} == {torch.float32}


def test_scaled_losses_give_the_gradients_of_unscaled_ones() -> None:
    """In fp32 a power of two is exact."""
    scaled, plain = models(("policy",)), models(("policy",))
    first, second = train(scaled, 3, LossScale(1024.0))[0], train(plain, 3, None)[0]
    assert [row["grad_norm"] for row in first.rows] == pytest.approx(
        [row["grad_norm"] for row in second.rows], rel=1e-5
    )
    for name, parameter in scaled.trainable.items():
        torch.testing.assert_close(parameter, plain.trainable[name], rtol=1e-4, atol=1e-6)


def test_gradients_that_overflow_unscaled_are_an_error() -> None:
    """A weight of infinite gradient: no factor helps, and the run does not skip for ever."""
    made = Models(base(), ("policy",))
    name, weight = next(iter(made.trainable.items()))
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="the gradient's norm is") as caught:
        train(made, 40, LossScale(4.0))
    assert "step 3" in str(caught.value), name


def test_the_factor_is_brought_back_from_a_checkpoint() -> None:
    scale = LossScale()
    for finite in (True, False, True, True):
        scale.update(finite=finite)
    restored = LossScale()
    restored.load_state_dict(scale.state_dict())
    assert (restored.value, restored.skipped) == (32768.0, 1)
    restored.interval = scale.interval = 3
    for each in (scale, restored):
        each.update(finite=True)
    assert restored.value == scale.value == 65536.0
