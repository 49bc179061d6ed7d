"""The training loop: passes over micro-batches, one optimizer step, observers. It knows no algorithm.

Each term's sum is divided by the global count of its own unit, so splitting a batch into micro-batches, packing and
padding, and mixes of terms with different units all give the same gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fairlead.errors import TrainingError
from fairlead.models.roles import Models
from fairlead.ops.sampling import stream_key
from fairlead.training.budget import TokenBudget, is_out_of_memory
from fairlead.training.optim import Optimizer
from fairlead.training.precision import LossScale
from fairlead.types import Mean, Metrics, Observer, Outputs, Pace, Pass, Progress, Rounds, Source, TokenBatch


@dataclass(slots=True)
class Clock:
    """How far the run is, over all processes that worked on it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.tokens, self.seconds = int(state["step"]), int(state["tokens"]), float(state["seconds"])


def run(
    models: Models,
    passes: Sequence[Pass],
    source: Source,
    optimizer: Optimizer,
    observers: Sequence[Observer],
    clock: Clock,
    *,
    seed: int,
    measure: Callable[[int], dict[str, float]],
    scale: LossScale | None = None,
    budget: TokenBudget | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train from where ``source`` and ``clock`` stand to the source's end.

    ``measure`` is asked at step 0 and after every step for held-out metrics; it returns none where none are due. With
    ``scale`` a step whose gradients overflow is skipped; without, it is an error. A step for which memory runs out is
    done again with half the ``budget``. ``stop`` is asked before each step.
    """
    started = time.monotonic() - clock.seconds

    def tell(metrics: dict[str, float]) -> None:
        clock.seconds = time.monotonic() - started
        progress = Progress(clock.step, source.num_steps, metrics, clock.tokens, clock.seconds)
        for observer in observers:
            observer.after_step(progress)

    if clock.step == 0 and (before := measure(0)):
        tell(before)
    for micro_batches in () if stop() else source:
        clock.step += 1
        factor = 1.0 if scale is None else scale.value

        def accumulate(micro_batches: Sequence[TokenBatch], factor: float = factor) -> dict[str, float]:
            torch.manual_seed(stream_key(seed, "dropout", clock.step))
            return backward(models, passes, micro_batches, step=clock.step, loss_scale=factor)

        metrics = _within_memory(accumulate, micro_batches, source, optimizer, budget, clock.step)
        norm = optimizer.clip(factor)
        finite = bool(torch.isfinite(norm))
        if not finite and factor <= 1:
            raise TrainingError(
                f"step {clock.step}: the gradient's norm is {float(norm)}; losses {metrics}",
                hint="lower optim.learning_rate, or look at the rows of this step",
            )
        if scale is not None:
            scale.update(finite=finite)
            metrics |= {"loss_scale": scale.value, "skipped_steps": scale.skipped}
        pace = source.pace if isinstance(source, Rounds) else Pace()
        if pace.fresh:
            optimizer.forget()
        metrics["learning_rate"] = optimizer.step(clock.step, pace.rate) if finite else optimizer.skip()
        clock.tokens += sum(batch.num_tokens for batch in micro_batches)
        metrics |= {"grad_norm": float(norm)} if finite else {}
        metrics |= source.after_step(metrics)
        tell(metrics | measure(clock.step))
        if stop():
            break


def _within_memory(
    accumulate: Callable[[Sequence[TokenBatch]], dict[str, float]],
    micro_batches: Sequence[TokenBatch],
    source: Source,
    optimizer: Optimizer,
    budget: TokenBudget | None,
    step: int,
) -> dict[str, float]:
    """The step's gradients, in smaller micro-batches where memory runs out. Raises TrainingError where the smallest
    does not fit."""
    while True:
        try:
            return accumulate(micro_batches)
        except Exception as error:
            if budget is None or not is_out_of_memory(error):
                raise
            said, largest = str(error).splitlines()[0], max(batch.num_tokens for batch in micro_batches)
        optimizer.skip()  # what the step had gathered
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fewer = list(micro_batches)
        while len(fewer) == len(micro_batches) and budget.halve(step):
            fewer = source.remake()
        if len(fewer) == len(micro_batches):
            raise TrainingError(
                f"step {step}: memory ran out in a forward pass of {largest:,} tokens, which cannot be cut: {said}",
                hint="model.gradient_checkpointing=true, model.adapter=lora, or a shorter data.max_length",
            )
        micro_batches = fewer


def backward(
    models: Models,
    passes: Sequence[Pass],
    micro_batches: Sequence[TokenBatch],
    *,
    step: int = 0,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Accumulate the gradient of one optimizer step, times ``loss_scale``; returns the step's metrics."""
    counts = total_counts(micro_batches)
    _refuse_nothing(passes, counts, step)
    metrics: Metrics = {}
    micro_batches = _prepared(models, passes, micro_batches)
    for number, batch in enumerate(micro_batches):
        batch = batch.to(models.device)
        for each in passes_of(passes, batch):
            with models.use(each.role):
                loss, measured = _loss(models, each, batch, counts)
                if not torch.isfinite(loss):
                    values = {name: mean.value for name, mean in measured.items()}
                    raise TrainingError(
                        f"step {step}: micro-batch {number} has loss {float(loss)}: {values}",
                        hint="lower optim.learning_rate, or look at the rows of this step",
                    )
                (loss * loss_scale).backward()
            _add(metrics, measured)
    return {name: mean.value for name, mean in metrics.items()}


@torch.no_grad()
def evaluate(models: Models, passes: Sequence[Pass], micro_batches: Iterable[TokenBatch]) -> dict[str, float]:
    """The same losses and metrics without gradients, as one batch; names as in training."""
    batches = list(micro_batches)
    counts = total_counts(batches)
    metrics: Metrics = {}
    models.eval()
    try:
        for batch in _prepared(models, passes, batches):
            batch = batch.to(models.device)
            for each in passes_of(passes, batch):
                with models.use(each.role):
                    _add(metrics, _loss(models, each, batch, counts)[1])
    finally:
        models.train()
    return {name: mean.value for name, mean in metrics.items()}


@torch.no_grad()
def _prepared(models: Models, passes: Sequence[Pass], micro_batches: Sequence[TokenBatch]) -> Sequence[TokenBatch]:
    """The micro-batches with what losses that couple them have to know of all of them."""
    for each in passes:
        if each.prepare is not None:

            def call(
                batch: TokenBatch, needs: frozenset[str], /, *, role: str | None = None, own: Pass = each
            ) -> Outputs:
                with models.use(role or own.role):
                    return models(batch.to(models.device), needs, own.temperature)

            micro_batches = each.prepare(call, micro_batches)
    return micro_batches


def passes_of(passes: Sequence[Pass], batch: TokenBatch) -> Iterator[Pass]:
    return (each for each in passes if isinstance(batch, each.batch))


def total_counts(batches: Sequence[TokenBatch]) -> dict[str, float]:
    counts: dict[str, float] = {}
    for batch in batches:
        for unit, number in batch.counts.items():
            counts[unit] = counts.get(unit, 0.0) + number
    return counts


def _loss(models: Models, each: Pass, batch: TokenBatch, counts: Mapping[str, float]) -> tuple[torch.Tensor, Metrics]:
    """One pass's share of the loss of the whole batch, and what it measured."""
    outputs = models(batch, each.needs, each.temperature, uniform=each.uniform)
    metrics: Metrics = {}
    losses: list[torch.Tensor] = []
    for term in each.terms:
        loss_sum, measured = term.fn(outputs, batch)
        share = term.weight * loss_sum / counts[term.unit]
        losses.append(share)
        metrics |= measured
        _add(metrics, {"loss": Mean(float(share.detach()), 0.0)})
        metrics[f"loss/{term.name}"] = Mean(float(loss_sum.detach()), batch.counts[term.unit])
    return torch.stack(losses).sum(), metrics


def _add(metrics: Metrics, more: Metrics) -> None:
    """Sums add up; ``loss`` is a sum of shares already divided, so its count stays one."""
    for name, mean in more.items():
        mean = Mean(float(mean.sum), float(mean.count))
        metrics[name] = metrics[name] + mean if name in metrics else mean
        if name == "loss":
            metrics[name] = Mean(metrics[name].sum, 1.0)


def _refuse_nothing(passes: Sequence[Pass], counts: Mapping[str, float], step: int) -> None:
    for unit in {term.unit for each in passes for term in each.terms}:
        if not counts.get(unit):
            raise TrainingError(
                f"step {step}: the batch holds nothing to learn from (no {unit} counts)",
                hint="every token is masked: check data.max_length and the responses",
            )
