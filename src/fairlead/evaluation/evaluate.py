"""Evaluates finished runs: what policies answer to the same held-out prompts, and what reward models prefer.

Reads run directories, writes ``evaluation/`` in them. It trains nothing, and knows a run by the role of its model, not
by its algorithm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fairlead.config import ModelSection
from fairlead.config_file import suggest
from fairlead.data.records import load_tagged
from fairlead.data.sources import Row
from fairlead.errors import ConfigError, ModelError, RunError
from fairlead.evaluation.answers import (
    Answers,
    Plan,
    Run,
    ScoreSource,
    answer,
    best_of,
    kl_of_best,
    measured,
    write_responses,
)
from fairlead.evaluation.metrics import Estimate, perplexity
from fairlead.evaluation.reward_quality import judge, measure
from fairlead.models.load import load_base, load_tokenizer, pick_device, read_meta
from fairlead.models.precision import autocast_of
from fairlead.models.roles import Models
from fairlead.rollout.experience import measure_tokens
from fairlead.rollout.rewards import open_model
from fairlead.runner import resolve
from fairlead.tracking import RunDirectory
from fairlead.types import Demonstration, Preference, Prompt, Record, Sampling

Data = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]]
"""A file of records, a folder written by `fairlead prepare` (its held-out part), a hub id, several of them, or rows."""
RESERVED = ("distinct_1", "distinct_2", "finished", "kl", "length", "perplexity", "win_rate")
"""Metrics of a policy: no score can bear their names."""
READ_FACTOR = 16
"""Prompts read for each one wanted: some may not fit."""


def evaluate(
    runs: Sequence[Path | str],
    *,
    prompts: Data | None = None,
    pairs: Data | None = None,
    demonstrations: Data | None = None,
    scores: Mapping[str, ScoreSource] = {},
    reference: str | Path | None = None,
    draws: int = 1,
    num_prompts: int = 64,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    win_score: str | None = None,
    best_of: int | None = None,
    best_by: str | None = None,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Measure finished runs, write ``evaluation/`` into each, and return each one's metrics by the name of the run.

    A policy answers the first ``num_prompts`` of ``prompts`` that fit every policy, ``draws`` times, by draws keyed by
    ``seed``: ``length`` (tokens), ``finished`` (share that ended by itself), ``distinct_1``, ``distinct_2``, and the
    mean of each of ``scores``; against the policy of the run ``reference``, ``kl`` (nats: the sum over a response of
    log policy - log reference at the sampling temperature, top_k and top_p aside) and ``win_rate`` (by the score
    ``win_score``, the first one when not given); on ``demonstrations``, ``perplexity``. A reward model judges
    ``pairs``: ``accuracy``, beside it ``length_accuracy``, that of preferring the longer response, and under
    ``reward/`` calibration and length bias (docs/reference/metrics.md); their curves and bins are written to
    ``evaluation/reward_quality.json``. With ``best_of`` the reference is measured once more as ``best_of_N``: of so
    many other responses to each prompt the one that the score ``best_by`` (the first one when not given) puts highest,
    written to its ``evaluation/best_of_N.json`` and ``.jsonl``. Each metric is ``{"mean", "low", "high", "n"}`` with
    its 95 % interval over prompts.

    Raises RunError for a run that is missing or unfinished, ModelError where the reference has another vocabulary,
    ConfigError where there is nothing to measure.
    """
    _refuse_scores(scores, win_score=win_score, best_by=best_by)
    if best_of is not None:
        _refuse_best_of(best_of, reference, prompts, scores)
    if min(draws, num_prompts, max_new_tokens) < 1 or temperature <= 0:
        raise ConfigError("draws, num_prompts and max_new_tokens must be at least 1, temperature above 0")
    against = None if reference is None else _open(reference)
    opened = list({run.place: run for run in map(_open, runs)}.values())
    policies = [run for run in opened if run.role == "policy"]
    if against is not None:
        for run in policies:
            _require_same_vocabulary(run, against)
    for run in opened:
        _refuse_unmeasured(run, pairs if run.role == "reward" else prompts or demonstrations)

    counts: dict[str, dict[str, Any]] = {}
    wanted_by = [*([] if against is None else [against]), *policies]
    plan = Plan(
        prompts=_fitting(prompts, wanted_by, max_new_tokens, num_prompts, counts) if policies else [],
        pairs=_load(pairs, Preference, "pairs", counts) if len(policies) < len(opened) else [],
        demonstrations=[d for d, _ in _load(demonstrations, Demonstration, "demonstrations", counts)]
        if policies
        else [],
        scores=scores,
        win_score=win_score or next(iter(scores), None),
        sampling=Sampling(max_new_tokens, temperature, top_k, top_p),
        draws=draws,
        seed=seed,
        device=pick_device(device),
        counts=counts,
    )
    asked = against is not None and plan.prompts
    base = answer(against, plan, _policy(against, plan.device), draws=draws) if against and asked else None
    names = Counter(run.name for run in opened)
    best = (
        {} if base is None or best_of is None else {f"best_of_{best_of}": _evaluate_best(base, plan, best_of, best_by)}
    )
    return best | {
        (run.name if names[run.name] == 1 else str(run.directory.path)): (
            _evaluate_reward(run, plan) if run.role == "reward" else _evaluate_policy(run, plan, base)
        )
        for run in opened
    }


def _refuse_unmeasured(run: Run, on: Data | None) -> None:
    if on is None:
        wanted = "pairs" if run.role == "reward" else "prompts or demonstrations"
        raise ConfigError(f"nothing to measure {run.name} on: a {run.role} needs {wanted}", hint=f"give {wanted}")


def _refuse_best_of(number: int, *needed: object) -> None:
    """Raises ConfigError where it has nothing to choose from; ``needed`` are reference, prompts and scores."""
    if number < 2 or not all(each is not None and each != {} for each in needed):
        raise ConfigError(
            f"best_of={number} responses of the reference to prompts, by a score: one of these is missing",
            hint="give best_of of at least 2, reference, prompts and scores",
        )


def _refuse_scores(scores: Mapping[str, ScoreSource], **chosen: str | None) -> None:
    """Raises ConfigError for the name of a metric, and where a score is ``chosen`` that there is not."""
    clash = sorted(name for name in scores if name in RESERVED or name.startswith("reward/"))
    if clash:
        raise ConfigError(f"a score cannot bear the name of a metric: {', '.join(clash)}", hint="rename it")
    for key, name in chosen.items():
        if name is not None and name not in scores:
            raise ConfigError(f"{key}={name!r} is none of the scores", hint=suggest(name, scores))


# --- opening -------------------------------------------------------------------------------------------------------


def finished_run(path: Path | str) -> RunDirectory:
    """A run that has its model. Raises RunError where there is no run, or one that is unfinished."""
    directory = RunDirectory.open(path)
    if not directory.model.is_dir():
        raise RunError(
            f"{path} has not finished: it has no model yet", hint=f"continue it with `fairlead resume {path}`"
        )
    return directory


def _open(path: Path | str) -> Run:
    directory = finished_run(path)
    recipe, meta = resolve(directory.recipe).recipe, read_meta(directory.model)
    template = meta.get("template", recipe.data.template)
    return Run(directory, recipe, meta.get("role", "policy"), template, load_tokenizer(str(directory.model)))


def _require_same_vocabulary(run: Run, reference: Run) -> None:
    if reference.role != "policy":
        raise ModelError(f"{reference.name} is a reward model; a reference is a policy", hint="give a policy run")
    ours, theirs = run.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if ours != theirs:
        raise ModelError(
            f"{run.name} ({len(ours)} tokens) and its reference {reference.name} ({len(theirs)} tokens) have different "
            "vocabularies, so there is no KL between them",
            hint="give a reference with the same tokenizer, or evaluate without one",
        )


def _load(
    data: Data | None, record: Any, name: str, counts: dict[str, Any], limit: int | None = None
) -> list[tuple[Any, str]]:
    """Records, each with its source: what the column ``source`` of its row says, else the path it was read from."""
    if data is None:
        return []
    parts: Any = [data] if isinstance(data, str | Path) else data
    source = [str(part) if isinstance(part, Path) else part for part in parts]

    def origin(number: int, row: Row) -> str:
        named, path = row.data.get("source"), source[number]
        return named if isinstance(named, str) and named else path if isinstance(path, str) else ""

    records, origins, read = load_tagged(source, record, origin, limit=limit, heldout=True)
    counts[name] = {"read": read.read, "kept": read.kept, "cut": 0, "dropped": dict(read.dropped)}
    return list(zip(records, origins, strict=True))


def _fitting(
    data: Data | None, runs: Sequence[Run], new_tokens: int, number: int, counts: dict[str, Any]
) -> list[Prompt]:
    """The first prompts that fit every run."""
    prompts: list[Prompt] = [prompt for prompt, _ in _load(data, Prompt, "prompts", counts, READ_FACTOR * number)]
    for run in runs if prompts else ():
        fitting, lengths = run.renderer(new_tokens).prompts(prompts)
        prompts = [prompt for prompt, _ in fitting]
        dropped = Counter(counts["prompts"]["dropped"]) + lengths.dropped
        counts["prompts"] |= {"kept": len(prompts), "dropped": dict(dropped)}
    return prompts[:number]


# --- policies ------------------------------------------------------------------------------------------------------


def _policy(run: Run, device: torch.device) -> Models:
    """Its adapter merged, or as it was trained where the base is quantised."""
    model = run.recipe.model
    adapter = model.adapter if model.quantize else None
    section = ModelSection(path=str(run.directory.path), dtype=model.dtype, adapter=adapter, quantize=model.quantize)
    base = load_base(section, run.tokenizer, run.template, seed=0, device=device)
    return Models(base, ("policy",), adapter=adapter, autocast=autocast_of(section, device))


def _evaluate_policy(run: Run, plan: Plan, base: Answers | None) -> dict[str, Any]:
    known = base if base is not None and base.run.place == run.place else None
    models = _policy(run, plan.device) if known is None else known.models
    metrics: dict[str, Estimate] = {}
    counts = dict(plan.counts)
    if plan.prompts:
        answers = answer(run, plan, models, draws=plan.draws) if known is None else known
        metrics, columns = measured(answers, plan, base)
        write_responses(answers, "responses.jsonl", columns)
    if plan.demonstrations:
        metrics["perplexity"], counts["demonstrations"] = _perplexity(run, models, plan)
    about = _about(plan, base) | {
        "data": {name: counts[name] for name in ("prompts", "demonstrations") if name in counts}
    }
    return _write_metrics(run, metrics, about)


def _about(plan: Plan, base: Answers | None) -> dict[str, Any]:
    """How policies were measured."""
    return {
        "reference": None if base is None else base.run.name,
        "prompts": len(plan.prompts),
        "draws": plan.draws,
        "sampling": asdict(plan.sampling),
        "seed": plan.seed,
    }


def _evaluate_best(base: Answers, plan: Plan, number: int, by: str | None) -> dict[str, Any]:
    by = by or next(iter(plan.scores))
    answers = best_of(base, plan, number, by)
    metrics, columns = measured(answers, plan, base)
    metrics["kl"] = kl_of_best(number, len(plan.prompts))
    name = f"best_of_{number}"
    write_responses(answers, f"{name}.jsonl", columns)
    about = _about(plan, base) | {"draws": 1, "best_of": number, "best_by": by}
    return _write_metrics(base.run, metrics, about, f"{name}.json")


def _perplexity(run: Run, models: Models, plan: Plan) -> tuple[Estimate, dict[str, Any]]:
    """exp of the mean NLL of the responses' tokens, and what the run's limits did to the demonstrations."""
    records: list[Record] = list(plan.demonstrations)
    trees, _, lengths = run.renderer().trees(records)
    budget = run.recipe.train.tokens_or_default
    logprobs = measure_tokens(models, trees, temperature=1.0, budget=budget)["behaviour_logprobs"]
    nll = [-float(row.double().sum()) for row in logprobs]
    before = plan.counts["demonstrations"]
    counts = {**before, "kept": lengths.kept, "cut": lengths.cut, "dropped": before["dropped"] | lengths.dropped}
    return perplexity(nll, [len(row) for row in logprobs], seed=plan.seed), counts


# --- reward models -------------------------------------------------------------------------------------------------


def _evaluate_reward(run: Run, plan: Plan) -> dict[str, Any]:
    reward = open_model(str(run.directory.path), device=plan.device)
    judged = judge(reward, [pair for pair, _ in plan.pairs], [source for _, source in plan.pairs])
    metrics, curves = measure(judged, seed=plan.seed)
    run.directory.write_json("evaluation/reward_quality.json", {"run": run.name, **curves})
    counts = {"pairs": plan.counts["pairs"] | {"cut": judged.cut}}
    about = {"reference": None, "pairs": len(plan.pairs), "seed": plan.seed, "data": counts}
    return _write_metrics(run, metrics, about)


def _write_metrics(
    run: Run, metrics: Mapping[str, Estimate], about: Mapping[str, Any], file: str = "metrics.json"
) -> dict[str, Any]:
    found = {name: estimate.as_dict() for name, estimate in metrics.items()}
    run.directory.write_json(f"evaluation/{file}", {"run": run.name, **about, "metrics": found})
    return found
