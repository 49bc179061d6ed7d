"""The engines that sample, by name. Each is imported where it is asked for."""

from __future__ import annotations

from typing import Literal

from fairlead.data.render import Renderer
from fairlead.models.roles import Models
from fairlead.types import Sampler

Engine = Literal["native", "generate", "vllm"]


def open_sampler(engine: Engine, models: Models, renderer: Renderer, *, rows: int = 64) -> Sampler:
    """A sampler of the policy that decodes ``rows`` responses together. Raises ConfigError for vllm where it is not
    installed or cannot take these models."""
    if engine == "native":
        from fairlead.rollout.native import NativeSampler

        return NativeSampler(models, renderer, rows=rows)
    if engine == "generate":
        from fairlead.rollout.generate import GenerateSampler

        return GenerateSampler(models, renderer, rows=rows)
    from fairlead.rollout.vllm import VllmSampler

    return VllmSampler(models, renderer, rows=rows)
