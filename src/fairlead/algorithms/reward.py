"""Reward model: a scalar head at the last token of each response, trained on pairs (Bradley-Terry), on rankings of K
responses in one row (every pair of them, or Plackett-Luce), or on ratings. Or several heads on the one trunk: an
ensemble, each on a bootstrap of its own, or one for each attribute that responses are judged by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.reward_data import reward_source
from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.models.heads import Combination, RewardHeads
from fairlead.ops.scores import attribute_pairs, bradley_terry, centring, disagreement, plackett_luce
from fairlead.types import (
    Algorithm,
    Labelled,
    LabelledBatch,
    Mean,
    Metrics,
    Outputs,
    Pass,
    Preference,
    PreferenceBatch,
    Ranking,
    RankingBatch,
    Record,
    Term,
)

CENTRING = 0.01
"""Of several heads: each pair says nothing of where its scores lie, and they are to be compared between heads."""


class Settings(Section):
    loss: Literal["bradley_terry", "plackett_luce", "regression", "binary"] = "bradley_terry"
    """bradley_terry: of pairs; plackett_luce: of the whole order of a ranking; regression: squared distance to the
    ratings of the data set; binary: of single responses, each good or bad, so that sigmoid(score) is the probability of
    a good one."""
    rankings: bool = False
    """All responses to a prompt in one row, and of each ranking every pair that is no tie, weighing as much as one pair
    together (InstructGPT); else of a ranking the best against the worst. plackett_luce, regression and attributes
    always do."""
    margin_coef: float = Field(default=0.0, ge=0)
    """The scores of a pair are pushed apart by this times its margin (Llama 2, eq. 2), whose unit is that of the data
    set, points of a judge say. 0: margins are not used."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels."""
    centring_coef: float | None = Field(default=None, ge=0)
    """Weight of (chosen + rejected)^2, which keeps the scores' mean at zero. null: 0.01 for several heads that learn
    from comparisons, so that their scores can be compared; else 0."""
    members: int | None = Field(default=None, ge=2)
    """An ensemble of so many heads on one trunk, each from its own start and on its own bootstrap: a pair (a ranking)
    counts 0, 1, 2 ... times for each. null: one head."""
    attributes: tuple[str, ...] = ()
    """What responses are judged by, one head each, from rows that hold a score for each: [helpful, harmless]. One that
    a response has no score of teaches nothing there."""
    attribute_weights: dict[str, float] = Field(default_factory=dict)
    """What the attributes' scores are multiplied with before they are added up to the one score, negative where less is
    better; none: their mean."""
    combine: Combination = "mean"
    """How the scores of several heads become one; mean-minus-disagreement, of an ensemble, subtracts their standard
    deviation."""

    @property
    def takes_rankings(self) -> bool:
        return self.rankings or self.loss in ("plackett_luce", "regression") or bool(self.attributes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the heads, where they have any."""
        return self.attributes or tuple(f"member_{number + 1}" for number in range(self.members or 0))

    @property
    def reward_heads(self) -> RewardHeads | None:
        """What the models and whoever reads them are told of several heads."""
        if len(self.names) < 2:
            return None
        weights = tuple(self.attribute_weights[name] for name in self.attributes) if self.attribute_weights else None
        return RewardHeads("attributes" if self.attributes else "ensemble", self.names, self.combine, weights)

    @property
    def centring(self) -> float:
        if self.centring_coef is not None:
            return self.centring_coef
        return 0.0 if self.loss == "regression" or self.reward_heads is None else CENTRING

    @model_validator(mode="after")
    def _go_together(self) -> Settings:
        known = {"bradley_terry": (), "binary": ("margin_coef",)}.get(self.loss, ("margin_coef", "label_smoothing"))
        if given := [name for name in known if getattr(self, name)]:
            raise ValueError(f"{' and '.join(given)}: for loss bradley_terry, not for {self.loss}")
        if self.loss in ("regression", "binary") and self.centring_coef:
            raise ValueError("centring_coef is for losses of comparisons: ratings and labels say where the scores lie")
        if self.loss == "binary" and (self.rankings or self.names):
            raise ValueError("loss binary has single responses and one head: no rankings, members or attributes")
        if twice := [name for name, number in Counter(self.attributes).items() if number > 1]:
            raise ValueError(f"attributes holds {', '.join(twice)} more than once")
        if self.attributes and self.members is not None:
            raise ValueError("members and attributes are both given: the heads are an ensemble or attributes")
        if self.attributes and self.loss == "plackett_luce":
            raise ValueError("loss plackett_luce has one order, attributes have one each: bradley_terry or regression")
        if self.combine != "mean" and len(self.names) < 2:
            raise ValueError(f"combine={self.combine} is for several heads: give members, or several attributes")
        if self.combine == "mean-minus-disagreement" and self.attributes:
            raise ValueError("combine=mean-minus-disagreement is for members: attributes measure different things")
        if self.attribute_weights and set(self.attribute_weights) != set(self.attributes):
            raise ValueError(
                f"attribute_weights are of {', '.join(self.attribute_weights)}, attributes are "
                f"{', '.join(self.attributes) or 'none'}"
            )
        if self.attribute_weights and (self.combine != "mean" or len(self.attributes) < 2):
            raise ValueError("attribute_weights are for the mean of several attributes")
        return self


# --- losses --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """The scores of each pair: [P, K], or [P] where a pair is one of a single attribute."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None
    """[P, 1] or [P]"""
    weight: Tensor
    """What a pair counts; of a ranking (and attribute) all together as much as one, times its place in a bootstrap."""
    attribute: Tensor | None = None
    """[P]"""

    @classmethod
    def of(cls, outputs: Outputs, batch: PreferenceBatch) -> Compared:
        scores = outputs.head_scores
        if isinstance(batch, RankingBatch) and batch.attributes is not None:
            better, worse, attribute = attribute_pairs(batch.attributes, batch.group)
            margin = batch.attributes[better, attribute] - batch.attributes[worse, attribute]
            weight = _one_together(batch.group[better] * scores.shape[1] + attribute, scores)
            return cls(scores[better, attribute], scores[worse, attribute], margin, weight, attribute)
        weight, times = scores.new_ones(1), batch.times
        if isinstance(batch, RankingBatch):
            group = batch.group[batch.chosen]
            weight, times = _one_together(group, scores)[:, None], None if times is None else times[group]
        margin = None if batch.margin is None else batch.margin[:, None]
        return cls(scores[batch.chosen], scores[batch.rejected], margin, weight if times is None else weight * times)

    def summed(self, losses: Tensor) -> Tensor:
        """Over pairs, each the mean of the heads'."""
        weighed = losses * self.weight
        return (weighed.mean(1) if weighed.dim() == 2 else weighed).sum()


def _one_together(group: Tensor, like: Tensor) -> Tensor:
    """1 / the size of each pair's group. [P] -> [P]"""
    return torch.bincount(group)[group].to(like.dtype).reciprocal()


def pairwise(outputs: Outputs, batch: PreferenceBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss, the mean of the heads, summed over pairs, or over rankings each of whose pairs weighs 1 /
    their number; unit ``pair`` or ``ranking``. Of attributes each one's own pairs; unit ``attribute_ranking``."""
    of = Compared.of(outputs, batch)
    margin = None if of.margin is None or not settings.margin_coef else settings.margin_coef * of.margin
    losses = bradley_terry(of.chosen, of.rejected, margin=margin, label_smoothing=settings.label_smoothing)
    return of.summed(losses), _metrics(outputs, batch, settings)


def zero_mean(outputs: Outputs, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
    """(chosen + rejected)^2, summed as the loss is."""
    of = Compared.of(outputs, batch)
    return of.summed(centring(of.chosen, of.rejected)), {}


def listwise(outputs: Outputs, batch: RankingBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Plackett-Luce loss, the mean of the heads, summed over rankings; unit ``ranking``."""
    rankings = int(batch.counts["ranking"])
    columns = outputs.head_scores.unbind(1)
    losses = torch.stack([plackett_luce(column, batch.group, batch.level, rankings) for column in columns], 1)
    losses = losses if batch.times is None else losses * batch.times
    return losses.mean(1).sum(), _metrics(outputs, batch, settings)


def pointwise(outputs: Outputs, batch: RankingBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Squared distance to the ratings, the mean of the heads, summed over responses; unit ``sequence``. Of attributes
    summed over what is rated; unit ``attribute_rating``."""
    scores, metrics = outputs.head_scores, _metrics(outputs, batch, settings)
    if batch.attributes is None:
        assert batch.rating is not None
        errors = (scores - batch.rating[:, None].to(scores.dtype)).square()
        errors = errors if batch.times is None else errors * batch.times[batch.group]
        return errors.mean(1).sum(), metrics
    known = ~batch.attributes.isnan()
    errors = (scores[known] - batch.attributes[known].to(scores.dtype)).square()
    attribute = known.nonzero()[:, 1]
    for k, name in enumerate(settings.names):
        if len(own := errors.detach()[attribute == k]):
            metrics[f"rewards/error/{name}"] = Mean(own.sum(), float(len(own)))
    return errors.sum(), metrics


def labelwise(outputs: Outputs, batch: LabelledBatch, *, settings: Settings) -> tuple[Tensor, Metrics]:
    """Logistic loss of the labels, summed over responses; unit ``sequence``."""
    scores, good = outputs.scores, batch.label
    losses = bradley_terry(
        torch.where(good, scores, -scores), torch.zeros_like(scores), label_smoothing=settings.label_smoothing
    )
    right = torch.where(good, scores > 0, scores < 0).sum()
    metrics: Metrics = {"rewards/accuracies": Mean(right, batch.counts["sequence"])}
    for name, side in (("chosen", good), ("rejected", ~good)):
        metrics[f"rewards/{name}"] = Mean(scores.detach()[side].sum(), side.sum())
    return losses.sum(), metrics


@torch.no_grad()
def _metrics(outputs: Outputs, batch: PreferenceBatch, settings: Settings) -> Metrics:
    """Of the combined score on the pairs of the data; of each head on its own."""
    chosen, rejected = outputs.scores[batch.chosen], outputs.scores[batch.rejected]
    pairs = batch.counts["pair"]
    metrics = {
        "rewards/accuracies": Mean(_right(chosen, rejected).sum(), pairs),
        "rewards/chosen": Mean(chosen.sum(), pairs),
        "rewards/rejected": Mean(rejected.sum(), pairs),
        "rewards/margins": Mean((chosen - rejected).sum(), pairs),
    }
    if settings.names:
        of = Compared.of(outputs, batch)
        right = _right(of.chosen, of.rejected)
        for k, name in enumerate(settings.names):
            own = right[:, k] if of.attribute is None else right[of.attribute == k]
            metrics[f"rewards/accuracies/{name}"] = Mean(own.sum(), float(len(own)))
    if settings.members is not None:
        spread = disagreement(outputs.head_scores)
        metrics["reward/disagreement"] = Mean(spread.sum(), batch.counts["sequence"])
    return {name: mean for name, mean in metrics.items() if mean.count}


def _right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen one is above, 1/2 at a tie."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def passes(settings: Settings) -> tuple[Pass, ...]:
    unit = "attribute_ranking" if settings.attributes else "ranking" if settings.takes_rankings else "pair"
    if settings.loss == "bradley_terry":
        terms = [Term("bradley_terry", unit, partial(pairwise, settings=settings))]
    elif settings.loss == "binary":
        terms = [Term("binary", "sequence", partial(labelwise, settings=settings))]
    elif settings.loss == "plackett_luce":
        terms = [Term("plackett_luce", unit, partial(listwise, settings=settings))]
    else:
        rated = "attribute_rating" if settings.attributes else "sequence"
        terms = [Term("regression", rated, partial(pointwise, settings=settings))]
    if settings.centring:
        terms.append(Term("centring", unit, zero_mean, settings.centring))
    return (Pass("reward", tuple(terms), frozenset({"scores"})),)


def source(stage: Stage) -> DatasetSource:
    return reward_source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    held_out = reward_source(stage, stage.eval_records, "eval")
    return stage.loss_evaluation(passes(stage.settings), held_out.in_order)


def _record(settings: Settings) -> type[Record]:
    if settings.loss == "binary":
        return Labelled
    return Ranking if settings.takes_rankings else Preference


ALGORITHM = Algorithm(
    name="reward",
    settings=Settings,
    record=_record,
    roles=lambda _: ("reward",),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "eval/rewards/accuracies"),
)
