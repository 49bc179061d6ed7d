"""What algorithms that learn from single responses, each good or bad, share: their source, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fairlead.algorithms.reference import reference_logprobs
from fairlead.algorithms.responses import response_logprobs
from fairlead.algorithms.stage import Stage
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import labelled_batch
from fairlead.data.render import Tree
from fairlead.errors import DataError
from fairlead.ops.sampling import permutation, stream_key
from fairlead.types import Labelled, LabelledBatch, Mean, Metrics, Outputs


def label_source(stage: Stage, records: Sequence[Labelled], split: str, *, mismatch: bool) -> DatasetSource:
    """``mismatch``: each batch also holds its prompts with responses to others."""
    trees, kept = stage.trees(records, split)
    labels = [records[i].label for i in kept]
    if split == "train" and len(set(labels)) < 2:
        kind = "good" if labels[0] else "bad"
        raise DataError(
            f"all {len(labels)} responses are labelled {kind}: there is nothing to tell apart",
            hint="give data with labels of both kinds, or train sft on good responses",
        )
    if mismatch and split == "train" and len({tree.prompt for tree in trees}) < 2:
        raise DataError(
            "all prompts are the same, and the batch KL is taken over responses to other prompts",
            hint="kto.loss=apo_zero needs none",
        )
    others = _mismatched(trees, stage.recipe.seed, stage.recipe.data.max_length) if mismatch else []
    reference: list[list[Tensor]] | None = None

    def made(rows: Sequence[Tree], chosen: Sequence[int], first: int, other: LabelledBatch | None) -> LabelledBatch:
        return labelled_batch(
            [rows[i] for i in chosen],
            [labels[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            reference_logprobs=None if reference is None else [v for i in chosen for v in reference[first + i]],
            mismatched=other,
        )

    def collate(chosen: Sequence[int]) -> LabelledBatch:
        return made(trees, chosen, 0, made(others, chosen, len(trees), None) if others else None)

    source = stage.dataset_source([tree.num_tokens for tree in trees], collate)
    if "reference" in stage.models.roles:
        read = source.read() if split == "train" else list(range(len(trees)))
        both = [*read, *(len(trees) + i for i in read if others)]
        reference = reference_logprobs(stage, [*trees, *others], both)
    return source


def _mismatched(trees: Sequence[Tree], seed: int, max_length: int) -> list[Tree]:
    """Each prompt with the response of the next example, in an order of their own, that answers another prompt; of the
    next one, where all answer the same."""
    order = permutation(stream_key(seed, "mismatched", 0), len(trees))
    made: dict[int, Tree] = {}
    for place, index in enumerate(order):
        prompt = trees[index].prompt
        later = (order[(place + step) % len(order)] for step in range(1, len(order)))
        following = order[(place + 1) % len(order)]
        partner = next((other for other in later if trees[other].prompt != prompt), following)
        made[index] = Tree(prompt, (trees[partner].responses[0][: max_length - len(prompt)],))
    return [made[index] for index in range(len(trees))]


@torch.no_grad()
def label_metrics(outputs: Outputs, batch: LabelledBatch, rewards: Tensor, point: Tensor | float) -> Metrics:
    """rewards/chosen and logps/chosen of the good responses, the same of the bad ones as rejected; rewards/accuracies:
    the share whose reward lies on its own side of ``point``. ``rewards`` [S]."""
    good, logps = batch.label, response_logprobs(outputs, batch)
    right = torch.where(good, rewards > point, rewards < point)
    metrics: Metrics = {"rewards/accuracies": Mean(right.sum(), batch.counts["sequence"])}
    for name, side in (("chosen", good), ("rejected", ~good)):
        metrics[f"rewards/{name}"] = Mean(rewards[side].sum(), side.sum())
        metrics[f"logps/{name}"] = Mean(logps[side].sum(), side.sum())
    return metrics
