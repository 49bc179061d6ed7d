"""What the verbs of a pipeline do with a stage: its settings in full, checked before anything runs, and the call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fairlead.config_file import suggest
from fairlead.config_resolve import ResolvedRecipe
from fairlead.errors import ConfigError
from fairlead.pipeline_file import Stage, nest
from fairlead.tracking import RunDirectory

Resolved = tuple[dict[str, Any], Callable[[], Any]]
"""Every setting with its value, and what is to be done."""


def _prepare(stage: Stage) -> Resolved:
    from fairlead.data.prepare import KINDS, check_options, prepare

    settings = nest(stage.settings)
    own = ("path", "text", "seed")
    check_options(stage.subject, {key: value for key, value in settings.items() if key not in own})
    fixed: dict[str, Any] = {"kind": stage.subject, "out": stage.folder}
    if KINDS[stage.subject].find is None:  # made here: there is no path to give
        fixed["path"] = None
    return {"prepare": stage.subject, **settings}, _bind(prepare, settings, **fixed)


def _train(stage: Stage) -> Resolved:
    run = {"run.name": stage.folder.name, "run.directory": str(stage.folder.parent)}
    resolved = _resolve(stage.subject, stage.settings | run)
    return resolved.as_dict(), partial(_run_stage, resolved, RunDirectory(stage.folder))


def _merge(stage: Stage) -> Resolved:
    from fairlead.models.merge import merge

    settings = nest(stage.settings)
    return {"merge": stage.subject, **settings}, _bind(merge, settings, run=stage.subject, out=stage.folder)


def _cross_validate(stage: Stage) -> Resolved:
    from fairlead.evaluation import cross_validate

    own = {key: stage.settings[key] for key in ("folds", "learning_curve") if key in stage.settings}
    resolved = _resolve(stage.subject, {key: value for key, value in stage.settings.items() if key not in own})
    return {**resolved.as_dict(), **own}, partial(cross_validate, resolved, out=stage.folder, **own)


def _evaluate(stage: Stage) -> Resolved:
    from fairlead.evaluation import evaluate

    home, settings = stage.home, nest(stage.settings)
    reference = {"reference": home / settings["reference"]} if settings.get("reference") else {}
    measure = _bind(evaluate, settings | reference, runs=[home / run for run in stage.subject])
    keep = RunDirectory(stage.folder).write_json
    return {"evaluate": stage.subject, **settings}, lambda: keep("metrics.json", measure())


def _report(stage: Stage) -> Resolved:
    from fairlead.report import build_report

    settings = nest(stage.settings)
    runs = [stage.home / run for run in stage.subject]
    return {"report": stage.subject, **settings}, _bind(build_report, settings, runs=runs, out=page(stage))


def _generate(stage: Stage) -> Resolved:
    from fairlead.evaluation.asked import asked
    from fairlead.evaluation.generate import OTHERS, GenerateSettings, generate

    settings = dict(stage.settings)
    prompts = _required(settings, "prompts")
    own = asked("generate", settings, GenerateSettings, OTHERS).settings.model_dump(mode="json")
    kept = None if stage.round is None else stage.result.with_name("prompts.jsonl")

    def call() -> None:
        if not stage.result.is_file():  # else it is whole: a kill came between it and the stage's marker
            generate(stage.subject, prompts, settings, out=stage.result, prompts_out=kept)

    return {"generate": stage.subject, "prompts": prompts, **nest(settings), **own}, call


def _score(stage: Stage) -> Resolved:
    from fairlead.evaluation.asked import asked
    from fairlead.evaluation.score_samples import OTHERS, score_samples
    from fairlead.rollout.screen import ScreenSettings

    settings = {key: value for key, value in stage.settings.items() if key.split(".")[0] != "reward"}
    reward = _required(nest(stage.settings), "reward")
    own = asked("score", settings, ScreenSettings, OTHERS).settings.model_dump(mode="json")
    call = partial(score_samples, reward, stage.subject, settings, out=stage.result)
    return {"score": stage.subject, "reward": reward, **nest(settings), **own}, call


def _select(stage: Stage) -> Resolved:
    from fairlead.evaluation.asked import asked
    from fairlead.evaluation.select import OTHERS, SelectFileSettings, select_file

    settings = stage.settings
    own = asked("select", settings, SelectFileSettings, OTHERS).settings.model_dump(mode="json")
    call = partial(select_file, stage.subject, settings, out=stage.result)
    return {"select": stage.subject, **nest(settings), **own}, call


VERBS: dict[str, Callable[[Stage], Resolved]] = {
    "prepare": _prepare,
    "train": _train,
    "merge": _merge,
    "cross_validate": _cross_validate,
    "evaluate": _evaluate,
    "report": _report,
    "generate": _generate,
    "score": _score,
    "select": _select,
}


def _required(settings: dict[str, Any], key: str) -> Any:
    """Take a setting out. Raises ConfigError where it is not given."""
    if settings.get(key) is None:
        raise ConfigError(f"{key} is not given", hint=f"add {key} to the stage")
    return settings.pop(key)


def _resolve(recipe: Any, settings: Mapping[str, Any]) -> ResolvedRecipe:
    """The recipe, with data and a model to train."""
    from fairlead.runner import resolve

    resolved = resolve(recipe, settings)
    data, model = resolved.recipe.data, resolved.recipe.model
    for key, is_given in (("data.path", data.path), ("model.path", model.path or model.scratch)):
        if not is_given:
            raise ConfigError(f"{key} is not given", hint=f"add {key} to the stage")
    return resolved


def _bind(function: Callable[..., Any], settings: dict[str, Any], **fixed: Any) -> Callable[[], Any]:
    """A call of ``function``; what it does not take, or lacks, is an error now and not in an hour."""
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.default for p in parameters if p.name not in fixed and p.kind is not p.VAR_KEYWORD}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in settings:
        if key in fixed or (key not in known and not takes_any):
            raise ConfigError(f"no setting {key!r}", hint=suggest(key, known))
    for key, default in known.items():
        if default is inspect.Parameter.empty and settings.get(key) is None:
            raise ConfigError(f"{key} is not given", hint=f"add {key} to the stage")
    return partial(function, **fixed, **settings)


def _run_stage(resolved: ResolvedRecipe, run: RunDirectory) -> None:
    """Train, or continue; a run that was finished when the pipeline was killed is left as it is."""
    from fairlead.runner import run_stage

    if read_json(run.summary).get("status") != "finished" or not run.model.is_dir():
        run_stage(resolved, folder=run.path)


def page(stage: Stage) -> Path:
    return stage.folder.with_suffix(".html")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where it is missing or torn."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
