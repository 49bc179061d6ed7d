"""Opens what a recipe, or a caller in Python, names as a reward: one source, or several whose weighted scores add
up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError
from fairlead.models.roles import Models
from fairlead.rollout.rewards.calls import import_function
from fairlead.rollout.rewards.classify import LabelReward
from fairlead.rollout.rewards.functions import FunctionJudge, RuleJudge, TextReward
from fairlead.rollout.rewards.models import (
    ClassifierReward,
    EnsembleReward,
    distinct,
    is_trained_reward,
    load_classifier,
    open_model,
)
from fairlead.rollout.rewards.remote import UrlJudge
from fairlead.rollout.rewards.settings import (
    FunctionSource,
    Given,
    ModelSource,
    RuleSource,
    Spec,
    UrlSource,
    sources,
)
from fairlead.types import Reward, Rollout, Scores


def open_reward(source: Given, renderer: Renderer, *, device: torch.device, models: Models | None = None) -> Reward:
    """A reward from its short form or a source in full (`settings.RewardSource`), from a function, or from a list of
    these. ``renderer`` is the policy's: it says how a prompt reads as text; ``models`` are the policy's, on whose base
    a trained reward may be a role. Raises ConfigError and ModelError for what cannot be opened."""
    found = sources(source)
    if not found:
        raise ConfigError(f"no reward: {source!r} names none", hint="give one source or several")
    opened = [_open(each, renderer, device, models) for each in found]
    weights = [1.0 if callable(each) else each.weight for each in found]
    return opened[0] if len(opened) == 1 and weights == [1.0] else WeightedReward(opened, weights)


def _open(source: Spec | Callable[..., Any], renderer: Renderer, device: torch.device, models: Models | None) -> Reward:
    match source:
        case ModelSource():
            return _open_models(source, renderer, device, models)
        case FunctionSource():
            function = import_function(source.function)
            return TextReward(
                FunctionJudge(function, source.called, renderer.tokenizer, source), source.called, renderer
            )
        case RuleSource():
            return TextReward(RuleJudge(source, source.called), source.called, renderer)
        case UrlSource():
            return TextReward(UrlJudge(source), source.called, renderer)
        case _:
            name = getattr(source, "__name__", type(source).__name__)
            return TextReward(FunctionJudge(source, name, renderer.tokenizer), name, renderer)


def _open_models(source: ModelSource, renderer: Renderer, device: torch.device, models: Models | None) -> Reward:
    if not isinstance(source.path, str):
        own = source.model_dump(include={"max_length", "batch_size"})
        members = [
            open_model(path, device=device, models=models, options=ModelSource(path=path, **own))
            for path in source.path
        ]
        return EnsembleReward(members, source)
    if is_trained_reward(source.path):
        return open_model(source.path, device=device, models=models, options=source)
    origin, model = load_classifier(source.path, device)
    if hasattr(model, "score") and model.config.num_labels == 1 and (source.label, source.use) == (None, None):
        return ClassifierReward(origin, model, device, options=source)
    return LabelReward(origin, model, renderer, source)


class WeightedReward:
    """The sum of several rewards, each times its weight. ``parts`` holds what each says itself and, after its name and
    a stroke, its own parts."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self._rewards, self._weights = rewards, weights
        self._names = distinct([reward.name for reward in rewards])
        self.name = " + ".join(self._names)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        found = [reward(rollouts) for reward in self._rewards]
        values = tuple(self._sum(of_one) for of_one in zip(*(each.values for each in found), strict=True))
        parts: dict[str, tuple[float, ...]] = {}
        for name, each in zip(self._names, found, strict=True):
            parts |= {name: each.values} | {f"{name}/{part}": own for part, own in each.parts.items()}
        if all(each.tokens is None for each in found):
            return Scores(values, parts=parts)
        dense = zip(*(_tokens(each, rollouts) for each in found), strict=True)
        tokens = tuple(tuple(map(self._sum, zip(*of_one, strict=True))) for of_one in dense)
        return Scores(tuple(map(sum, tokens)), tokens, parts)

    def _sum(self, of_each: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self._weights, of_each, strict=True))


def _tokens(scores: Scores, rollouts: Sequence[Rollout]) -> Sequence[tuple[float, ...]]:
    """One number a token: a score of a whole response stands at its last."""
    if scores.tokens is not None:
        return scores.tokens
    return [
        (*[0.0] * (len(rollout.response_ids) - 1), value)
        for rollout, value in zip(rollouts, scores.values, strict=True)
    ]
