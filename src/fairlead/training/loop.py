"""The training loop: passes over micro-batches, one optimizer step, observers. It knows no algorithm.

Each term's sum is divided by the global count of its own unit, so splitting a batch into micro-batches, packing and
padding, mixes of terms with different units and sharing a batch out over ranks all give the same gradient.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.errors import TrainingError
from fairlead.models.roles import Models
from fairlead.ops.sampling import stream_key
from fairlead.training.budget import TokenBudget, is_out_of_memory
from fairlead.training.optim import Optimizer
from fairlead.training.precision import LossScale
from fairlead.types import Mean, Metrics, Observer, Outputs, Pace, Pass, Progress, Ranks, Rounds, Source, TokenBatch

ALONE = Ranks()
IDLE = token_batch([Tree((0,), ((0,),))], packed=True, pad_id=0)
"""What a rank computes that has nothing left, while others have."""


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
    ranks: Ranks = ALONE,
) -> None:
    """Train from where ``source`` and ``clock`` stand to the source's end.

    ``measure`` is asked at step 0 and after every step for held-out metrics; it returns none where none are due. With
    ``scale`` a step whose gradients overflow is skipped; without, it is an error. A step for which memory runs out is
    done again with half the ``budget``. ``stop`` is asked before each step. ``source`` gives each of the ``ranks`` its
    own micro-batches; all else is the same on all of them.
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
        ranks.begin_step(clock.step)
        factor = 1.0 if scale is None else scale.value

        def accumulate(micro_batches: Sequence[TokenBatch], factor: float = factor) -> dict[str, float]:
            torch.manual_seed(stream_key(seed, "dropout", clock.step, *([ranks.rank] if ranks.rank else ())))
            return backward(models, passes, micro_batches, ranks, step=clock.step, loss_scale=factor)

        metrics = _within_memory(accumulate, micro_batches, source, optimizer, budget, clock.step, ranks)
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
        torch.manual_seed(stream_key(seed, "optimizer", clock.step))  # the same draws on all ranks
        metrics["learning_rate"] = optimizer.step(clock.step, pace.rate) if finite else optimizer.skip()
        clock.tokens += int(ranks.sums({"tokens": sum(batch.num_tokens for batch in micro_batches)})["tokens"])
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
    ranks: Ranks,
) -> dict[str, float]:
    """The step's gradients, in smaller micro-batches where memory runs out. Raises TrainingError where the smallest
    does not fit."""
    while True:
        try:
            return accumulate(micro_batches)
        except Exception as error:
            if budget is None or not is_out_of_memory(error):
                raise
            said, largest = str(error).splitlines()[0], max((batch.num_tokens for batch in micro_batches), default=0)
        optimizer.skip()  # what the step had gathered
        gc.collect()  # errors and frames that hold one another hold tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before = after = _number(micro_batches, ranks)
        while after == before and budget.halve(step):
            micro_batches = source.remake()
            after = _number(micro_batches, ranks)
        if after == before:
            raise TrainingError(
                f"step {step}: memory ran out in a forward pass of {largest:,} tokens, which cannot be cut: {said}",
                hint="model.gradient_checkpointing=true, model.adapter=lora, or a shorter data.max_length",
            )


def _number(micro_batches: Sequence[TokenBatch], ranks: Ranks) -> float:
    return ranks.sums({"": len(micro_batches)})[""]


def backward(
    models: Models,
    passes: Sequence[Pass],
    micro_batches: Sequence[TokenBatch],
    ranks: Ranks = ALONE,
    *,
    step: int = 0,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Accumulate the gradient of one optimizer step over all ``ranks``, times ``loss_scale``; returns the step's
    metrics."""
    counts = ranks.sums(total_counts(micro_batches))
    _refuse_nothing(passes, counts, step)
    metrics: Metrics = {}
    with ranks.together():
        prepared = _prepared(models, passes, micro_batches, ranks)
        for number, (each, batch) in enumerate(_turns(passes, prepared, ranks)):
            with models.use(each.role):
                if batch is None:
                    models(IDLE.to(models.device), each.needs).nothing.backward()
                    continue
                loss, measured = _loss(models, each, batch.to(models.device), counts)
                if not torch.isfinite(loss):
                    values = {name: mean.value for name, mean in measured.items()}
                    raise TrainingError(
                        f"step {step}: forward pass {number} has loss {float(loss)}: {values}",
                        hint="lower optim.learning_rate, or look at the rows of this step",
                    )
                (loss * loss_scale).backward()
            _add(metrics, measured)
    ranks.sum_gradients(models.trainable.values())
    return _means(metrics, ranks)


def _turns(
    passes: Sequence[Pass], micro_batches: Sequence[TokenBatch], ranks: Ranks
) -> Iterator[tuple[Pass, TokenBatch | None]]:
    """Forwards and backwards one after the other; where weights are sharded, as many of each pass on all ranks, of
    which a rank without a micro-batch for it takes part with none."""
    if not ranks.is_sharded:
        yield from ((each, batch) for batch in micro_batches for each in passes_of(passes, batch))
        return
    for each in passes:
        own = [batch for batch in micro_batches if isinstance(batch, each.batch)]
        most = max(ranks.gather(len(own)))
        yield from ((each, batch) for batch in [*own, *[None] * (most - len(own))])


@torch.no_grad()
def evaluate(
    models: Models, passes: Sequence[Pass], micro_batches: Iterable[TokenBatch], ranks: Ranks = ALONE
) -> dict[str, float]:
    """The same losses and metrics without gradients, as one batch; names as in training. Each of the ``ranks`` takes
    its turn of the micro-batches."""
    batches = list(islice(micro_batches, ranks.rank, None, ranks.size))
    counts = ranks.sums(total_counts(batches))
    metrics: Metrics = {}
    models.eval()
    try:
        with models.whole():
            for batch in _prepared(models, passes, batches, ranks):
                batch = batch.to(models.device)
                for each in passes_of(passes, batch):
                    with models.use(each.role):
                        _add(metrics, _loss(models, each, batch, counts)[1])
    finally:
        models.train()
    return _means(metrics, ranks)


def _means(metrics: Metrics, ranks: Ranks) -> dict[str, float]:
    """Over all ranks."""
    found: Metrics = {}
    for each in ranks.gather({name: (float(mean.sum), float(mean.count)) for name, mean in metrics.items()}):
        _add(found, {name: Mean(*mean) for name, mean in each.items()})
    return {name: mean.value for name, mean in found.items()}


@torch.no_grad()
def _prepared(
    models: Models, passes: Sequence[Pass], micro_batches: Sequence[TokenBatch], ranks: Ranks
) -> Sequence[TokenBatch]:
    """The micro-batches with what losses that couple them have to know of all of them."""
    for each in passes:
        if each.prepare is not None:

            def call(
                batch: TokenBatch, needs: frozenset[str], /, *, role: str | None = None, own: Pass = each
            ) -> Outputs:
                with models.use(role or own.role):
                    return models(batch.to(models.device), needs, own.temperature)

            with models.whole():
                micro_batches = each.prepare(call, micro_batches, ranks)
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
