"""Runs one stage from recipe to saved model: resolves, assembles, trains with its observers, resumes, sums up."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fairlead.algorithms import find
from fairlead.algorithms.stage import Stage
from fairlead.assemble import Given, assemble, sample_prompts
from fairlead.config import Recipe
from fairlead.config_resolve import ResolvedRecipe, flatten, load_recipe
from fairlead.errors import Interrupted, RunError
from fairlead.health.alarms import Alarms
from fairlead.manifest import BudgetNote, fingerprints, keep_threads, write_manifest
from fairlead.models.card import write_card
from fairlead.models.export import save_model
from fairlead.models.load import pick_device
from fairlead.models.precision import autocast_of
from fairlead.rollout.native import NativeSampler
from fairlead.tracking import Console, MetricsLog, RunDirectory, open_sink
from fairlead.tracking.console import print_samples
from fairlead.training.checkpoint import Checkpointer, RunState, load_weights, newest
from fairlead.training.distributed import start
from fairlead.training.loop import Clock, run
from fairlead.training.optim import Optimizer
from fairlead.training.patience import Patience
from fairlead.training.precision import LossScale
from fairlead.types import Algorithm, Observer, Ranks, Rounds, Sampling, Source

SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: where it is, how it ended, and the trained model (in memory, on its device)."""

    path: Path
    summary: dict[str, Any]
    model: Any
    tokenizer: Any


def settings_of(name: str) -> tuple[str, type[Any]]:
    """The section and settings class of an algorithm, for ``fairlead.config.load_recipe``."""
    algorithm = find(name)
    return algorithm.name, algorithm.settings


def resolve(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> ResolvedRecipe:
    return load_recipe(source, overrides, settings_of=settings_of)


def train(
    recipe: str | Path | Mapping[str, Any],
    settings: Mapping[str, Any] | Sequence[str] = (),
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    reward: Any = None,
) -> RunResult:
    """Train one stage and return the result.

    ``recipe`` is a shipped name (``"dpo"``), a file, or a mapping; ``settings`` override it by dotted key. ``model``,
    ``tokenizer``, ``data``, ``eval_data`` and ``reward`` take a path (or hub id, ``module:function``) or a loaded
    object: a causal language model (trained in place), its tokenizer, a ``datasets.Dataset`` or list of rows, a
    function with trlX's signature. An unfinished run of the same recipe is continued where it stood. Raises a
    FairleadError that says what to do.
    """
    overrides = dict(settings.items()) if isinstance(settings, Mapping) else _pairs(settings)
    objects: dict[str, Any] = {}
    if isinstance(model, str | Path):
        overrides |= {"model.path": str(model), "model.scratch": None}
    elif model is not None:
        overrides |= {"model.path": None, "model.scratch": None}
    if isinstance(tokenizer, str | Path):
        overrides["model.tokenizer"] = str(tokenizer)
    for key, value in (("data.path", data), ("data.eval_path", eval_data)):
        if value is not None:
            overrides[key] = str(value) if isinstance(value, str | Path) else None
    resolved = resolve(recipe, overrides)
    if reward is not None:
        if isinstance(reward, str | Path):
            resolved = resolve(recipe, overrides | {f"{resolved.section}.reward": str(reward)})
        else:
            objects["reward"] = reward
    given = Given(
        model=None if isinstance(model, str | Path) else model,
        tokenizer=None if isinstance(tokenizer, str | Path) else tokenizer,
        data=None if isinstance(data, str | Path) else data,
        eval_data=None if isinstance(eval_data, str | Path) else eval_data,
        objects=objects,
    )
    return run_stage(resolved, given)


def _pairs(settings: Sequence[str]) -> dict[str, Any]:
    from fairlead.config_file import parse_override

    return dict(parse_override(text) for text in settings)


def run_stage(resolved: ResolvedRecipe, given: Given | None = None, *, folder: Path | None = None) -> RunResult:
    """Run a resolved recipe in its run directory (or ``folder``), continuing an unfinished run of the same recipe; as
    one of several ranks where the environment says so."""
    given = given or Given()
    recipe = resolved.recipe
    algorithm = find(recipe.algorithm)
    path = folder or Path(recipe.run.directory) / (recipe.run.name or algorithm.name)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.backends.cuda.matmul.allow_tf32 = recipe.model.tf32
    with start(pick_device(recipe.model.device), recipe.train.timeout_seconds) as ranks:
        if not ranks.is_leader:
            return _assembled(RunDirectory(path), resolved, given, algorithm, ranks)
        directory = RunDirectory.create(path, resolved.as_yaml())
        with directory.lock():
            _refuse_finished(directory)
            directory.clear_leftovers()
            keep_threads(directory, _say)
            try:
                return _assembled(directory, resolved, given, algorithm, ranks)
            except BaseException:
                _discard_unbegun(directory)
                raise


def _assembled(
    directory: RunDirectory, resolved: ResolvedRecipe, given: Given, algorithm: Algorithm[Any], ranks: Ranks
) -> RunResult:
    recipe, say = resolved.recipe, _say if ranks.is_leader else _hush
    torch.set_num_threads(ranks.from_leader(torch.get_num_threads))
    inputs = fingerprints(recipe, given) if ranks.is_leader else {}
    stage, notes = assemble(recipe, algorithm, given, directory.path, say, ranks)
    source = algorithm.source(stage)
    measure = algorithm.evaluation(stage) if stage.is_evaluated else dict
    notes = (*resolved.warnings, *notes)
    if ranks.is_leader:
        write_manifest(directory, stage, algorithm, inputs, notes)
    for note in notes:
        say(note)
    return _train(directory, stage, algorithm, source, measure)


def _discard_unbegun(directory: RunDirectory) -> None:
    """Take away a run that ended before its first step: the corrected command, another recipe, bears its name."""
    present = {entry.name for entry in directory.path.iterdir() if not entry.name.startswith(".")}
    if present <= {directory.recipe.name, directory.manifest.name}:
        with contextlib.suppress(OSError):  # a pipeline's marker stays, and with it the folder
            for name in (*present, ".lock"):
                (directory.path / name).unlink(missing_ok=True)
            directory.path.rmdir()


def _train(
    directory: RunDirectory,
    stage: Stage,
    algorithm: Algorithm[Any],
    source: Any,
    measure: Callable[[], dict[str, float]],
) -> RunResult:
    recipe, models, ranks = stage.recipe, stage.models, stage.ranks
    say = _say if ranks.is_leader else _hush
    optimizer = Optimizer(recipe.optim, models.trainable, source.num_steps)
    best = recipe.train.best_metric or (algorithm.best if stage.is_evaluated else None)
    clock, log = Clock(), MetricsLog(directory, log_every=recipe.train.log_every, device=models.device.type)
    stage.step = lambda: clock.step
    patience = Patience(best, recipe.train.patience)
    parts: dict[str, Any] = {"clock": clock, "source": source, "log": log}
    alarms = Alarms(directory, say)
    parts |= {"budget": stage.budget, "patience": patience, "alarms": alarms}
    scale = LossScale() if autocast_of(recipe.model, models.device) == torch.float16 else None
    if scale is not None:
        parts["loss_scale"] = scale
    state = RunState(models.state(), optimizer, parts, ranks)
    checkpointer = Checkpointer(
        directory.checkpoints, state, every=recipe.train.save_every, keep=recipe.train.keep_checkpoints, best=best
    )
    parts["checkpointer"] = checkpointer
    is_continued = _continue(directory, state, ranks, say)
    if is_continued:
        say(f"continuing {directory.path} after step {clock.step} of {source.num_steps}")
    samples = _Samples(directory, stage)
    observers: list[Observer] = [patience, checkpointer]
    if ranks.is_leader:
        directory.truncate_after(clock.step if is_continued else -1)
        log.add_sinks(_sinks(directory, recipe))
        console = Console(f"{algorithm.name} {directory.path}", algorithm.headline, quiet=not recipe.tracking.console)
        observers = [log, console, samples, BudgetNote(directory, stage.budget), alarms, *observers]
    elif ranks.is_sharded:  # whose weights the leader needs
        observers = [samples, *observers]
    status, ended = "failed", ""
    try:
        with stop_signals(checkpointer, say):
            run(
                models,
                algorithm.passes(recipe.settings),
                source,
                optimizer,
                observers,
                clock,
                seed=recipe.seed,
                measure=_due(recipe, source, measure, continued=is_continued),
                scale=scale,
                budget=stage.budget,
                stop=lambda: patience.is_over,
                ranks=ranks,
            )
        if patience.is_over:
            say(
                f"{best} has not become better for {recipe.train.patience} evaluations: stopped after step {clock.step}"
            )
        if isinstance(source, Rounds) and source.ended:
            ended = source.ended
            say(f"{ended}: stopped after step {clock.step}")
        ranks.gather(None)  # the last checkpoint is whole
        _save(directory, stage, checkpointer)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        raise
    finally:
        for observer in observers:
            observer.close()
        summary = _summary(directory, algorithm, clock, status, ended)
        if ranks.is_leader:
            with contextlib.suppress(*(() if status == "finished" else (RunError,))):  # what ended it weighs more
                directory.write_json("summary.json", summary)
    return RunResult(directory.path, summary, models.network, models.tokenizer)


def _continue(directory: RunDirectory, state: RunState, ranks: Ranks, say: Callable[[str], None]) -> bool:
    """Whether there is a checkpoint, from which all ranks go on."""
    name = ranks.from_leader(lambda: (folder := newest(directory.checkpoints, say)) and folder.name)
    if name is None:
        return False
    if told := state.load(directory.checkpoints / name):
        say(told)
    return True


def _sinks(directory: RunDirectory, recipe: Recipe) -> list[Any]:
    settings = flatten(recipe.model_dump(mode="json"))
    tracking, name = recipe.tracking, directory.path.name
    return [
        open_sink(kind, directory, project=tracking.project, name=name, settings=settings) for kind in tracking.sinks
    ]


def _due(
    recipe: Recipe, source: Source, measure: Callable[[], dict[str, float]], *, continued: bool
) -> Callable[[int], dict[str, float]]:
    """Asks for the number of steps anew each time: a source may end early. Step 0 of a ``continued`` run has been
    measured: its checkpoint is of after that."""
    every = recipe.train.eval_every

    def due(step: int) -> dict[str, float]:
        is_due = step == source.num_steps or (every is not None and step % every == 0)
        return measure() if (is_due if step else not continued) else {}

    return due


class _Samples:
    """An observer that draws responses to a few prompts and keeps them in samples.jsonl."""

    def __init__(self, directory: RunDirectory, stage: Stage) -> None:
        self._directory, self._stage = directory, stage
        number = stage.recipe.train.num_samples if "policy" in stage.models.roles else 0
        self._prompts = sample_prompts(stage, number) if number else []

    def after_step(self, progress: Any) -> None:
        stage = self._stage
        if not self._prompts or progress.step % (stage.recipe.train.sample_every or progress.num_steps):
            return
        sampler = NativeSampler(stage.models, stage.renderer)
        sampling = Sampling(max_new_tokens=getattr(stage.settings, "max_new_tokens", SAMPLE_TOKENS))
        with stage.models.whole():
            rollouts = sampler.generate(self._prompts, sampling=sampling, key=(stage.recipe.seed, "samples"))
        if not stage.ranks.is_leader:
            return
        rows = [
            {
                "step": progress.step,
                "prompt": stage.renderer.prompt_text(rollout.prompt),
                "response": rollout.text,
                "finished": rollout.finished,
            }
            for rollout in rollouts
        ]
        self._directory.append("samples.jsonl", rows)
        if stage.recipe.tracking.console:
            print_samples(rows)

    def close(self) -> None: ...


def _save(directory: RunDirectory, stage: Stage, checkpointer: Checkpointer) -> None:
    """The final model under its name, whole or not at all."""
    if stage.recipe.train.save_best and checkpointer.best_step is not None:
        load_weights(checkpointer.path(checkpointer.best_step), stage.models.trainable, stage.ranks)
    with stage.models.whole():
        if stage.ranks.is_leader:
            _write_model(directory, stage)


def _write_model(directory: RunDirectory, stage: Stage) -> None:
    temporary = directory.path / ".writing-model"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model(stage.models, temporary, template=stage.renderer.template, eos=stage.renderer.eos)
        write_card(temporary, directory.path)
        shutil.rmtree(directory.model, ignore_errors=True)
        temporary.rename(directory.model)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"the model could not be saved to {directory.model}: {error}",
            hint="make room and run the same command again: training is finished, only the saving is repeated",
        ) from error


@contextlib.contextmanager
def stop_signals(checkpointer: Checkpointer, say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a save at the next step's end; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: Any) -> None:
        checkpointer.stop_reason = signal.Signals(number).name
        say(f"{checkpointer.stop_reason}: saving after this step; once more stops at once")
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_finished(directory: RunDirectory) -> None:
    if not directory.summary.is_file() or not directory.model.is_dir():
        return
    if directory.read_json("summary.json").get("status") == "finished":
        raise RunError(
            f"{directory.path} holds a finished run of this recipe",
            hint=f"choose another run.name, or remove {directory.path}",
        )


def _summary(
    directory: RunDirectory, algorithm: Algorithm[Any], clock: Clock, status: str, ended: str
) -> dict[str, Any]:
    """The last value of every metric, and why the run ``ended`` early where it did."""
    last: dict[str, float] = {}
    for row in directory.read_jsonl("metrics.jsonl"):
        last |= {name: value for name, value in row.items() if name not in ("step", "tokens", "seconds")}
    return {
        "stage": directory.path.name,
        "algorithm": algorithm.name,
        "status": status,
        **({"ended": ended} if ended else {}),
        "steps": clock.step,
        "tokens": clock.tokens,
        "seconds": round(clock.seconds, 3),
        "metrics": {name: {"mean": value, "low": None, "high": None, "n": 1} for name, value in sorted(last.items())},
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _hush(_: str) -> None:
    """The leader says it."""
