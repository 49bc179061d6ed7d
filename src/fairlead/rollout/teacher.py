"""Another model than the one trained, as what samples: its answers are read as texts, so that it may have a tokenizer
and a template of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fairlead.config import ModelSection
from fairlead.data.render import Renderer
from fairlead.errors import ModelError
from fairlead.models.load import load_base, load_tokenizer, read_meta, resolve_folder
from fairlead.models.precision import autocast_of
from fairlead.models.roles import Models
from fairlead.rollout.engines import Engine, open_sampler
from fairlead.rollout.screen import rewritten
from fairlead.types import Prompt, Rollout, Sampler, Sampling


class TeacherSampler:
    """Samples from a teacher, and hands on what a student with ``renderer`` reads: prompts and responses in its own
    tokens, cut where its rows end."""

    def __init__(self, sampler: Sampler, renderer: Renderer) -> None:
        self._sampler, self._renderer = sampler, renderer

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling,
        key: tuple[int | str, ...],
        first_item: int = 0,
        num_samples: int = 1,
    ) -> list[Rollout]:
        rollouts = self._sampler.generate(
            prompts, sampling=sampling, key=key, first_item=first_item, num_samples=num_samples
        )
        asked = [ids for ids in self._renderer.prompt_ids(prompts) for _ in range(num_samples)]
        answers = self._renderer.response_ids([(rollout.prompt, rollout.text) for rollout in rollouts])
        return [self._read(*row) for row in zip(rollouts, asked, answers, strict=True)]

    def _read(self, rollout: Rollout, prompt: tuple[int, ...], response: tuple[int, ...]) -> Rollout:
        room = self._renderer.max_length - len(prompt)
        whole = response if rollout.finished or len(response) == 1 else response[:-1]
        finished = rollout.finished and len(whole) <= room
        return replace(rewritten(rollout, rollout.text, whole[:room], finished=finished), prompt_ids=prompt)


def open_teacher(path: str, renderer: Renderer, *, engine: Engine, rows: int, device: torch.device) -> TeacherSampler:
    """The policy of a finished run, or a causal language model in a folder or on the hub, an adapter merged. Raises
    ModelError for a reward model."""
    models, own = open_policy(path, "teacher", renderer.template, max_length=renderer.max_length, device=device)
    return TeacherSampler(open_sampler(engine, models, own, rows=rows), renderer)


def open_policy(
    path: str, name: str, template: str = "plain", *, max_length: int, device: torch.device
) -> tuple[Models, Renderer]:
    """A model that answers, an adapter merged, and how it reads: by its own template, else by ``template``. ``name`` is
    that of the setting that gave ``path``. Raises ModelError for a reward model."""
    meta = read_meta(resolve_folder(path))
    if meta.get("role", "policy") != "policy":
        raise ModelError(f"{name}={path} is a {meta['role']} model, which answers nothing", hint="give a policy")
    tokenizer, own = load_tokenizer(path), meta.get("template")
    section = ModelSection(path=path)
    models = Models(
        load_base(section, tokenizer, own, seed=0, device=device), ("policy",), autocast=autocast_of(section, device)
    )
    return models, Renderer(tokenizer, template=own or template, max_length=max_length)
