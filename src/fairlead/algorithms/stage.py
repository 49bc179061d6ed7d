"""What an algorithm is given: the assembled run. And what the offline ones share: trees, batches, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairlead.config import Recipe
from fairlead.data import tokenize
from fairlead.data.loader import Collate, DatasetSource
from fairlead.data.render import LengthCounts, Renderer, Tree
from fairlead.models.roles import Models
from fairlead.training.budget import TokenBudget
from fairlead.training.loop import evaluate
from fairlead.types import Pass, Ranks, TokenBatch


@dataclass(slots=True)
class Stage:
    recipe: Recipe
    models: Models
    renderer: Renderer
    records: Sequence[Any]
    eval_records: Sequence[Any]
    folder: Path
    """The run directory."""
    budget: TokenBudget
    """Tokens of one forward pass."""
    objects: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What Python handed in under a setting's name, a reward function say."""
    counts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """What became of the rows, for the manifest: train, eval -> read, kept, cut, dropped."""
    opened: dict[str, Any] = field(default_factory=dict[str, Any])
    """What source and evaluation share: a reward."""
    step: Callable[[], int] = lambda: 0
    """The optimizer steps done."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train this run."""

    @property
    def settings(self) -> Any:
        return self.recipe.settings

    @property
    def is_evaluated(self) -> bool:
        return bool(self.eval_records or getattr(self.settings, "eval_prompts", ()))

    @property
    def pad_id(self) -> int:
        return self.renderer.eos

    @property
    def packed(self) -> bool:
        """Rows are packed where the model's attention takes forests."""
        return self.recipe.data.packing != "none" and self.models.forest

    def trees(self, records: Sequence[Any], split: str) -> tuple[list[Tree], list[int]]:
        """Rendered records and the index of each one's record; what the limits did is counted under ``split``."""
        data = self.recipe.data
        trees, kept, counts = tokenize.trees(self.renderer, records, workers=data.workers, cache=data.cache)
        self.count(split, counts)
        return trees, kept

    def count(self, split: str, lengths: LengthCounts) -> None:
        before = self.counts.setdefault(split, {"read": 0, "kept": 0, "cut": 0, "dropped": {}})
        before["kept"] = lengths.kept
        before["cut"] = lengths.cut
        before["dropped"] = {**before["dropped"], **lengths.dropped}

    def drop(self, split: str, reason: str, number: int) -> None:
        """Count records that an algorithm itself leaves out."""
        if number:
            dropped = self.counts[split]["dropped"]
            dropped[reason] = dropped.get(reason, 0) + number

    def dataset_source(self, sizes: Sequence[int], collate: Collate) -> DatasetSource:
        train = self.recipe.train
        return DatasetSource(
            sizes,
            collate,
            batch_size=train.batch_size,
            micro_batch_tokens=lambda: self.budget.tokens,
            packed=self.packed,
            seed=self.recipe.seed,
            epochs=train.epochs,
            steps=train.steps,
            share=self.ranks.share,
        )

    def loss_evaluation(
        self, passes: Iterable[Pass], batches: Callable[[], Iterable[TokenBatch]]
    ) -> Callable[[], dict[str, float]]:
        """The training losses and metrics on held-out batches, under ``eval/``."""
        passes = tuple(passes)

        def measure() -> dict[str, float]:
            found = evaluate(self.models, passes, batches(), self.ranks)
            return {f"eval/{name}": value for name, value in found.items()}

        return measure
