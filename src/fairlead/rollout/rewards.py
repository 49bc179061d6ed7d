"""Rewards by text: a trained reward model with its own tokenizer and template, or a Python function."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fairlead.data.pack import micro_batches
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, ModelError, TrainingError
from fairlead.models.load import load_tokenizer, read_meta, resolve_folder
from fairlead.types import Conversation, Prompt, Reward, Rollout

RewardFunction = Callable[..., Sequence[float]]
"""trlX's signature: ``samples, prompts, outputs, **columns`` -> one number a sample."""


def open_reward(source: str | RewardFunction, renderer: Renderer, *, device: torch.device) -> Reward:
    """A reward from a run or folder, from `module:function`, or from a function. ``renderer`` is the policy's: it says
    how a prompt reads as text."""
    if not isinstance(source, str):
        return FunctionReward(source, getattr(source, "__name__", "function"), renderer)
    if ":" in source and not Path(source).exists():
        return FunctionReward(import_function(source), source, renderer)
    return ModelReward(source, device=device)


def import_function(source: str) -> RewardFunction:
    module, _, name = source.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"no reward {source!r}: {error}", hint="write module:function, importable from here"
        ) from error
    if not callable(function):
        raise ConfigError(f"{source} is a {type(function).__name__}, not a function")
    return cast(RewardFunction, function)


class FunctionReward:
    def __init__(self, function: RewardFunction, name: str, renderer: Renderer) -> None:
        self._function, self.name, self._renderer = function, name, renderer

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        prompts = [self._renderer.prompt_text(rollout.prompt) for rollout in rollouts]
        outputs = [rollout.text for rollout in rollouts]
        samples = [
            prompt + self._renderer.response_text(rollout.prompt, rollout.text)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        names = {name for rollout in rollouts for name in rollout.prompt.columns}
        columns = {name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in sorted(names)}
        try:
            scores = self._function(samples=samples, prompts=prompts, outputs=outputs, **columns)
        except Exception as error:
            raise TrainingError(
                f"the reward {self.name} raised {type(error).__name__}: {error}",
                hint="mend the function; the same command continues the run",
            ) from error
        return _checked(scores, rollouts, self.name)


class ModelReward:
    """A sequence classifier of one label, read at the last token of prompt + response + end of sequence."""

    def __init__(self, source: str, *, device: torch.device, budget: int = 8192) -> None:
        from transformers import AutoModelForSequenceClassification

        folder = resolve_folder(source)
        origin = source if folder is None else str(folder)
        if read_meta(folder).get("role", "reward") != "reward":
            raise ModelError(f"{source} was trained as a policy and has no reward head", hint="give a reward run")
        try:
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(origin, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(f"{source} cannot be loaded as a reward model: {error}") from error
        if not hasattr(self._model, "score") or self._model.config.num_labels != 1:
            raise ModelError(
                f"{source} has {self._model.config.num_labels} labels; a reward model has one",
                hint="give the run of a reward stage, or a sequence classifier with num_labels=1",
            )
        self._model.to(device).eval().requires_grad_(False)
        self.name, self._device, self._budget = "score", device, budget
        self._renderer = Renderer(
            load_tokenizer(origin),
            template=read_meta(folder).get("template", "auto"),
            max_length=self._model.config.max_position_embeddings,
        )

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return self.score([(rollout.prompt, rollout.text) for rollout in rollouts], rollouts)

    @torch.no_grad()
    def score(
        self, texts: Sequence[tuple[Conversation | Prompt, str]], rollouts: Sequence[Rollout] = ()
    ) -> list[float]:
        """Scores of (prompt, response) pairs."""
        render = self._renderer
        prompts = render.prompt_ids([prompt for prompt, _ in texts])
        responses = render.response_ids(texts)
        rows = [(*prompt, *response)[-render.max_length :] for prompt, response in zip(prompts, responses, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        for group in micro_batches([len(rows[i]) for i in order], self._budget, packed=False):
            chosen = [order[i] for i in group]
            width = max(len(rows[i]) for i in chosen)
            ids = torch.tensor(
                [[*rows[i], *[render.eos] * (width - len(rows[i]))] for i in chosen], device=self._device
            )
            lengths = torch.tensor([len(rows[i]) for i in chosen], device=self._device)
            mask = torch.arange(width, device=self._device)[None] < lengths[:, None]
            hidden = self._model.base_model(
                input_ids=ids, attention_mask=mask.long(), use_cache=False
            ).last_hidden_state
            last = hidden[torch.arange(len(chosen), device=self._device), lengths - 1]
            for index, score in zip(chosen, self._model.score(last)[:, 0].float().tolist(), strict=True):
                scores[index] = score
        return _checked(scores, rollouts, self.name)


def _checked(scores: Any, rollouts: Sequence[Rollout], name: str) -> list[float]:
    numbers = [float(score) for score in scores]
    if rollouts and len(numbers) != len(rollouts):
        raise TrainingError(f"the reward {name} returned {len(numbers)} scores for {len(rollouts)} samples")
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            sample = repr(rollouts[index].text[:200]) if rollouts else f"number {index}"
            raise TrainingError(f"the reward {name} returned {number} for the sample {sample}")
    return numbers
