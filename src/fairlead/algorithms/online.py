"""What the algorithms that sample share: their settings, the collector of experience, and evaluation on held-out
prompts. Knows no advantage estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.mixed import MixedSettings, MixedSource
from fairlead.algorithms.plateau import level
from fairlead.algorithms.policy import PolicySettings
from fairlead.algorithms.rounds import Estimator, RolloutSource
from fairlead.algorithms.shaping import Shaper, ShapingSettings
from fairlead.algorithms.stage import Stage
from fairlead.data.render import Tree
from fairlead.errors import ConfigError
from fairlead.ops.kl import k1
from fairlead.rollout.engines import open_sampler
from fairlead.rollout.experience import (
    Collector,
    Experience,
    drawn_from,
    measure_tokens,
    select_support,
    trees_of,
)
from fairlead.rollout.rewards import open_reward
from fairlead.rollout.rewards.settings import RewardSource
from fairlead.rollout.samples import shares_of
from fairlead.rollout.screen import Screen, ScreenSettings, open_screen
from fairlead.rollout.settings import DrawSettings
from fairlead.rollout.store import RolloutStore
from fairlead.rollout.texts import variety
from fairlead.tracking.run_directory import RunDirectory
from fairlead.types import Demonstration, Prompt, Reward, Rollout, Sampler


class SamplingSettings(DrawSettings):
    reward: RewardSource | None = None
    """A reward run or folder, a classifier of transformers, `module:function` with trlX's signature (samples, prompts,
    outputs, **columns), `rule:NAME`, a URL, or a list of such with weights."""
    watch: dict[str, RewardSource] = Field(default_factory=dict[str, RewardSource])
    """More rewards by name, measured on the held-out prompts and never optimised."""
    watch_rounds: bool = False
    """They are measured in each round as well, on one response to each prompt."""
    rollout_size: Annotated[int, Field(ge=1)] | Literal["all"] = 128
    """Prompts of one round; all: each round asks every prompt."""
    epochs: int = Field(default=4, ge=1)
    """Passes over each round's responses; train.batch_size prompts, with all their responses, are a minibatch."""
    optimizer: Literal["kept", "fresh"] = "kept"
    """fresh: each round begins without the moments of the rounds before it."""
    round_decay: float = Field(default=1.0, gt=0, le=1)
    """Each round's learning rate is so many times that of the round before it, beside `optim.schedule`."""
    plateau: int | None = Field(default=None, ge=1)
    """The run ends with the round in which the mean score of so many rounds lies within the 95 % interval (over
    prompts) of the round before them, the newest not the highest of all these; null: it does not."""
    num_eval_prompts: int = Field(default=64, ge=1)
    """Held-out prompts sampled at each evaluation."""
    eval_prompts: tuple[str, ...] = ()
    """Prompts of your own to watch, in place of held-out ones; each one's mean score is kept in eval_prompts.jsonl."""
    eval_samples: int = Field(default=1, ge=1)
    """Responses to each prompt at an evaluation."""
    eval_temperature: float | None = Field(default=None, gt=0)
    """Another temperature at evaluation."""


class OnlineSettings(PolicySettings, ShapingSettings, SamplingSettings):
    importance_cap: float | None = Field(default=2.0, gt=0)
    """With an engine that is not ours, a token weighs trainer's probability / sampler's, at most so much."""
    mixed: MixedSettings | None = None
    """Text learned beside the responses (PPO-ptx)."""

    @model_validator(mode="after")
    def _kl_can_move(self) -> OnlineSettings:
        if self.adaptive_kl is not None and (self.kl_in == "loss" or not self.kl_coef):
            raise ValueError("adaptive_kl moves the price of the KL in the reward: kl_in=reward and kl_coef above 0")
        return self


def rollout_source(stage: Stage, estimate: Estimator, *, warm_up: int = 0) -> RolloutSource:
    """Rounds of experience, estimated by ``estimate``, for a loss on what was sampled."""
    settings: OnlineSettings = stage.settings
    prompts, collector = collecting(stage, whole_kl=settings.kl_estimator == "full")
    mixed = MixedSource(stage, settings.mixed) if settings.mixed is not None else None
    return RolloutSource(stage, collector, prompts, Shaper(settings), estimate, mixed=mixed, warm_up=warm_up)


def collecting(stage: Stage, *, sampler: Sampler | None = None, **more: Any) -> tuple[list[Prompt], Collector]:
    """The prompts that fit, and what makes experience of them, by default with the policy's samples; ``more`` as
    `Collector` has it."""
    settings: SamplingSettings = stage.settings
    prompts, counts = stage.renderer.prompts(list(stage.records))
    stage.count("train", counts)
    collector = Collector(
        sampler=sampler or open_sampler(settings.engine, stage.models, stage.renderer, rows=settings.rollout_rows),
        reward=the_reward(stage),
        models=stage.models,
        renderer=stage.renderer,
        screen=screen_of(stage),
        watch=watched(stage) if settings.watch_rounds else {},
        store=RolloutStore(stage.folder / "rounds", stage.ranks),
        sampling=settings.sampling,
        num_samples=settings.num_samples,
        seed=stage.recipe.seed,
        rows=settings.rollout_rows,
        budget=lambda: stage.budget.tokens,
        ranks=stage.ranks,
        own_sampler=sampler is None and settings.engine == "native" and stage.models.full_precision,
        **more,
    )
    return [prompt for prompt, _ in prompts], collector


def screen_of(stage: Stage) -> Screen | None:
    """What cleans and discards, in the algorithms that do."""
    settings = stage.settings
    return (
        open_screen(stage.renderer, settings.clean, settings.discard) if isinstance(settings, ScreenSettings) else None
    )


def learned_from(experience: Experience, settings: OnlineSettings) -> dict[str, list[Tensor]]:
    """What every loss on sampled responses reads beside the advantages, one tensor [length] a response."""
    tokens = {"behaviour_logprobs": experience.tokens["behaviour_logprobs"]}
    if settings.kl_in == "loss" and settings.kl_coef:
        tokens["reference_logprobs"] = experience.tokens["reference_logprobs"]
    if settings.engine != "native" and settings.importance_cap is not None:
        pairs = zip(experience.tokens["behaviour_logprobs"], experience.tokens["sampled_logprobs"], strict=True)
        tokens["weights"] = [(ours - theirs).exp().clamp(max=settings.importance_cap) for ours, theirs in pairs]
    return tokens


def the_reward(stage: Stage) -> Reward:
    """What is optimised; opened once, for training and evaluation."""
    if "reward" in stage.opened:
        return stage.opened["reward"]
    where = stage.objects.get("reward", stage.settings.reward)
    if where is None:
        name = stage.recipe.algorithm
        raise ConfigError("no reward to optimise", hint=f"set {name}.reward to a reward run or to module:function")
    stage.opened["reward"] = open_reward(where, stage.renderer, device=stage.models.device, models=stage.models)
    return stage.opened["reward"]


def watched(stage: Stage) -> dict[str, Reward]:
    """Those that are only measured, by name; opened once."""
    if "watch" not in stage.opened:
        stage.opened["watch"] = {
            name: open_reward(where, stage.renderer, device=stage.models.device, models=stage.models)
            for name, where in stage.settings.watch.items()
        }
    return stage.opened["watch"]


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    """Score, watched scores, KL to the reference, length and variety of responses to held-out prompts, what would be
    discarded of them, and the perplexity of the answers that the data have to these prompts."""
    settings: SamplingSettings = stage.settings
    given = [Prompt(text) for text in settings.eval_prompts]
    prompts, counts = stage.renderer.prompts(given or list(stage.eval_records))
    stage.count("eval", counts)
    chosen = [prompt for prompt, _ in prompts]
    chosen = chosen if given else chosen[: settings.num_eval_prompts]
    sampler = open_sampler(settings.engine, stage.models, stage.renderer, rows=settings.rollout_rows)
    rewards = {"score": the_reward(stage)} | watched(stage)
    answers = _answers(stage, chosen)
    screen = screen_of(stage)
    sampling = settings.sampling
    if settings.eval_temperature is not None:
        sampling = replace(sampling, temperature=settings.eval_temperature)

    def measure() -> dict[str, float]:
        key, number, part = (stage.recipe.seed, "evaluation"), settings.eval_samples, stage.ranks.part(len(chosen))
        own = chosen[part.start : part.stop]
        with stage.models.whole():
            rollouts = sampler.generate(own, sampling=sampling, key=key, first_item=part.start, num_samples=number)
            told = {
                "scores": {name: list(reward(rollouts).values) if rollouts else [] for name, reward in rewards.items()},
                "kl": _kl(stage, rollouts, number, sampling.temperature),
                "lengths": [len(rollout.response_ids) for rollout in rollouts],
                "finished": [rollout.finished for rollout in rollouts],
                "texts": [rollout.text for rollout in rollouts],
                "reasons": screen(rollouts)[1] if screen is not None and rollouts else [],
                "likelihood": _likelihood(stage, answers),
            }
        told = stage.ranks.gather(told)

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        def all_of(name: str) -> list[Any]:
            return [each for share in told for each in share[name]]

        scores = {name: [value for share in told for value in share["scores"][name]] for name in rewards}
        texts, likelihood = all_of("texts"), all_of("likelihood")
        if given and stage.ranks.is_leader:
            _keep(stage, chosen, texts, scores["score"], number)
        levels = {name: level(torch.split(torch.tensor(values), number)) for name, values in scores.items()}
        return {
            **{f"eval/{name}": middle for name, (middle, _) in levels.items()},
            **{f"eval/{name}_margin": margin for name, (_, margin) in levels.items()},
            **({"eval/kl": mean(all_of("kl"))} if "reference" in stage.models.roles else {}),
            "eval/length": mean(all_of("lengths")),
            "eval/finished": mean(all_of("finished")),
            **{f"eval/{name}": value for name, value in variety(texts).items()},
            **({} if screen is None else {f"eval/{name}": v for name, v in shares_of(all_of("reasons")).items()}),
            **({"eval/perplexity": math.exp(-mean(likelihood))} if likelihood else {}),
        }

    return measure


def _kl(stage: Stage, rollouts: Sequence[Rollout], number: int, temperature: float) -> list[float]:
    """Of each response."""
    if "reference" not in stage.models.roles or not rollouts:
        return []
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    tokens = measure_tokens(
        stage.models,
        trees_of(rollouts, number),
        temperature=temperature,
        budget=stage.budget.tokens,
        support_of=partial(select_support, drawn_from(rollouts), lengths),
        others=("reference",),
    )
    pairs = zip(tokens["behaviour_logprobs"], tokens["reference_logprobs"], strict=True)
    return [float(k1(a, b).sum()) for a, b in pairs]


def _answers(stage: Stage, prompts: Sequence[Prompt]) -> list[Tree]:
    """What the data answer to the prompts, where they do."""
    known = [Demonstration(each.prompt, each.answer, each.tools) for each in prompts if each.answer is not None]
    return [Tree(tree.prompt, tree.responses) for tree in stage.renderer.limited(known)[0]]


def _likelihood(stage: Stage, answers: Sequence[Tree]) -> list[float]:
    """The log-probability of each token of this rank's share of the answers."""
    part = stage.ranks.part(len(answers))
    own = answers[part.start : part.stop]
    if not own:
        return []
    measured = measure_tokens(stage.models, own, temperature=1.0, budget=stage.budget.tokens, others=())
    values: Any = torch.cat(measured["behaviour_logprobs"]).double()
    return values.tolist()


def _keep(stage: Stage, prompts: Sequence[Prompt], texts: Sequence[str], scores: Sequence[float], number: int) -> None:
    """Each prompt's mean score, and a response, in eval_prompts.jsonl."""
    rows = [
        {
            "step": stage.step(),
            "prompt": stage.renderer.prompt_text(prompt),
            "score": sum(own := scores[i * number : (i + 1) * number]) / number,
            "scores": list(own),
            "response": texts[i * number],
        }
        for i, prompt in enumerate(prompts)
    ]
    RunDirectory(stage.folder).append("eval_prompts.jsonl", rows)
