"""Records to what a reward model learns from: pairs, rankings, ratings, attributes, labels, and bootstraps of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fairlead.algorithms.labels import label_source
from fairlead.algorithms.stage import Stage
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import preference_batch, ranking_batch
from fairlead.errors import DataError
from fairlead.ops.sampling import keyed_uniform, stream_key
from fairlead.types import Preference, PreferenceBatch, Ranking, RankingBatch


def reward_source(stage: Stage, records: Sequence[Any], split: str) -> DatasetSource:
    """Labelled responses, rankings or pairs, as the settings' loss takes them."""
    settings = stage.settings
    if settings.loss == "binary":
        return label_source(stage, records, split, mismatch=False)
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


def _lacking(ranking: Ranking, settings: Any) -> str | None:
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
