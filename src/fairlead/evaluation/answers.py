"""What policies answer to held-out prompts, and what is measured of the answers. Knows neither files of results nor
reward models as what is judged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fairlead.config import Recipe
from fairlead.data.render import Renderer, Tree
from fairlead.errors import ConfigError
from fairlead.evaluation.metrics import Estimate, bootstrap_interval, distinct_n, win_rate
from fairlead.models.roles import Models
from fairlead.ops.kl import k1
from fairlead.rollout.experience import measure_tokens
from fairlead.rollout.native import NativeSampler
from fairlead.rollout.rewards import EnsembleReward, ModelReward, open_reward
from fairlead.rollout.rewards.settings import Given
from fairlead.tracking import RunDirectory
from fairlead.types import Conversation, Demonstration, Preference, Prompt, Reward, Rollout, Sampling

ScoreSource = Given
"""A reward run or folder, `module:function`, or any other source of rewards; or a function with trlX's signature."""


@dataclass(frozen=True, slots=True)
class Run:
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
class Plan:
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


@dataclass(frozen=True, slots=True)
class Answers:
    """A policy's responses, prompt by prompt and draw by draw, and their scores."""

    run: Run
    models: Models
    draws: int
    """Responses to each prompt."""
    rollouts: list[Rollout]
    scores: dict[str, list[float]]

    def by_prompt(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """One value a draw, prompt by prompt -> one list a prompt."""
        return [values[i : i + self.draws] for i in range(0, len(values), self.draws)]


def answer(run: Run, plan: Plan, models: Models, *, draws: int, purpose: str = "evaluate") -> Answers:
    """``draws`` responses to each prompt, keyed by the plan's seed and the ``purpose``."""
    renderer = run.renderer(plan.sampling.max_new_tokens)
    sampler = NativeSampler(models, renderer)
    drawn = [
        sampler.generate(plan.prompts, sampling=plan.sampling, key=(plan.seed, purpose, draw)) for draw in range(draws)
    ]
    rollouts = [rollout for of_prompt in zip(*drawn, strict=True) for rollout in of_prompt]
    scores: dict[str, list[float]] = {}
    for name, source in plan.scores.items():
        reward = plan.opened.get(name) or open_reward(source, renderer, device=plan.device)
        if isinstance(reward, ModelReward | EnsembleReward):
            plan.opened[name] = reward
        scores[name] = list(reward(rollouts).values)
    return Answers(run, models, draws, rollouts, scores)


def best_of(base: Answers, plan: Plan, number: int, by: str) -> Answers:
    """Of ``number`` more responses of a policy to each prompt the one that ``by`` scores highest."""
    drawn = answer(base.run, plan, base.models, draws=number, purpose="best of")
    chosen = [max(group, key=drawn.scores[by].__getitem__) for group in drawn.by_prompt(range(len(drawn.rollouts)))]
    scores = {name: [values[i] for i in chosen] for name, values in drawn.scores.items()}
    return Answers(base.run, base.models, 1, [drawn.rollouts[i] for i in chosen], scores)


def kl_of_best(number: int, prompts: int) -> Estimate:
    """KL of the best of ``number`` responses to the policy that gave them, in nats: log n - (n - 1) / n, which is exact
    where no two scores are equal and else a bound from above (Beirami et al. 2024)."""
    return Estimate(math.log(number) - (number - 1) / number, None, None, prompts)


def measured(answers: Answers, plan: Plan, base: Answers | None) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """The metrics of answers, against those of a reference, and the values that the means are of."""
    columns = _columns(answers, plan, base)
    metrics = {name: bootstrap_interval(answers.by_prompt(each), seed=plan.seed) for name, each in columns.items()}
    texts = answers.by_prompt([rollout.text for rollout in answers.rollouts])
    metrics |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
    if base is not None and plan.win_score is not None:
        ours, theirs = (each.by_prompt(each.scores[plan.win_score]) for each in (answers, base))
        metrics["win_rate"] = win_rate(ours, theirs, seed=plan.seed)
    return metrics, columns


def _columns(answers: Answers, plan: Plan, base: Answers | None) -> dict[str, list[float]]:
    """The metrics that are means over draws: one value a draw each."""
    columns = {
        **answers.scores,
        "length": [float(len(rollout.response_ids)) for rollout in answers.rollouts],
        "finished": [float(rollout.finished) for rollout in answers.rollouts],
    }
    if base is not None and (answers is base or answers.models is not base.models):
        trees = [Tree(rollout.prompt_ids, (rollout.response_ids,)) for rollout in answers.rollouts]
        temperature, budget = plan.sampling.temperature, answers.run.recipe.train.tokens_or_default
        ours, theirs = (
            measure_tokens(models, trees, temperature=temperature, budget=budget)["behaviour_logprobs"]
            for models in (answers.models, base.models)
        )
        columns["kl"] = [float(k1(a, b).sum()) for a, b in zip(ours, theirs, strict=True)]
    return columns


def write_responses(answers: Answers, file: str, columns: Mapping[str, Sequence[float]]) -> None:
    rows: list[dict[str, Any]] = []
    for index, rollout in enumerate(answers.rollouts):
        kl = {"kl": columns["kl"][index]} if "kl" in columns else {}
        rows.append(
            {
                "prompt": _as_text(rollout.prompt.prompt),
                "draw": index % answers.draws,
                "response": rollout.text,
                "length": len(rollout.response_ids),
                "finished": rollout.finished,
                **kl,
                "scores": {name: columns[name][index] for name in answers.scores},
            }
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    answers.run.directory.write_text(f"evaluation/{file}", lines)


def _as_text(prompt: Conversation) -> str:
    """The prompt free of any template, so that runs with different ones can be set side by side."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
