"""Rewards by text: a trained reward with its own tokenizer and template, a model of its own or a role on the policy's
base; or a Python function."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fairlead.config import ModelSection
from fairlead.data.pack import micro_batches, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.errors import ConfigError, ModelError, TrainingError
from fairlead.models.adapters import StartAdapter, saved_score, saved_settings
from fairlead.models.identity import weights_sha256
from fairlead.models.load import base_of, base_origin, load_base, load_tokenizer, read_meta, resolve_folder
from fairlead.models.pretrained import read_model
from fairlead.models.roles import Models
from fairlead.types import Conversation, Message, Prompt, Reward, Rollout, Scores

RewardFunction = Callable[..., Sequence[float]]
"""trlX's signature: ``samples, prompts, outputs, **columns`` -> one number a sample."""
Judgeable = tuple[Conversation | Prompt, str | Message]
"""A prompt and a response to it."""


def open_reward(
    source: str | RewardFunction, renderer: Renderer, *, device: torch.device, models: Models | None = None
) -> Reward:
    """A reward from a run or folder, from `module:function`, or from a function. ``renderer`` is the policy's: it says
    how a prompt reads as text; ``models`` are the policy's, on whose base the reward may be a role."""
    if not isinstance(source, str):
        return FunctionReward(source, getattr(source, "__name__", "function"), renderer)
    if ":" in source and not Path(source).exists():
        return FunctionReward(import_function(source), source, renderer)
    return open_model(source, device=device, models=models)


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

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
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
        return Scores(tuple(_checked(scores, rollouts, self.name)))


class ModelReward:
    """A reward model read at the last token of prompt + response + end of sequence, with the tokenizer and template it
    was trained with."""

    def __init__(self, origin: str, *, max_length: int, packed: bool, budget: int) -> None:
        self.name, self._packed, self._budget = "score", packed, budget
        folder = resolve_folder(origin)
        template = read_meta(folder).get("template", "auto")
        self._renderer = Renderer(load_tokenizer(origin), template=template, max_length=max_length)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(tuple(self.score([(rollout.prompt, rollout.text) for rollout in rollouts], rollouts)))

    @property
    def max_length(self) -> int:
        """Tokens that are read."""
        return self._renderer.max_length

    def score(self, texts: Sequence[Judgeable], rollouts: Sequence[Rollout] = ()) -> list[float]:
        """Scores of (prompt, response) pairs."""
        return self.score_ids(self.ids(texts), rollouts)

    def ids(self, texts: Sequence[Judgeable]) -> list[tuple[int, ...]]:
        """Prompt, response and end of sequence as tokens, whole."""
        prompts = self._renderer.prompt_ids([prompt for prompt, _ in texts])
        responses = self._renderer.response_ids(texts)
        return [(*prompt, *response) for prompt, response in zip(prompts, responses, strict=True)]

    @torch.no_grad()
    def score_ids(self, rows: Sequence[tuple[int, ...]], rollouts: Sequence[Rollout] = ()) -> list[float]:
        """Scores of what ``ids`` gave; of a row longer than ``max_length`` the beginning is left out."""
        rows = [row[-self.max_length :] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        for group in micro_batches([len(rows[i]) for i in order], self._budget, packed=self._packed):
            chosen = [order[i] for i in group]
            for index, score in zip(chosen, self._forward([rows[i] for i in chosen]).tolist(), strict=True):
                scores[index] = score
        return _checked(scores, rollouts, self.name)

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """[rows]"""
        raise NotImplementedError


class ClassifierReward(ModelReward):
    """A sequence classifier of one label: a model of its own, of any family."""

    def __init__(self, source: str, *, device: torch.device, budget: int = 8192) -> None:
        folder = resolve_folder(source)
        origin = source if folder is None else str(folder)
        self._model: Any = read_model(origin, torch.float32, device, kind="sequence classifier")
        if not hasattr(self._model, "score") or self._model.config.num_labels != 1:
            raise ModelError(
                f"{source} has {self._model.config.num_labels} labels; a reward model has one",
                hint="give the run of a reward stage, or a sequence classifier with num_labels=1",
            )
        self._model.eval().requires_grad_(False)
        self._device = device
        limit = self._model.config.max_position_embeddings
        super().__init__(origin, max_length=limit, packed=False, budget=budget)

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        width, pad = max(map(len, rows)), self._renderer.eos
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = torch.arange(width, device=self._device)[None] < lengths[:, None]
        hidden = self._model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=self._device), lengths - 1]
        return self._model.score(last)[:, 0].float()


class RoleReward(ModelReward):
    """The role ``reward`` of some models: a frozen adapter and its head, on the policy's base or on one of its own."""

    def __init__(self, models: Models, *, budget: int = 8192) -> None:
        assert models.shared_reward is not None
        self._models = models
        limit = models.causal.config.max_position_embeddings
        super().__init__(str(models.shared_reward.path), max_length=limit, packed=models.forest, budget=budget)

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        trees = [Tree((), (row,)) for row in rows]
        batch = token_batch(trees, packed=self._packed, pad_id=self._renderer.eos).to(self._models.device)
        with self._models.use("reward"):
            return self._models(batch, frozenset({"scores"})).scores.float()


def open_model(source: str, *, device: torch.device, models: Models | None = None) -> ModelReward:
    """A trained reward: on the base of ``models`` where it is a role of theirs, else a model of its own."""
    folder = resolve_folder(source)
    meta = read_meta(folder)
    if meta.get("role", "reward") != "reward":
        raise ModelError(f"{source} was trained as a policy and has no reward head", hint="give a reward run")
    if folder is None or not (folder / "adapter_config.json").is_file():
        return ClassifierReward(source, device=device)
    if models is not None and models.shared_reward is not None and models.shared_reward.path == folder:
        return RoleReward(models)
    saved_score(folder)
    quantize = meta.get("base", {}).get("quantize")
    section = ModelSection(path=source, adapter=saved_settings(folder), quantize=quantize)
    base = load_base(section, load_tokenizer(str(folder)), None, seed=0, device=device)
    return RoleReward(Models(base, (), reward=base.start))


def shared_reward(source: Any, section: ModelSection) -> tuple[StartAdapter | None, str]:
    """The adapter of a reward run that stands on the base of the policy's adapters; or none, and why it is a model of
    its own. Raises ConfigError where `model.roles` says shared and it cannot be."""
    if not isinstance(source, str) or (":" in source and not Path(source).exists()):
        return None, ""
    folder = resolve_folder(source)
    if folder is None or not (folder / "adapter_config.json").is_file():
        why = "it is a whole model, not an adapter"
    elif section.roles == "separate":
        why = "model.roles=separate"
    elif section.adapter is None or section.path is None:
        why = "the policy trains no adapter on a base that is saved"
    else:
        ours, theirs = base_origin(section.path), base_of(folder)
        if Path(ours).resolve() == Path(theirs).resolve() or (weights_sha256(ours) or ours) == weights_sha256(theirs):
            return StartAdapter.read(folder), ""
        why = f"its base is {theirs}, the policy's is {ours}"
    if section.roles == "shared":
        raise ConfigError(
            f"model.roles=shared, but the reward {source} cannot stand on the policy's base: {why}",
            hint="model.roles=auto",
        )
    return None, why


def _checked(scores: Any, rollouts: Sequence[Rollout], name: str) -> list[float]:
    numbers = [float(score) for score in scores]
    if rollouts and len(numbers) != len(rollouts):
        raise TrainingError(f"the reward {name} returned {len(numbers)} scores for {len(rollouts)} samples")
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            sample = repr(rollouts[index].text[:200]) if rollouts else f"number {index}"
            raise TrainingError(f"the reward {name} returned {number} for the sample {sample}")
    return numbers
