"""Trained rewards, read at the last token of prompt + response + end of sequence with the tokenizer and template they
were trained with: a model of its own, a role on the policy's base, or several as an ensemble."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fairlead.config import ModelSection
from fairlead.config_file import suggest
from fairlead.data.pack import micro_batches, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.errors import ConfigError, ModelError, TrainingError
from fairlead.models.adapters import saved_score, saved_settings
from fairlead.models.heads import RewardHeads
from fairlead.models.load import load_base, load_tokenizer, read_meta, resolve_folder
from fairlead.models.precision import fast_at_bf16
from fairlead.models.pretrained import read_config, read_model
from fairlead.models.roles import Models
from fairlead.ops.scores import disagreement
from fairlead.rollout.rewards.returned import sample
from fairlead.rollout.rewards.settings import ModelSource, short_name
from fairlead.types import Conversation, Message, Prompt, Rollout, Scores

Judgeable = tuple[Conversation | Prompt, str | Message]
"""A prompt and a response to it."""
BUDGET = 8192
"""Tokens of one forward pass."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How the numbers a reward has of a text become one: as its heads were saved, or as a source says."""

    saved: RewardHeads
    disagreement_weight: float = 1.0
    picked: int | None = None
    """The one head that is the score."""

    @classmethod
    def of(cls, saved: RewardHeads | None, options: ModelSource | None, place: object) -> Heads | None:
        """None for a reward of one head. Raises ConfigError for options that say nothing of this reward."""
        asked = (
            {} if options is None else options.model_dump(include={"label", "use", "combine", "disagreement_weight"})
        )
        given = {key: value for key, value in asked.items() if value is not None}
        if saved is None:
            given.pop("use", None)
            if given:
                raise ConfigError(f"{next(iter(given))} has no effect on {place}: it is a reward of one head")
            return None
        if "use" in given:
            raise ConfigError(
                f"use={given['use']}, but {place} is a trained reward of several heads: their score is no log-odds"
            )
        picked = None
        if "label" in given:
            if given["label"] not in saved.names:
                raise ConfigError(
                    f"{place} has no head {given['label']!r}: {', '.join(saved.names)}",
                    hint=suggest(given["label"], saved.names),
                )
            if len(given) > 1:
                raise ConfigError(f"label={given['label']} picks one head of {place}, so nothing is combined")
            picked = saved.names.index(given["label"])
        saved = replace(saved, combine=given.get("combine", saved.combine))
        if "disagreement_weight" in given and saved.combine != "mean-minus-disagreement":
            raise ConfigError(
                f"disagreement_weight has no effect on {place}: its scores become one by combine={saved.combine}",
                hint="combine=mean-minus-disagreement",
            )
        return cls(saved, given.get("disagreement_weight", 1.0), picked)

    def combined(self, scores: Tensor) -> Tensor:
        """[R, K] -> [R]"""
        if self.picked is not None:
            return scores[:, self.picked]
        if self.saved.combine == "mean-minus-disagreement":
            return self.saved.mean(scores) - self.disagreement_weight * disagreement(scores)
        return self.saved.combined(scores)

    def parts(self, scores: Tensor) -> dict[str, tuple[float, ...]]:
        """Each head by name, and how far the members of an ensemble disagree."""
        parts = dict(zip(self.saved.names, map(tuple, scores.T.tolist()), strict=True))
        if self.saved.kind == "ensemble":
            parts["disagreement"] = tuple(disagreement(scores).tolist())
        return parts


class ModelReward(ABC):
    """A trained reward. ``heads`` is none where it has one."""

    def __init__(
        self, origin: str, config: Any, *, packed: bool, heads: Heads | None, options: ModelSource | None, budget: int
    ) -> None:
        self.name = short_name(origin) if options is None else options.called
        self.heads, self._packed, self._budget = heads, packed, budget
        self._rows = options and options.batch_size
        self._is_probability = options is not None and options.use == "probability"
        limit = getattr(config, "max_position_embeddings", None) or 2**31
        if options is not None and options.max_length is not None:
            limit = min(limit, options.max_length)
        template = read_meta(resolve_folder(origin)).get("template", "auto")
        self._renderer = Renderer(load_tokenizer(origin), template=template, max_length=limit)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        ids = self.ids([(rollout.prompt, rollout.text) for rollout in rollouts])
        matrix = self.matrix_ids(ids, [rollout.text for rollout in rollouts])
        parts = {} if self.heads is None else self.heads.parts(matrix)
        return Scores(tuple(self._combined(matrix).tolist()), parts=parts)

    @property
    def max_length(self) -> int:
        """Tokens that are read."""
        return self._renderer.max_length

    def score(self, texts: Sequence[Judgeable]) -> list[float]:
        """Scores of (prompt, response) pairs."""
        return self.score_ids(self.ids(texts))

    def matrix(self, texts: Sequence[Judgeable]) -> Tensor:
        """What each head says of (prompt, response) pairs. [R, K] fp32 on the CPU"""
        return self.matrix_ids(self.ids(texts))

    def ids(self, texts: Sequence[Judgeable]) -> list[tuple[int, ...]]:
        """Prompt, response and end of sequence as tokens, whole."""
        prompts = self._renderer.prompt_ids([prompt for prompt, _ in texts])
        responses = self._renderer.response_ids(texts)
        return [(*prompt, *response) for prompt, response in zip(prompts, responses, strict=True)]

    def score_ids(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        """Scores of what ``ids`` gave; of a row longer than ``max_length`` the beginning is left out."""
        return self._combined(self.matrix_ids(rows)).tolist()

    @torch.no_grad()
    def matrix_ids(self, rows: Sequence[tuple[int, ...]], texts: Sequence[str] = ()) -> Tensor:
        """`matrix` of what ``ids`` gave. Raises TrainingError for what is no finite number, with the sample of
        ``texts``."""
        rows = [row[-self.max_length :] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = torch.zeros(len(rows), 1 if self.heads is None else len(self.heads.saved.names))
        for group in micro_batches([len(rows[i]) for i in order], self._budget, packed=self._packed):
            size = self._rows or len(group)
            for at in range(0, len(group), size):
                chosen = [order[i] for i in group[at : at + size]]
                found[chosen] = self._forward([rows[i] for i in chosen]).float().cpu()
        for index in map(int, (~found.isfinite()).any(1).nonzero()[:, 0]):
            said = ", ".join(f"{value:g}" for value in found[index].tolist())
            what = sample(texts[index]) if texts else f"number {index}"
            raise TrainingError(f"the reward {self.name} returned {said} for the sample {what}")
        return found

    def _combined(self, matrix: Tensor) -> Tensor:
        scores = matrix[:, 0] if self.heads is None else self.heads.combined(matrix)
        return scores.sigmoid() if self._is_probability else scores

    @abstractmethod
    def _forward(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """[rows, K]"""


class ClassifierReward(ModelReward):
    """A sequence classifier whose labels are the heads: a model of its own, of any family."""

    def __init__(
        self, origin: str, model: Any, device: torch.device, *, options: ModelSource | None = None, budget: int = BUDGET
    ) -> None:
        self._model, self._device = model, device
        if not hasattr(model, "score"):
            raise ModelError(
                f"{origin} is a {model.config.model_type} classifier, which does not read at the last token",
                hint="it can be what is optimised, as path and label; here give the run of a reward stage",
            )
        saved = RewardHeads.read(read_meta(resolve_folder(origin)), model.config.num_labels, origin)
        heads = Heads.of(saved, options, origin)
        super().__init__(origin, model.config, packed=False, heads=heads, options=options, budget=budget)

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        width, pad = max(map(len, rows)), self._renderer.eos
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = torch.arange(width, device=self._device)[None] < lengths[:, None]
        trunk = self._model.base_model
        with computing(self._model):
            hidden = trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=self._device), lengths - 1]
        return linear(last.float(), self._model.score.weight.float())


class RoleReward(ModelReward):
    """The role ``reward`` of some models: a frozen adapter and its heads, on the policy's base or on one of its own."""

    def __init__(self, models: Models, *, options: ModelSource | None = None, budget: int = BUDGET) -> None:
        assert models.shared_reward is not None
        self._models, place = models, str(models.shared_reward.path)
        heads, config = Heads.of(models.reward_heads, options, place), models.causal.config
        super().__init__(place, config, packed=models.forest, heads=heads, options=options, budget=budget)

    def _forward(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        trees = [Tree((), (row,)) for row in rows]
        batch = token_batch(trees, packed=self._packed, pad_id=self._renderer.eos).to(self._models.device)
        with self._models.use("reward"):
            return self._models(batch, frozenset({"scores"})).head_scores


class EnsembleReward:
    """Several trained rewards of a text, as one."""

    def __init__(self, members: Sequence[ModelReward], options: ModelSource) -> None:
        self.name, self._members = options.called, members
        names = distinct([member.name for member in members])
        saved = RewardHeads("ensemble", names, options.combine or "mean")
        self._heads = Heads.of(saved, options, self.name)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        assert self._heads is not None
        matrix = torch.tensor([member(rollouts).values for member in self._members]).T
        return Scores(tuple(self._heads.combined(matrix).tolist()), parts=self._heads.parts(matrix))


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, one that stood before with a number behind it."""
    numbers = [names[: at + 1].count(name) for at, name in enumerate(names)]
    return tuple(name if number == 1 else f"{name}-{number}" for name, number in zip(names, numbers, strict=True))


def open_model(
    source: str, *, device: torch.device, models: Models | None = None, options: ModelSource | None = None
) -> ModelReward:
    """A trained reward: on the base of ``models`` where it is a role of theirs, else a model of its own. ``options``
    say what is read of it."""
    folder = resolve_folder(source)
    meta = read_meta(folder)
    if meta.get("role", "reward") != "reward":
        raise ModelError(f"{source} was trained as a policy and has no reward head", hint="give a reward run")
    if folder is None or not (folder / "adapter_config.json").is_file():
        return ClassifierReward(*load_classifier(source, device), device, options=options)
    if models is not None and models.shared_reward is not None and models.shared_reward.path == folder:
        return RoleReward(models, options=options)
    saved_score(folder)
    quantize = meta.get("base", {}).get("quantize")
    section = ModelSection(path=source, adapter=saved_settings(folder), quantize=quantize)
    base = load_base(section, load_tokenizer(str(folder)), None, seed=0, device=device)
    return RoleReward(Models(base, (), reward=base.start), options=options)


def load_classifier(source: str, device: torch.device) -> tuple[str, Any]:
    """Where a sequence classifier is, and the model."""
    folder = resolve_folder(source)
    origin = source if folder is None else str(folder)
    dtype = classifier_dtype(read_config(origin, "sequence classifier"), device)
    model: Any = read_model(origin, dtype, device, kind="sequence classifier")
    return origin, model.eval().requires_grad_(False)


def classifier_dtype(config: Any, device: torch.device) -> torch.dtype:
    """Type of its weights: fp32 on a CPU, elsewhere the one they were saved in."""
    return torch.float32 if device.type == "cpu" else getattr(config, "dtype", None) or torch.float32


@contextlib.contextmanager
def computing(model: Any) -> Iterator[None]:
    """Weights in fp32 multiply in bf16 where the device is fast at it, as in the training that made them."""
    fast = model.dtype == torch.float32 and fast_at_bf16(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast):
        yield


def is_trained_reward(source: str) -> bool:
    """It was saved as a reward by us or as an adapter, or it says that it is a policy, which `open_model` refuses."""
    folder = resolve_folder(source)
    return folder is not None and ("role" in read_meta(folder) or (folder / "adapter_config.json").is_file())
