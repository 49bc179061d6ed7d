"""RAFT, reward-ranked fine-tuning (Dong et al. 2023): sample K responses to each prompt, clean and discard, score, keep
the best, and learn them as SFT learns demonstrations. Rejection-sampling SFT is one round of it."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, cast

from pydantic import Field, model_validator

from fairlead.algorithms.online import SamplingSettings, collecting, evaluation
from fairlead.algorithms.rounds import Estimate, RolloutSource
from fairlead.algorithms.shaping import Shaped, Shaper, ShapingSettings
from fairlead.algorithms.stage import Stage
from fairlead.algorithms.terms import nll
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.rollout.experience import Experience
from fairlead.rollout.select import SelectSettings, select
from fairlead.rollout.teacher import open_teacher
from fairlead.types import Algorithm, Pass, Prompt, Term, TokenBatch


class Settings(ShapingSettings, SamplingSettings, SelectSettings):
    kl_in: ClassVar[str] = "reward"
    kl_estimator: ClassVar[str] = "k1"
    num_samples: int = Field(default=8, ge=1)
    """Responses to each prompt of a round."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each round's selected responses; train.batch_size prompts are a step."""
    temperature: float = Field(default=0.85, gt=0)
    measure_kl: bool = False
    """Keep a reference and measure the KL to it, though nothing is charged for it."""
    plateau: int | None = Field(default=3, ge=1)
    """The run ends with the round in which the mean score of so many rounds lies within the 95 % interval (over
    prompts) of the round before them, the newest not the highest of all these; null: it does not."""
    teacher: str | None = None
    """What samples, in place of the policy: a finished run, a folder or a hub id of another model, whose best answers
    are learned; its tokenizer and template may be others."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Responses are ranked by score - kl_coef (log policy - log reference); 0 needs no reference."""

    @model_validator(mode="before")
    @classmethod
    def _a_teacher_has_no_plateau(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        held = cast(dict[str, Any], given)
        return {"plateau": None, **held} if held.get("teacher") else held

    @model_validator(mode="after")
    def _selects(self) -> Settings:
        if self.teacher is not None and self.plateau is not None:
            raise ValueError(f"plateau={self.plateau} watches the scores of samples, and a teacher's do not change")
        if (self.keep or 1) > self.num_samples:
            raise ValueError(f"keep={self.keep} of num_samples={self.num_samples} responses")
        if self.adaptive_kl is not None and not self.kl_coef:
            raise ValueError("adaptive_kl moves the price of the KL: kl_coef above 0")
        return self


def estimate(experience: Experience, shaped: Shaped, *, settings: Settings) -> Estimate:
    """Which responses are learned: ranked by the sum of their shaped rewards, which is score - kl_coef x KL."""
    keys, scores = shaped.rewards.sum(1), experience.scores
    numbers = [experience.num_samples] * len(experience.trees)
    keep, empty = select(keys, numbers, settings, experience.discarded)
    first = scores.view(-1, experience.num_samples)[:, 0]
    return Estimate(
        {},
        {
            "raft/selected_scores": float(scores[keep].mean()),
            "raft/first_scores": float(first[~first.isnan()].mean()),
            "raft/selected": float(keep.float().mean()),
            "raft/prompts_without": empty,
        },
        keep,
    )


def collate(trees: list[Tree], _: Any, *, packed: bool, pad_id: int, support: Any = None) -> TokenBatch:
    """The selected responses as demonstrations: all of the vocabulary could follow."""
    return token_batch(trees, packed=packed, pad_id=pad_id)


def passes(_: Any) -> tuple[Pass, ...]:
    return (Pass("policy", (Term("nll", "token", nll),), frozenset({"logprobs"}), uniform=True),)


def source(stage: Stage) -> RolloutSource:
    settings: Settings = stage.settings
    teacher = None
    if settings.teacher is not None:
        form: Any = {"engine": settings.engine, "rows": settings.rollout_rows, "device": stage.models.device}
        teacher = open_teacher(settings.teacher, stage.renderer, **form)
    prompts, collector = collecting(stage, sampler=teacher, logprobs="reference" in stage.models.roles)
    return RolloutSource(
        stage, collector, prompts, Shaper(settings), partial(estimate, settings=settings), collate=collate
    )


ALGORITHM = Algorithm(
    name="raft",
    settings=Settings,
    record=lambda _: Prompt,
    roles=lambda settings: ("policy", "reference") if settings.kl_coef or settings.measure_kl else ("policy",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("raft/first_scores", "raft/selected_scores", "eval/score"),
    best="eval/score",
)
