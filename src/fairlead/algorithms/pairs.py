"""Pairs without a reference, for algorithms that need none."""

from __future__ import annotations

from collections.abc import Sequence

from fairlead.algorithms.stage import Stage
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import preference_batch
from fairlead.types import Preference


def pair_source(stage: Stage, records: Sequence[Preference], split: str) -> DatasetSource:
    trees, _ = stage.trees(records, split)
    return stage.dataset_source(
        [tree.num_tokens for tree in trees],
        lambda chosen: preference_batch([trees[i] for i in chosen], packed=stage.packed, pad_id=stage.pad_id),
    )
