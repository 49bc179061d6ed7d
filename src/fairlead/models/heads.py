"""Heads on a trunk: the value before each token, the reward at a sequence's last, of which there may be several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fairlead.errors import ModelError
from fairlead.ops.sampling import stream_key
from fairlead.ops.scores import disagreement

Combination = Literal["mean", "minimum", "mean-minus-disagreement"]


@dataclass(frozen=True, slots=True)
class RewardHeads:
    """The heads of a reward that has several, and how their scores become one (Coste et al. 2023; Eisenstein et al.
    2023, "Helping or Herding?")."""

    kind: Literal["ensemble", "attributes"]
    names: tuple[str, ...]
    combine: Combination = "mean"
    weights: tuple[float, ...] | None = None
    """mean: what the scores are multiplied with before they are added up; none: 1 / their number."""

    @classmethod
    def read(cls, meta: Mapping[str, Any], labels: int, place: object) -> RewardHeads | None:
        """Those of a saved reward with so many ``labels``, by its `read_meta`; none for a reward of one head. Raises
        ModelError for a classifier that is no reward."""
        given: Mapping[str, Any] = meta.get("heads") or {"names": ("reward",)}
        if labels != len(given["names"]):
            wanted = "one" if "heads" not in meta else f"{len(given['names'])}: {', '.join(given['names'])}"
            raise ModelError(
                f"{place} has {labels} labels; a reward model has {wanted}", hint="give the run of a reward stage"
            )
        if "heads" not in meta:
            return None
        weights = given["weights"]
        return cls(given["kind"], tuple(given["names"]), given["combine"], weights and tuple(weights))

    def as_dict(self) -> dict[str, Any]:
        """What is saved."""
        return asdict(self)

    def combined(self, scores: Tensor) -> Tensor:
        """The score. [..., K] -> [...]"""
        if self.combine == "minimum":
            return scores.amin(-1)
        mean = self.mean(scores)
        return mean if self.combine == "mean" else mean - disagreement(scores)

    def mean(self, scores: Tensor) -> Tensor:
        """With the weights, where there are some. [..., K] -> [...]"""
        return scores.mean(-1) if self.weights is None else scores @ scores.new_tensor(self.weights)


def labels_of(heads: RewardHeads | None) -> dict[str, Any]:
    """The settings of a transformers sequence classifier that holds them; none: a reward of one head."""
    names = ("reward",) if heads is None else heads.names
    labels: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    # Without it, transformers' pipelines take the softmax over several labels.
    return labels if heads is None else labels | {"problem_type": "regression"}


def trunk_width(model: Any) -> int:
    """Width of the last hidden states (OPT-350m's differs from its layers')."""
    head = model.get_output_embeddings()
    return int((model.get_input_embeddings() if head is None else head).weight.shape[1])


class ScalarHead(nn.Module):
    """One number from a hidden state, or ``outputs``. [..., H] -> [...], or [..., K], in max(fp32, its dtype).

    A reward head starts at N(0, 1 / (H + 1)) without a bias, as in Stiennon et al. (2020), so that transformers'
    sequence classifiers can hold it, each of several from a draw of its own; the value head starts at zero.
    """

    def __init__(
        self, hidden_size: int, *, role: str, seed: int, dtype: torch.dtype = torch.float32, outputs: int = 1
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, outputs, bias=role == "value", dtype=dtype)
        with torch.no_grad():
            if role == "value":
                self.linear.weight.zero_()
                self.linear.bias.zero_()
                return
            for number, row in enumerate(self.linear.weight):
                key = stream_key(seed, "head", role, *([number] if number else ()))
                row.normal_(0, (hidden_size + 1) ** -0.5, generator=torch.Generator().manual_seed(key))

    @torch.no_grad()
    def start_as(self, weight: Tensor) -> None:
        """Begin with the weights of another head, [K, H]. Raises ModelError for one of another width."""
        own = self.linear.weight
        if weight.shape != own.shape:
            raise ModelError(f"a saved score head is {tuple(weight.shape)}, this trunk takes {tuple(own.shape)}")
        own.copy_(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        found = self.linear(hidden.to(self.linear.weight.dtype))
        return found[..., 0].clone() if found.shape[-1] == 1 else found  # FSDP hooks what it sees, and loses views
