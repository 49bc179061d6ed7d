"""Heads of a reward: where they begin, how several become one score, and what is read of them once saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairlead.errors import ModelError
from fairlead.models.heads import RewardHeads, ScalarHead, labels_of
from fairlead.ops.scores import disagreement

SCORES = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
THREE = ("a", "b", "c")


def test_disagreement_is_the_standard_deviation_over_all_members() -> None:
    # 1, 3, 5 about 3: squares 4, 0, 4, of three members.
    assert disagreement(SCORES).tolist() == pytest.approx([(8 / 3) ** 0.5, 0.0])


@pytest.mark.parametrize(
    ("combine", "weights", "wanted"),
    [
        ("mean", None, [3.0, 2.0]),
        ("minimum", None, [1.0, 2.0]),
        ("mean-minus-disagreement", None, [3.0 - (8 / 3) ** 0.5, 2.0]),
        ("mean", (2.0, 1.0, -0.5), [2.0 + 3.0 - 2.5, 4.0 + 2.0 - 1.0]),
    ],
)
def test_scores_of_several_heads_become_one(combine: Any, weights: Any, wanted: list[float]) -> None:
    heads = RewardHeads("ensemble", THREE, combine, weights)
    assert heads.combined(SCORES).tolist() == pytest.approx(wanted)


def test_what_is_saved_of_several_heads_is_read_again() -> None:
    for heads in (
        RewardHeads("ensemble", THREE, "minimum"),
        RewardHeads("attributes", THREE, weights=(0.5, 1.0, -1.0)),
    ):
        assert RewardHeads.read({"heads": heads.as_dict()}, 3, "here") == heads
    assert RewardHeads.read({"role": "reward"}, 1, "here") is None


@pytest.mark.parametrize(
    ("meta", "labels", "message"),
    [
        ({}, 2, "here has 2 labels; a reward model has one"),
        ({"heads": RewardHeads("ensemble", THREE).as_dict()}, 2, "here has 2 labels; a reward model has 3: a, b, c"),
    ],
)
def test_a_classifier_of_other_labels_is_no_reward(meta: dict[str, Any], labels: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        RewardHeads.read(meta, labels, "here")


def test_heads_are_named_as_labels_and_one_as_before() -> None:
    assert labels_of(None) == {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}}
    assert labels_of(RewardHeads("attributes", ("kind", "right"))) == {
        "num_labels": 2,
        "id2label": {0: "kind", 1: "right"},
        "label2id": {"kind": 0, "right": 1},
        "problem_type": "regression",
    }


def test_each_head_begins_apart_and_the_first_as_one_alone() -> None:
    alone, three = (ScalarHead(4096, role="reward", seed=3, outputs=k).linear.weight.detach() for k in (1, 3))
    assert torch.equal(three[:1], alone)
    assert float(torch.corrcoef(three).tril(-1).abs().max()) < 5 / 4096**0.5
    for row in three:
        assert float(row.std()) == pytest.approx(4097**-0.5, rel=5 / (2 * 4096) ** 0.5)


def test_a_head_gives_a_number_and_several_give_one_each() -> None:
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert ScalarHead(16, role="value", seed=0)(hidden).shape == (2, 5)
    head = ScalarHead(16, role="reward", seed=0, outputs=3)
    torch.testing.assert_close(head(hidden)[..., 1], hidden @ head.linear.weight[1])
