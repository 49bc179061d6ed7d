"""Sequence classifiers of transformers as rewards: any family, with a tokenizer and labels of its own, reading prompt
and response as one text. Equal to transformers' text-classification pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairlead.config_file import suggest
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, ModelError
from fairlead.models.load import load_tokenizer
from fairlead.rollout.rewards.functions import Asked
from fairlead.rollout.rewards.models import computing
from fairlead.rollout.rewards.returned import number
from fairlead.rollout.rewards.settings import ModelSource
from fairlead.types import Rollout, Scores

ROWS = 32
"""Texts of one forward pass, where a source does not say."""


class LabelReward:
    """The probability or the logit of one label. ``renderer`` is the policy's, which says how the text reads."""

    def __init__(self, origin: str, model: Any, renderer: Renderer, options: ModelSource) -> None:
        for key in ("combine", "disagreement_weight"):
            if getattr(options, key) is not None:
                raise ConfigError(f"{key} has no effect on {origin}: it is a classifier, not a reward of several heads")
        self.name, self._model, self._renderer = options.called, model, renderer
        self._tokenizer = load_tokenizer(origin)
        self._label = _label(model.config, options.label, origin)
        self._of = _function(model.config, options.use)
        self._rows = options.batch_size or ROWS
        limits = (options.max_length, self._tokenizer.model_max_length, _positions(model))
        self._max_length = min(limit for limit in limits if limit is not None)
        if self._tokenizer.pad_token_id is None:
            raise ModelError(f"{origin}: its tokenizer has neither a padding nor an end token", hint="set pad_token")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        found = self.scores(Asked.of(rollouts, self._renderer).samples)[:, self._label].tolist()
        return Scores(tuple(number(score, self.name, r.text) for score, r in zip(found, rollouts, strict=True)))

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> Tensor:
        """Of each label. [R, labels] fp32 on the CPU"""
        found = torch.zeros(len(texts), self._model.config.num_labels)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), self._rows):
            chosen = order[at : at + self._rows]
            inputs = self._tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            with computing(self._model):
                logits = self._model(**inputs.to(self._model.device)).logits
            found[chosen] = self._of(logits.float()).cpu()
        return found


def _label(config: Any, wanted: str | None, place: str) -> int:
    """Which of the labels is the score."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    if wanted is None and len(names) == 1:
        return 0
    if wanted not in names:
        what = (
            f"label={wanted} is none of the labels" if wanted else "label does not say which of the labels is the score"
        )
        raise ConfigError(
            f"{what} of {place}: {', '.join(names)}", hint=suggest(wanted, names) if wanted else f"label={names[-1]}"
        )
    return names.index(wanted)


def _function(config: Any, use: str | None) -> nn.Module:
    """From logits to scores."""
    if use == "logit" or (use is None and (config.num_labels == 1 or config.problem_type == "regression")):
        return nn.Identity()
    if config.num_labels == 1 or config.problem_type == "multi_label_classification":
        return nn.Sigmoid()
    return nn.Softmax(-1)


def _positions(model: Any) -> int | None:
    """Tokens its positions reach; RoBERTa's begin behind that of the padding token."""
    number = getattr(model.config, "max_position_embeddings", None)
    if number is None or number < 1:
        return None
    tables = (each for name, each in model.named_modules() if name.endswith("position_embeddings"))
    first = max((each.padding_idx + 1 for each in tables if getattr(each, "padding_idx", None) is not None), default=0)
    return number - first
