"""Evaluates finished runs: what policies answer to the same held-out prompts, and what reward models prefer.

Reads run directories, writes ``evaluation/`` in them. It trains nothing, and knows a run by the role of its model, not
by its algorithm.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fairlead.config import ModelSection, Recipe
from fairlead.config_file import suggest
from fairlead.data.records import load_tagged
from fairlead.data.render import Renderer, Tree
from fairlead.data.sources import Row
from fairlead.errors import ConfigError, ModelError, RunError
from fairlead.evaluation.metrics import Estimate, bootstrap_interval, distinct_n, perplexity, win_rate
from fairlead.evaluation.reward_quality import judge, measure
from fairlead.models.load import load_base, load_tokenizer, pick_device, read_meta
from fairlead.models.roles import Models
from fairlead.ops.kl import k1
from fairlead.rollout.experience import measure_tokens
from fairlead.rollout.native import NativeSampler
from fairlead.rollout.rewards import EnsembleReward, ModelReward, open_model, open_reward
from fairlead.rollout.rewards.settings import Given
from fairlead.runner import resolve
from fairlead.tracking import RunDirectory
from fairlead.types import Conversation, Demonstration, Preference, Prompt, Record, Reward, Rollout, Sampling

Data = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]]
"""A file of records, a folder written by `fairlead prepare` (its held-out part), a hub id, several of them, or rows."""
ScoreSource = Given
"""A reward run or folder, `module:function`, or any other source of rewards; or a function with trlX's signature."""
RESERVED = ("distinct_1", "distinct_2", "finished", "kl", "length", "perplexity", "win_rate")
"""Metrics of a policy: no score can bear their names."""
READ_FACTOR = 16
"""Prompts read for each one wanted: some may not fit."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A finished run and how its model reads text."""

    directory: RunDirectory
    recipe: Recipe
    role: Literal["policy", "reward"]
    template: str
    tokenizer: Any

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def place(self) -> Path:
        return self.directory.path.resolve()

    def renderer(self, new_tokens: int = 0) -> Renderer:
        """The run's template and limits, with room for ``new_tokens`` behind the prompt."""
        data = self.recipe.data
        room = data.max_length - max(new_tokens, 1)
        if room < 1:
            raise ConfigError(
                f"data.max_length={data.max_length} of {self.name} leaves no room for a prompt and {new_tokens} new "
                "tokens",
                hint=f"lower max_new_tokens below {data.max_length}",
            )
        longest = room if data.max_prompt_length is None else min(room, data.max_prompt_length)
        return Renderer(self.tokenizer, template=self.template, max_length=data.max_length, max_prompt_length=longest)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured, the same for every run."""

    prompts: list[Prompt]
    pairs: list[tuple[Preference, str]]
    """Each with the name of its source."""
    demonstrations: list[Demonstration]
    scores: Mapping[str, ScoreSource]
    win_score: str | None
    sampling: Sampling
    draws: int
    seed: int
    device: torch.device
    counts: dict[str, dict[str, Any]]
    """What became of the rows: prompts, pairs, demonstrations -> read, kept, cut, dropped."""
    opened: dict[str, Reward] = field(default_factory=dict[str, Reward])
    """Reward models that serve every run: they bring their own tokenizer and template."""

    def by_prompt(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """One value a draw, prompt by prompt -> one list a prompt."""
        return [values[i : i + self.draws] for i in range(0, len(values), self.draws)]


@dataclass(frozen=True, slots=True)
class _Answers:
    """A policy's responses, prompt by prompt and draw by draw, and their scores."""

    run: _Run
    models: Models
    rollouts: list[Rollout]
    scores: dict[str, list[float]]


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
    ``evaluation/reward_quality.json``. Each metric is ``{"mean", "low", "high", "n"}`` with its 95 % interval over
    prompts.

    Raises RunError for a run that is missing or unfinished, ModelError where the reference has another vocabulary,
    ConfigError where there is nothing to measure.
    """
    clash = sorted(name for name in scores if name in RESERVED or name.startswith("reward/"))
    if clash:
        raise ConfigError(f"a score cannot bear the name of a metric: {', '.join(clash)}", hint="rename it")
    if win_score is not None and win_score not in scores:
        raise ConfigError(f"win_score={win_score!r} is none of the scores", hint=suggest(win_score, scores))
    if min(draws, num_prompts, max_new_tokens) < 1 or temperature <= 0:
        raise ConfigError("draws, num_prompts and max_new_tokens must be at least 1, temperature above 0")
    against = None if reference is None else _open(reference)
    opened = list({run.place: run for run in map(_open, runs)}.values())
    policies = [run for run in opened if run.role == "policy"]
    if against is not None:
        for run in policies:
            _require_same_vocabulary(run, against)
    for run in opened:
        if (pairs if run.role == "reward" else prompts or demonstrations) is None:
            wanted = "pairs" if run.role == "reward" else "prompts or demonstrations"
            raise ConfigError(f"nothing to measure {run.name} on: a {run.role} needs {wanted}", hint=f"give {wanted}")

    counts: dict[str, dict[str, Any]] = {}
    wanted_by = [*([] if against is None else [against]), *policies]
    plan = _Plan(
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
    base = _answer(against, plan, _policy(against, plan.device)) if against is not None and plan.prompts else None
    names = Counter(run.name for run in opened)
    return {
        (run.name if names[run.name] == 1 else str(run.directory.path)): (
            _evaluate_reward(run, plan) if run.role == "reward" else _evaluate_policy(run, plan, base)
        )
        for run in opened
    }


# --- opening -------------------------------------------------------------------------------------------------------


def finished_run(path: Path | str) -> RunDirectory:
    """A run that has its model. Raises RunError where there is no run, or one that is unfinished."""
    directory = RunDirectory.open(path)
    if not directory.model.is_dir():
        raise RunError(
            f"{path} has not finished: it has no model yet", hint=f"continue it with `fairlead resume {path}`"
        )
    return directory


def _open(path: Path | str) -> _Run:
    directory = finished_run(path)
    recipe, meta = resolve(directory.recipe).recipe, read_meta(directory.model)
    template = meta.get("template", recipe.data.template)
    return _Run(directory, recipe, meta.get("role", "policy"), template, load_tokenizer(str(directory.model)))


def _require_same_vocabulary(run: _Run, reference: _Run) -> None:
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
    data: Data | None, runs: Sequence[_Run], new_tokens: int, number: int, counts: dict[str, Any]
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


def _answer(run: _Run, plan: _Plan, models: Models) -> _Answers:
    renderer = run.renderer(plan.sampling.max_new_tokens)
    sampler = NativeSampler(models, renderer)
    drawn = [
        sampler.generate(plan.prompts, sampling=plan.sampling, key=(plan.seed, "evaluate", draw))
        for draw in range(plan.draws)
    ]
    rollouts = [rollout for of_prompt in zip(*drawn, strict=True) for rollout in of_prompt]
    scores: dict[str, list[float]] = {}
    for name, source in plan.scores.items():
        reward = plan.opened.get(name) or open_reward(source, renderer, device=plan.device)
        if isinstance(reward, ModelReward | EnsembleReward):
            plan.opened[name] = reward
        scores[name] = list(reward(rollouts).values)
    return _Answers(run, models, rollouts, scores)


def _policy(run: _Run, device: torch.device) -> Models:
    """Its adapter merged, or as it was trained where the base is quantised."""
    model = run.recipe.model
    adapter = model.adapter if model.quantize else None
    section = ModelSection(path=str(run.directory.path), dtype=model.dtype, adapter=adapter, quantize=model.quantize)
    base = load_base(section, run.tokenizer, run.template, seed=0, device=device)
    return Models(base, ("policy",), adapter=adapter)


def _evaluate_policy(run: _Run, plan: _Plan, base: _Answers | None) -> dict[str, Any]:
    known = base if base is not None and base.run.place == run.place else None
    models = _policy(run, plan.device) if known is None else known.models
    metrics: dict[str, Estimate] = {}
    counts = dict(plan.counts)
    if plan.prompts:
        answers = _answer(run, plan, models) if known is None else known
        columns = _columns(answers, plan, base)
        metrics |= {
            name: bootstrap_interval(plan.by_prompt(values), seed=plan.seed) for name, values in columns.items()
        }
        texts = plan.by_prompt([rollout.text for rollout in answers.rollouts])
        metrics |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
        if base is not None and plan.win_score is not None:
            ours, theirs = (plan.by_prompt(each.scores[plan.win_score]) for each in (answers, base))
            metrics["win_rate"] = win_rate(ours, theirs, seed=plan.seed)
        _write_responses(answers, plan, columns)
    if plan.demonstrations:
        metrics["perplexity"], counts["demonstrations"] = _perplexity(run, models, plan)
    return _write_metrics(
        run,
        metrics,
        {
            "reference": None if base is None else base.run.name,
            "prompts": len(plan.prompts),
            "draws": plan.draws,
            "sampling": asdict(plan.sampling),
            "seed": plan.seed,
            "data": {name: counts[name] for name in ("prompts", "demonstrations") if name in counts},
        },
    )


def _columns(answers: _Answers, plan: _Plan, base: _Answers | None) -> dict[str, list[float]]:
    """The metrics that are means over draws: one value a draw each."""
    columns = {
        **answers.scores,
        "length": [float(len(rollout.response_ids)) for rollout in answers.rollouts],
        "finished": [float(rollout.finished) for rollout in answers.rollouts],
    }
    if base is not None:
        trees = [Tree(rollout.prompt_ids, (rollout.response_ids,)) for rollout in answers.rollouts]
        temperature, budget = plan.sampling.temperature, answers.run.recipe.train.tokens_or_default
        ours, theirs = (
            measure_tokens(models, trees, temperature=temperature, budget=budget)["behaviour_logprobs"]
            for models in (answers.models, base.models)
        )
        columns["kl"] = [float(k1(a, b).sum()) for a, b in zip(ours, theirs, strict=True)]
    return columns


def _perplexity(run: _Run, models: Models, plan: _Plan) -> tuple[Estimate, dict[str, Any]]:
    """exp of the mean NLL of the responses' tokens, and what the run's limits did to the demonstrations."""
    records: list[Record] = list(plan.demonstrations)
    trees, _, lengths = run.renderer().trees(records)
    budget = run.recipe.train.tokens_or_default
    logprobs = measure_tokens(models, trees, temperature=1.0, budget=budget)["behaviour_logprobs"]
    nll = [-float(row.double().sum()) for row in logprobs]
    before = plan.counts["demonstrations"]
    counts = {**before, "kept": lengths.kept, "cut": lengths.cut, "dropped": before["dropped"] | lengths.dropped}
    return perplexity(nll, [len(row) for row in logprobs], seed=plan.seed), counts


def _write_responses(answers: _Answers, plan: _Plan, columns: Mapping[str, Sequence[float]]) -> None:
    rows: list[dict[str, Any]] = []
    for index, rollout in enumerate(answers.rollouts):
        kl = {"kl": columns["kl"][index]} if "kl" in columns else {}
        rows.append(
            {
                "prompt": _as_text(rollout.prompt.prompt),
                "draw": index % plan.draws,
                "response": rollout.text,
                "length": len(rollout.response_ids),
                "finished": rollout.finished,
                **kl,
                "scores": {name: columns[name][index] for name in plan.scores},
            }
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    answers.run.directory.write_text("evaluation/responses.jsonl", lines)


def _as_text(prompt: Conversation) -> str:
    """The prompt free of any template, so that runs with different ones can be set side by side."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


# --- reward models -------------------------------------------------------------------------------------------------


def _evaluate_reward(run: _Run, plan: _Plan) -> dict[str, Any]:
    reward = open_model(str(run.directory.path), device=plan.device)
    judged = judge(reward, [pair for pair, _ in plan.pairs], [source for _, source in plan.pairs])
    metrics, curves = measure(judged, seed=plan.seed)
    run.directory.write_json("evaluation/reward_quality.json", {"run": run.name, **curves})
    counts = {"pairs": plan.counts["pairs"] | {"cut": judged.cut}}
    about = {"reference": None, "pairs": len(plan.pairs), "seed": plan.seed, "data": counts}
    return _write_metrics(run, metrics, about)


def _write_metrics(run: _Run, metrics: Mapping[str, Estimate], about: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: estimate.as_dict() for name, estimate in metrics.items()}
    run.directory.write_json("evaluation/metrics.json", {"run": run.name, **about, "metrics": found})
    return found
