"""From the scores of a round to a reward a token: penalties, scaling and clipping of the scores, the KL to the
reference, and what of it changes from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from fairlead.config import Section
from fairlead.errors import TrainingError
from fairlead.ops.kl import absolute, k1, k2
from fairlead.ops.returns import shaped_rewards
from fairlead.rollout.experience import Experience


class AdaptiveKL(Section):
    """The coefficient moves after each round so that the KL comes to `target` (Ziegler et al. 2019, section 2.2)."""

    target: float = Field(default=6.0, gt=0)
    """KL to the reference, nats a response."""
    horizon: float = Field(default=10_000, gt=0)
    """Responses after which an error of 20 % has moved the coefficient by 20 %."""


class ShapingSettings(Section):
    adaptive_kl: AdaptiveKL | None = None
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Taken off the score of a response that was cut at its limit."""
    reward_baseline: float = 0.0
    """Taken off every score."""
    reward_scaling: Literal["none", "running", "first", "round"] = "none"
    """Scores are divided by their standard deviation: over all rounds so far, over the first one, or over this one."""
    reward_center: bool = False
    """With reward_scaling, their mean is taken off as well."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Scores are kept within -reward_clip and reward_clip, after scaling."""


class Unshaped(ShapingSettings):
    """Of what ranks responses by their scores, without a price of the KL."""

    kl_coef: ClassVar[float] = 0.0
    kl_in: ClassVar[str] = "reward"
    kl_estimator: ClassVar[str] = "k1"


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and spread of numbers that came in groups: Chan et al. (1979)."""

    number: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def __or__(self, values: Tensor) -> Moments:
        values = values.double()
        number, mean = len(values), float(values.mean())
        squares, total, shift = float(((values - mean) ** 2).sum()), self.number + len(values), mean - self.mean
        return Moments(
            total,
            self.mean + shift * number / total,
            self.squares + squares + shift**2 * self.number * number / total,
        )

    @property
    def deviation(self) -> float:
        return (self.squares / (self.number - 1)) ** 0.5 if self.number > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Shaped:
    """Rewards of a round, responses left-aligned."""

    rewards: Tensor
    """[S, T] zero past the end."""
    scores: Tensor
    """[S] after penalties, scaling and clipping; the KL not in it."""
    lengths: Tensor
    """[S]"""
    inside: Tensor
    """[S, T] bool"""
    metrics: dict[str, float]

    def ragged(self, values: Tensor) -> list[Tensor]:
        """[S, T] -> one tensor [length] a response."""
        lengths: list[int] = cast(Any, self.lengths).tolist()
        return [row[:length] for row, length in zip(values, lengths, strict=True)]


dense = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
"""One tensor [length] a response -> [S, T], zero past the end."""


class Shaper:
    """Shapes one round after the other. Its state is that of the beginning of the current one."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._kl_coef: float = settings.kl_coef
        self._moments = Moments()
        self._next: tuple[float, Moments] | None = None

    def __call__(self, experience: Experience) -> Shaped:
        settings: Any = self._settings
        lengths = torch.tensor(experience.lengths)
        inside = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        scores, moments = self._scores(experience)
        kl, measured = self._kl(experience, inside)
        given = experience.tokens.get("dense")
        charged = self._kl_coef if settings.kl_in == "reward" else 0.0
        last = scores if given is None else scores - experience.scores  # a dense score is the sum over its tokens
        spread = None if given is None else dense(given)
        rewards = shaped_rewards(last, kl, lengths, kl_coef=charged, dense=spread)
        self._next = self._coefficient(measured.get("objective/kl", 0.0), len(scores)), moments
        known = ~experience.scores.isnan()
        metrics = measured | {
            "objective/scores": float(experience.scores[known].mean()),
            "objective/scores_std": float(experience.scores[known].std()) if int(known.sum()) > 1 else 0.0,
            "objective/rlhf_reward": float(rewards.sum(1)[known].mean()),
            **{f"objective/scores/{name}": float(values[known].mean()) for name, values in experience.parts.items()},
            "objective/kl_coef": self._kl_coef,
        }
        return Shaped(rewards, scores, lengths, inside, metrics)

    def finish_round(self) -> None:
        assert self._next is not None
        self._kl_coef, self._moments = self._next

    def _scores(self, experience: Experience) -> tuple[Tensor, Moments]:
        """Penalised, scaled and clipped, and the moments after this round."""
        settings: Any = self._settings
        scores, before = experience.scores, self._moments
        moments = before | scores[~scores.isnan()]
        if settings.reward_scaling != "none":
            if "dense" in experience.tokens:
                raise TrainingError(
                    f"reward_scaling={settings.reward_scaling} scales scores of responses, and this reward is dense",
                    hint="reward_scaling=none",
                )
            first = before if before.number else moments
            alone = Moments() | scores[~scores.isnan()]
            used = {"running": moments, "first": first, "round": alone}[settings.reward_scaling]
            moments = first if settings.reward_scaling == "first" else moments
            scores = (scores - used.mean if settings.reward_center else scores) / max(used.deviation, 1e-8)
        if settings.reward_clip is not None:
            scores = scores.clamp(-settings.reward_clip, settings.reward_clip)
        cut = (~experience.finished).float()
        return scores - settings.reward_baseline - settings.missing_eos_penalty * cut, moments

    def _kl(self, experience: Experience, inside: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What is charged for at each token [S, T], and the KL as a person reads it."""
        if "reference_logprobs" not in experience.tokens:
            return torch.zeros(inside.shape), {}
        policy, reference = (dense(experience.tokens[f"{name}_logprobs"]) for name in ("behaviour", "reference"))
        settings: Any = self._settings
        estimators = {"k1": k1, "abs": absolute, "k2": k2}
        full = settings.kl_estimator == "full"
        charged = dense(experience.tokens["whole_kl"]) if full else estimators.get(settings.kl_estimator, k1)(
            policy, reference
        )  # fmt: skip
        measured = {"objective/kl": float(k1(policy, reference).sum(1).mean())}
        return charged, measured | ({"objective/whole_kl": float(charged.sum(1).mean())} if full else {})

    def _coefficient(self, kl: float, number: int) -> float:
        """Of the next round, from the KL of ``number`` responses."""
        adaptive = self._settings.adaptive_kl
        if adaptive is None:
            return self._kl_coef
        error = min(max(kl / adaptive.target - 1, -0.2), 0.2)
        return self._kl_coef * (1 + error * number / adaptive.horizon)

    def state_dict(self) -> dict[str, Any]:
        m = self._moments
        return {"kl_coef": self._kl_coef, "moments": [m.number, m.mean, m.squares]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._settings.adaptive_kl is not None:  # else the recipe says it, a fork's another than its parent's
            self._kl_coef = float(state["kl_coef"])
        number, mean, squares = state["moments"]
        self._moments = Moments(int(number), float(mean), float(squares))
