"""Reward model: a scalar head at the last token of each response, trained on pairs (Bradley-Terry), on rankings of K
responses in one row (every pair of them, or Plackett-Luce), or on ratings. Or several heads on the one trunk: an
ensemble, each on a bootstrap of its own, or one for each attribute that responses are judged by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.stage import Stage
from fairlead.config import Section
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import preference_batch, ranking_batch
from fairlead.errors import DataError
from fairlead.models.heads import Combination, RewardHeads
from fairlead.ops.sampling import keyed_uniform, stream_key
from fairlead.ops.scores import attribute_pairs, bradley_terry, centring, disagreement, plackett_luce
from fairlead.types import (
    Algorithm,
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
    loss: Literal["bradley_terry", "plackett_luce", "regression"] = "bradley_terry"
    """bradley_terry: of pairs; plackett_luce: of the whole order of a ranking; regression: squared distance to the
    ratings of the data set."""
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
        return self.rankings or self.loss != "bradley_terry" or bool(self.attributes)

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
        given = [name for name in ("margin_coef", "label_smoothing") if getattr(self, name)]
        if self.loss != "bradley_terry" and given:
            raise ValueError(f"{' and '.join(given)}: for loss bradley_terry, not for {self.loss}")
        if self.loss == "regression" and self.centring_coef:
            raise ValueError("centring_coef is for losses of comparisons: ratings say where the scores lie")
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
    elif settings.loss == "plackett_luce":
        terms = [Term("plackett_luce", unit, partial(listwise, settings=settings))]
    else:
        rated = "attribute_rating" if settings.attributes else "sequence"
        terms = [Term("regression", rated, partial(pointwise, settings=settings))]
    if settings.centring:
        terms.append(Term("centring", unit, zero_mean, settings.centring))
    return (Pass("reward", tuple(terms), frozenset({"scores"})),)


# --- data ----------------------------------------------------------------------------------------------------------


def source(stage: Stage) -> DatasetSource:
    return _source(stage, stage.records, "train")


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), _source(stage, stage.eval_records, "eval").in_order)


def _source(stage: Stage, records: Sequence[Preference] | Sequence[Ranking], split: str) -> DatasetSource:
    settings: Settings = stage.settings
    if not settings.takes_rankings:
        return _pairs(stage, [record for record in records if isinstance(record, Preference)], split)
    rankings = [record for record in records if isinstance(record, Ranking)]
    if split == "train":
        _refuse_unknown(settings.attributes, rankings)
    lacking = [_lacking(ranking, settings) for ranking in rankings]
    ordered = [ranking for ranking, reason in zip(rankings, lacking, strict=True) if reason is None]
    reasons = Counter(reason for reason in lacking if reason is not None)
    if not ordered:
        raise DataError(
            f"there is nothing to learn from {len(rankings)} {split} rankings: {dict(reasons)}",
            hint="reward.loss=regression learns from single responses and from ties" if "tie" in reasons else None,
        )
    if settings.loss == "regression" and not settings.attributes and any(each.scores is None for each in ordered):
        raise DataError(
            f"{sum(ranking.scores is None for ranking in ordered)} of {len(ordered)} {split} rankings have no scores, "
            "which reward.loss=regression learns",
            hint="reward.loss=plackett_luce learns from the order alone",
        )
    trees, kept = stage.trees(ordered, split)
    for reason, number in reasons.items():
        stage.drop(split, reason, number)
    levels = [_levels(ordered[i]) for i in kept]
    ratings = [ordered[i].scores or () for i in kept] if all(ordered[i].scores for i in kept) else None
    judged = [_judged(ordered[i], settings.attributes) for i in kept] if settings.attributes else None
    times = _times(stage, kept, split)

    def collate(chosen: Sequence[int]) -> RankingBatch:
        batch = ranking_batch(
            [trees[i] for i in chosen],
            [levels[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            ratings=None if ratings is None else [ratings[i] for i in chosen],
            attributes=None if judged is None else [judged[i] for i in chosen],
        )
        return batch if times is None else replace(batch, times=times[list(chosen)])

    return stage.dataset_source([tree.num_tokens for tree in trees], collate)


def _pairs(stage: Stage, records: Sequence[Preference], split: str) -> DatasetSource:
    trees, kept = stage.trees(records, split)
    margins = [records[i].margin or 0.0 if stage.settings.margin_coef else None for i in kept]
    times = _times(stage, kept, split)

    def collate(chosen: Sequence[int]) -> PreferenceBatch:
        batch = preference_batch(
            [trees[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            margins=[margins[i] for i in chosen],
        )
        return batch if times is None else replace(batch, times=times[list(chosen)])

    return stage.dataset_source([tree.num_tokens for tree in trees], collate)


def _times(stage: Stage, examples: Sequence[int], split: str) -> Tensor | None:
    """[N, K]; held-out examples count once for every member."""
    members: int | None = stage.settings.members
    return bootstrap(stage.recipe.seed, members, examples) if members is not None and split == "train" else None


def bootstrap(seed: int, members: int, examples: Sequence[int]) -> Tensor:
    """How often each example is in the bootstrap of each member: Poisson(1), keyed by (seed, member, example), to which
    drawing N of N with replacement tends (Oza and Russell 2001, "Online Bagging and Boosting"). [N, K]"""
    items = torch.tensor(examples)
    below = torch.tensor([math.exp(-1) / math.factorial(k) for k in range(20)], dtype=torch.float64).cumsum(0)
    draws = [
        keyed_uniform(stream_key(seed, "bootstrap", member), items, torch.zeros_like(items), 0)
        for member in range(members)
    ]
    return torch.searchsorted(below, torch.stack(draws, 1), right=True).float()


def _refuse_unknown(attributes: Sequence[str], rankings: Sequence[Ranking]) -> None:
    there = {name for ranking in rankings for name, scores in ranking.attributes.items() if set(scores) != {None}}
    if missing := [name for name in attributes if name not in there]:
        raise DataError(
            f"no row has a score of {', '.join(missing)}, which reward.attributes names",
            hint=f"the rows have: {', '.join(sorted(there)) or 'none'}; data.columns can name the column of a score, "
            f"as in data.columns={{attributes.{missing[0]}: COLUMN}}",
        )


def _lacking(ranking: Ranking, settings: Settings) -> str | None:
    """Why nothing can be learned from it; none where something can."""
    if not settings.attributes:
        return "tie" if settings.loss != "regression" and _levels(ranking)[-1] == 0 else None
    known = [{score for score in ranking.attributes.get(name, ()) if score is not None} for name in settings.attributes]
    if not any(known):
        return "no score of an attribute"
    return "tie" if settings.loss != "regression" and all(len(scores) < 2 for scores in known) else None


def _judged(ranking: Ranking, attributes: Sequence[str]) -> Tensor:
    """[responses, K], nan where there is no score."""
    none = (None,) * len(ranking.responses)
    columns = [ranking.attributes.get(name, none) for name in attributes]
    return torch.tensor([[math.nan if score is None else score for score in row] for row in zip(*columns, strict=True)])


def _levels(ranking: Ranking) -> list[int]:
    """Place of each response, equal scores sharing one."""
    if ranking.scores is None:
        return list(range(len(ranking.responses)))
    levels = [0]
    for before, score in zip(ranking.scores, ranking.scores[1:], strict=False):
        levels.append(levels[-1] + (score < before))
    return levels


def _record(settings: Settings) -> type[Record]:
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
