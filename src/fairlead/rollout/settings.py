"""How responses are sampled, as settings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fairlead.config import Section
from fairlead.types import Sampling


class DrawSettings(Section):
    rollout_rows: int = Field(default=64, ge=1)
    """Responses decoded together; also the prompts of one saved chunk."""
    num_samples: int = Field(default=1, ge=1)
    """Responses to each prompt of a round."""
    engine: Literal["native", "generate", "vllm"] = "native"
    """What samples: Fairlead's own engine, transformers' generate (the slow reference), or vLLM."""
    max_new_tokens: int = Field(default=64, ge=1)
    shortest_limit: int | None = Field(default=None, ge=1)
    """Each response has a limit of its own, drawn evenly from here to max_new_tokens."""
    min_new_tokens: int = Field(default=0, ge=0)
    """The end of sequence cannot be drawn before; log-probabilities and KL are of what could be drawn."""
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)
    """0: the whole vocabulary. Log-probabilities and KL are of the tokens kept."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: tuple[str, ...] = ()
    """Texts that end a response where they first occur."""

    @model_validator(mode="after")
    def _sampling_goes_together(self) -> Self:
        limit = self.max_new_tokens if self.shortest_limit is None else self.shortest_limit
        if limit > self.max_new_tokens:
            raise ValueError(f"shortest_limit={limit} is above max_new_tokens={self.max_new_tokens}")
        if self.min_new_tokens > limit:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is above the shortest limit, {limit}")
        if self.engine == "vllm" and self.top_p < 1.0 and not self.top_k:
            raise ValueError(
                f"top_p={self.top_p} with top_k=0: vLLM says what a token was drawn from only under a top_k; set top_k "
                "as well, 1000 say, or engine=native"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.max_new_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_new_tokens,
            self.shortest_limit,
            self.stop,
        )
