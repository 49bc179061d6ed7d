"""Stages that train, as `fairlead train` runs them: assembled from a recipe, by their own source, in the one loop.

Only what a run writes is left out: checkpoints and the saved model of fully trained weights would take longer than what
is measured.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import device as machine
from benchmarks.gpu.formulas import LORA, operations
from benchmarks.gpu.results import Case, rates
from benchmarks.gpu.sizes import SIZES, Rows, Size, words, write_rows

WARMUP = 3
"""Steps that are not timed: kernels are compiled, memory is taken."""
LEARNING_RATE = 1e-5
ADAPTER = {"method": "lora", "rank": 16, "alpha": 32}


@dataclass(slots=True)
class Step:
    """What one optimizer step was."""

    source: float
    """Seconds its batch took to come: rollouts, for PPO."""
    tokens: int
    records: int
    """Pairs where there are pairs, else sequences."""
    operations: float
    seconds: float = 0.0
    """All of it."""


@dataclass(eq=False)
class Watched:
    """A source whose steps are timed and counted, and which ends when the time is over."""

    source: Any
    size: Size
    mode: str
    device: str
    seconds: float
    most: int
    """Steps at most."""
    passes: int = 1
    has_head: bool = True
    unit: int = 1
    """Steps that belong together: a round."""
    warmup: int = WARMUP
    steps: list[Step] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return self.source.num_steps

    def __iter__(self) -> Iterator[Any]:
        steps = iter(self.source)
        while not self._is_over():
            began = machine.now(self.device)
            batches = next(steps, None)
            if batches is None:
                return
            came = machine.now(self.device)
            self.steps.append(self._step(came - began, batches))
            yield batches
            self.steps[-1].seconds = machine.now(self.device) - began

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return self.source.after_step(metrics)

    @property
    def timed(self) -> list[Step]:
        return self.steps[self.warmup :]

    def _is_over(self) -> bool:
        number = len(self.steps)
        spent = sum(step.seconds for step in self.timed)
        is_whole = number % self.unit == 0 and number > self.warmup
        return number >= self.most or (is_whole and spent >= self.seconds)

    def _step(self, seconds: float, batches: Sequence[Any]) -> Step:
        needed = 0.0
        for batch in batches:
            index = torch.arange(batch.subtree_end.shape[1])
            needed += operations(
                self.size.shape,
                tokens=batch.num_tokens,
                counted=int(batch.counts["token"]) if self.has_head else 0,
                pairs=int((batch.subtree_end - index)[batch.subtree_end > 0].sum()),
                mode=self.mode,
            )
        unit = "pair" if "pair" in batches[0].counts else "sequence"
        return Step(
            seconds,
            sum(batch.num_tokens for batch in batches),
            int(sum(batch.counts[unit] for batch in batches)),
            self.passes * needed,
        )

    def remake(self) -> list[Any]:
        return self.source.remake()


class _Losses:
    """An observer."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, progress: Any) -> None:
        self.losses.append(progress.metrics["loss"])

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Trained:
    watched: Watched
    losses: list[float]
    prepared: float
    """Seconds the source took to be made: tokenising, and DPO's pass over the reference."""
    peak: int
    """Bytes."""
    micro_batch_tokens: int
    """In the end: halved where memory ran out."""


def recipe(algorithm: str, job: Mapping[str, Any], rows: str, **sections: Any) -> dict[str, Any]:
    """A run on the base that was saved, its rows read in the order of ``write_in_order``."""
    size = SIZES[job["size"]]
    base: dict[str, Any] = {
        "algorithm": algorithm,
        "seed": 0,
        "run": {"directory": str(Path(job["work"]) / "runs")},
        "model": {
            "path": str(Path(job["work"]) / "base"),
            "device": job["device"],
            "adapter": ADAPTER if job["mode"] == LORA else None,
        },
        "data": {"path": rows, "template": "plain", "max_length": size.load.longest, "cache": "none"},
        "optim": {"learning_rate": LEARNING_RATE, "betas": [0.9, 0.999], "schedule": "constant"},
        "train": {"steps": size.load.steps, "micro_batch_tokens": size.micro_batch_tokens, "num_samples": 0},
        "tracking": {"console": False},
    }
    return {**base, **{name: {**base.get(name, {}), **values} for name, values in sections.items()}}


def train(settings: Mapping[str, Any], size: Size, mode: str, seconds: float, **watch: Any) -> Trained:
    """Runs a recipe for so many seconds of timed steps, or until its steps are done. ``watch`` goes to `Watched`."""
    from fairlead.algorithms import find
    from fairlead.assemble import Given, assemble
    from fairlead.models.precision import autocast_of
    from fairlead.runner import resolve
    from fairlead.training.loop import Clock, run
    from fairlead.training.optim import Optimizer
    from fairlead.training.precision import LossScale

    resolved = resolve(settings)
    chosen, algorithm = resolved.recipe, find(resolved.recipe.algorithm)
    torch.backends.cuda.matmul.allow_tf32 = chosen.model.tf32
    Path(chosen.run.directory).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{algorithm.name}-", dir=chosen.run.directory))  # no rollouts of a repeat
    stage, _ = assemble(chosen, algorithm, Given(), folder)
    models, device = stage.models, str(stage.models.device)
    machine.forget_peak(device)
    began = machine.now(device)
    source = algorithm.source(stage)
    prepared = machine.now(device) - began
    passes, heard = algorithm.passes(chosen.settings), _Losses()
    watch = {"most": size.load.steps, "passes": len(passes)} | watch
    watched: Any = Watched(source, size, mode, device, seconds, **watch)
    optimizer = Optimizer(chosen.optim, models.trainable, source.num_steps)
    scale = LossScale() if autocast_of(chosen.model, models.device) == torch.float16 else None
    how = {"seed": 0, "measure": lambda _: {}, "scale": scale, "budget": stage.budget}
    run(models, passes, watched, optimizer, [heard], Clock(), **how)
    return Trained(watched, heard.losses, prepared, machine.peak(device), stage.budget.tokens)


def planned_peak(settings: Mapping[str, Any]) -> int:
    """Bytes at the worst moment, by the memory plan that is told before a run."""
    from fairlead.algorithms import find
    from fairlead.assemble import build_models
    from fairlead.planning.plan import plan_run
    from fairlead.runner import resolve

    chosen = resolve(settings).recipe
    return plan_run(chosen, find(chosen.algorithm), build_models).worst


def write_in_order(path: Path, rows: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """A file that a stage of seed 0 reads, shuffled as it is, in the order of ``rows``."""
    from benchmarks.given import so_that_read

    return write_rows(path, so_that_read(rows))


# --- the cases -----------------------------------------------------------------------------------------------------


def pretrain(job: Mapping[str, Any]) -> Iterator[Case]:
    size, mode = SIZES[job["size"]], job["mode"]
    rows = Rows(size).texts()
    shape = {"data": {"max_length": size.load.row}, "train": {"batch_size": size.load.texts}}
    settings = recipe("pretrain", job, write_in_order(Path(job["work"]) / "texts.jsonl", rows), **shape)
    found = train(settings, size, mode, job["seconds"])
    asked = peer(job, "sft", found, ids_of(rows, "text"), size.load.texts, size.load.row)
    yield case(f"pretrain, {mode}, rows of {size.load.row}", job, found, "tokens a second", asked)


def sft(job: Mapping[str, Any]) -> Iterator[Case]:
    size, mode = SIZES[job["size"]], job["mode"]
    rows, batch = Rows(size).demonstrations(), size.load.demonstrations
    path = write_in_order(Path(job["work"]) / "demonstrations.jsonl", rows)
    settings = recipe("sft", job, path, train={"batch_size": batch})
    found = train(settings, size, mode, job["seconds"])
    asked = peer(job, "sft", found, ids_of(rows, "response"), batch, size.load.longest)
    made = case(f"sft, {mode}, packed", job, found, "tokens a second", asked)
    made.add("peak memory, planned", "GB", planned_peak(settings) / 1e9)
    yield made


def reward(job: Mapping[str, Any]) -> Iterator[Case]:
    size, mode = SIZES[job["size"]], job["mode"]
    rows, batch = Rows(size).pairs(), size.load.pairs
    path = write_in_order(Path(job["work"]) / "pairs.jsonl", rows)
    settings = recipe("reward", job, path, train={"batch_size": batch})
    found = train(settings, size, mode, job["seconds"], has_head=False)
    asked = peer(job, "reward", found, transcripts(rows), batch, 2 * size.load.longest)
    asked["score"] = first_score(size)
    yield case(f"reward, {mode}, shared prompts", job, found, "pairs a second", asked)


def dpo(job: Mapping[str, Any]) -> Iterator[Case]:
    """The peer asks its reference in every step; ours is asked for all rows before the first, and that is counted."""
    size, mode = SIZES[job["size"]], job["mode"]
    rows, batch = Rows(size).pairs(), size.load.pairs
    path = write_in_order(Path(job["work"]) / "pairs.jsonl", rows)
    found = train(recipe("dpo", job, path, train={"batch_size": batch}), size, mode, job["seconds"])
    asked = peer(job, "dpo", found, spelt(rows), batch, 2 * size.load.longest)
    metric = "pairs a second, with reference"
    made = case(f"dpo, {mode}, shared prompts", job, found, metric, asked)
    steps = found.watched.timed
    pairs = sum(step.records for step in steps)
    spent = sum(step.seconds for step in steps) + found.prepared * pairs / len(rows)
    made.add(metric, "1/s", pairs / spent)
    yield made


def case(name: str, job: Mapping[str, Any], found: Trained, compared: str, asked: dict[str, Any]) -> Case:
    """The figures of a run. ``compared`` is the metric by which the peer is measured, over the units of ``asked``."""
    steps = found.watched.timed
    spent = sum(step.seconds for step in steps)
    made = Case(name, losses=found.losses, notes={"micro_batch_tokens": found.micro_batch_tokens, "steps": len(steps)})
    made.add("tokens a second", "1/s", sum(step.tokens for step in steps) / spent)
    if "pairs" in compared:
        made.add("pairs a second", "1/s", sum(step.records for step in steps) / spent)
    rates(made, job["limits"]["operations"], sum(step.operations for step in steps) / spent)
    made.add("seconds a step", "s", statistics.median(step.seconds for step in steps))
    made.add("peak memory", "GB", found.peak / 1e9)
    pairs = "pairs" in compared
    made.job = asked | {
        "compared": compared,
        "units": [step.records if pairs else step.tokens for step in found.watched.steps],
    }
    return made


# --- what the peer is asked ----------------------------------------------------------------------------------------


def peer(
    job: Mapping[str, Any],
    trainer: str,
    found: Trained,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    longest: int,
) -> dict[str, Any]:
    """The same rows in the same order; as many at once as our micro-batches hold tokens, ``longest`` a row."""
    fits = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n * longest <= found.micro_batch_tokens]
    return {
        "kind": "train",
        "trainer": trainer,
        "mode": job["mode"],
        "model": str(Path(job["work"]) / "base"),
        "device": job["device"],
        "seconds": job["seconds"],
        "warmup": WARMUP,
        "batch_size": batch_size,
        "rows_at_once": max(fits, default=1),
        "learning_rate": LEARNING_RATE,
        "adapter": ADAPTER,
        "rows": list(rows)[: batch_size * len(found.watched.steps)],
    }


def ids_of(rows: Sequence[Mapping[str, list[int]]], answer: str) -> list[dict[str, Any]]:
    """Token ids and labels of texts or demonstrations."""
    made: list[dict[str, Any]] = []
    for row in rows:
        prompt, response = row.get("prompt", []), [*row[answer], 1]
        made.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return made


def spelt(rows: Sequence[Mapping[str, list[int]]]) -> list[dict[str, str]]:
    """Pairs as text, a space between prompt and response."""
    return [
        {
            "prompt": words(row["prompt"]),
            "chosen": " " + words(row["chosen"]),
            "rejected": " " + words(row["rejected"]),
        }
        for row in rows
    ]


def transcripts(rows: Sequence[Mapping[str, list[int]]]) -> list[dict[str, str]]:
    """Pairs as whole texts."""
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in spelt(rows)]


def first_score(size: Size) -> list[float]:
    """The head our reward stage begins with."""
    from fairlead.models.heads import ScalarHead

    return ScalarHead(size.shape.hidden_size, role="reward", seed=0).linear.weight[0].tolist()


STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo}
