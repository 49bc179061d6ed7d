"""Reward models of several heads: what each head learns, by hand and however a step is split; what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from tests.end_to_end.rows import FAULTS, PAIRS, SCRATCH, TOPICS, settings
from tests.tiny import gradients, models, relative_error, scatter
from torch import Tensor

import fairlead
from fairlead.algorithms import reward, reward_data
from fairlead.conformance.staged import staged
from fairlead.conformance.tasks import Task
from fairlead.data.pack import preference_batch, ranking_batch
from fairlead.data.render import Tree
from fairlead.errors import DataError
from fairlead.training.loop import backward, total_counts
from fairlead.types import Outputs, PreferenceBatch, RankingBatch

NAN = math.nan
TREES = [
    Tree((5, 6, 7), ((8, 9, 1), (8, 4, 5, 6, 1), (4, 1))),
    Tree(tuple(range(3, 14)), ((20, 21, 22, 1), tuple(range(30, 41)))),
    Tree((9, 9), ((4, 1), (7, 7, 7, 1), (5, 1))),
    Tree((10, 11, 12, 13), ((14, 15, 1), (16, 1))),
]
TIMES = torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]])
"""Of the trees, for three members."""
LEVELS = [[0, 1, 1], [0, 1], [0, 1, 2], [0, 1]]
RATINGS = [[4.0, 2.0, 2.0], [1.5, 1.0], [3.0, 2.0, 1.0], [5.0, 0.0]]
JUDGED = [
    torch.tensor([[1.0, NAN], [3.0, 2.0], [3.0, 0.5]]),
    torch.tensor([[0.0, 1.0], [2.0, 1.0]]),
    torch.tensor([[NAN, 4.0], [NAN, 1.0], [NAN, NAN]]),
    torch.tensor([[2.0, 0.0], [1.0, 3.0]]),
]
"""Of the trees by two attributes, with ties and with what was not judged."""


def bradley_terry(difference: float) -> float:
    return math.log(1 + math.exp(-difference))


def batch_of(group: Sequence[int], kind: str, *, packed: bool = True) -> PreferenceBatch:
    trees = [TREES[i] for i in group]
    if kind == "pairs":
        pairs = [Tree(tree.prompt, tree.responses[:2]) for tree in trees]
        batch = preference_batch(pairs, packed=packed, pad_id=0, margins=[float(i) for i in group])
        return replace(batch, times=TIMES[list(group)])
    batch = ranking_batch(
        trees,
        [LEVELS[i] for i in group],
        packed=packed,
        pad_id=0,
        ratings=[RATINGS[i] for i in group],
        attributes=[JUDGED[i] for i in group] if kind == "attributes" else None,
    )
    return batch if kind == "attributes" else replace(batch, times=TIMES[list(group)])


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("pairs", {"members": 3, "margin_coef": 0.5, "label_smoothing": 0.1}),
    "all pairs": ("rankings", {"members": 3, "rankings": True}),
    "orders": ("rankings", {"members": 3, "loss": "plackett_luce"}),
    "ratings": ("rankings", {"members": 3, "loss": "regression"}),
    "pairs by attribute": ("attributes", {"attributes": ("kind", "right"), "margin_coef": 0.5}),
    "ratings by attribute": ("attributes", {"attributes": ("kind", "right"), "loss": "regression"}),
    "ratings by one attribute": ("one", {"attributes": ("kind",), "loss": "regression"}),
}


def step(form: str, groups: Sequence[Sequence[int]], *, packed: bool = True) -> tuple[dict[str, Tensor], Any]:
    kind, given = FORMS[form]
    wanted = reward.Settings(**given)
    made = models(("reward",), dtype=torch.float64, architecture="opt", reward_heads=wanted.reward_heads)
    scatter(made, 0.05)
    batches = [batch_of(group, "attributes" if kind == "one" else kind, packed=packed) for group in groups]
    if kind == "one":  # the last tree's first attribute is its only known one
        batches = [_first_attribute(batch) for batch in batches]
    metrics = backward(made, reward.passes(wanted), batches)
    return gradients(made), metrics


def _first_attribute(batch: PreferenceBatch) -> PreferenceBatch:
    assert isinstance(batch, RankingBatch) and batch.attributes is not None
    first = batch.attributes[:, :1]
    return replace(batch, attributes=first, counts={**batch.counts, "attribute_rating": float((~first.isnan()).sum())})


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[2], [0], [3], [1]], [[0, 2, 3], [1]]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_heads_gradient_is_the_same_however_a_step_is_split(
    form: str, groups: list[list[int]], packed: bool
) -> None:
    wanted, whole = step(form, [[0, 1, 2, 3]])
    got, split = step(form, groups, packed=packed)
    # In a difference of scores the last bias cancels, and rounding alone is left.
    seen = [name for name in wanted if float(wanted[name].norm()) > 1e-12]
    assert relative_error({n: got[n] for n in seen}, {n: wanted[n] for n in seen}) < 1e-12
    assert split == pytest.approx(whole, abs=1e-12)


def test_a_members_gradient_is_that_of_one_head_on_its_bootstrap() -> None:
    trees = [Tree(tree.prompt, tree.responses[:2]) for tree in TREES]
    plain, three = reward.Settings(centring_coef=0.0), reward.Settings(members=3, centring_coef=0.0)
    made = models(("reward",), dtype=torch.float64, architecture="opt", reward_heads=three.reward_heads)
    scatter(made, 0.05)
    backward(made, reward.passes(three), [batch_of(range(4), "pairs")])
    head = made.heads["reward"].get_parameter("linear.weight")
    assert head.grad is not None
    for k in range(3):
        alone = models(("reward",), dtype=torch.float64, architecture="opt")
        scatter(alone, 0.05)
        with torch.no_grad():
            for name, parameter in alone.trainable.items():
                own = made.trainable[name]
                parameter.copy_(own[k : k + 1] if name.startswith("heads.") else own)
        drawn = [tree for tree, times in zip(trees, TIMES[:, k].tolist(), strict=True) for _ in range(int(times))]
        backward(alone, reward.passes(plain), [preference_batch(drawn, packed=True, pad_id=0)])
        grad = alone.heads["reward"].get_parameter("linear.weight").grad
        assert grad is not None
        # One third of the mean over 4 pairs, where the bootstrap's own mean is over as many as it drew.
        torch.testing.assert_close(head.grad[k], grad[0] * len(drawn) / 4 / 3, rtol=1e-12, atol=1e-15)


# --- by hand -------------------------------------------------------------------------------------------------------


class Stub:
    """A model whose heads give the scores it was given."""

    device = torch.device("cpu")
    trainable: ClassVar[dict[str, Any]] = {}

    def __init__(self, scores: list[list[float]]) -> None:
        self.scores = torch.tensor(scores, dtype=torch.float64, requires_grad=True)

    def use(self, _: str) -> Any:
        return nullcontext()

    def whole(self) -> Any:
        return nullcontext()

    def __call__(self, *_: Any, **__: Any) -> Outputs:
        return Outputs(head_scores=self.scores, scores=self.scores.mean(1))


def test_the_loss_and_the_metrics_of_an_ensemble_by_hand() -> None:
    pairs = [Tree((5,), ((6, 1), (7, 1))), Tree((8,), ((9, 1), (6, 1)))]
    batch = replace(preference_batch(pairs, packed=True, pad_id=0), times=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    made: Any = Stub([[1.0, -1.0], [0.0, 2.0], [3.0, 0.5], [1.0, 0.0]])
    metrics = backward(made, reward.passes(reward.Settings(members=2, centring_coef=0.1)), [batch])
    # First member: twice 1 and once 2; second: none of the first pair, and once 0.5. A mean over 2 pairs and 2 heads.
    wanted = (2 * bradley_terry(1) + bradley_terry(2) + bradley_terry(0.5)) / 4
    assert metrics["loss/bradley_terry"] == pytest.approx(wanted, rel=1e-12)
    assert metrics["loss/centring"] == pytest.approx((2 * 1**2 + 4**2 + 0.5**2) / 4, rel=1e-12)
    assert metrics["loss"] == pytest.approx(metrics["loss/bradley_terry"] + 0.1 * metrics["loss/centring"], rel=1e-12)
    assert (metrics["rewards/accuracies/member_1"], metrics["rewards/accuracies/member_2"]) == (1.0, 0.5)
    # The means are 0, 1, 1.75, 0.5; the members lie 1, 1, 1.25, 0.5 to both sides of them.
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == pytest.approx((-1 + 1.25) / 2)
    assert metrics["reward/disagreement"] == pytest.approx((1 + 1 + 1.25 + 0.5) / 4)


def judged_batch(judged: list[list[list[float]]], levels: list[list[int]]) -> RankingBatch:
    trees = [Tree((5,), tuple((6 + i, 1) for i in range(len(rows)))) for rows in judged]
    return ranking_batch(trees, levels, packed=True, pad_id=0, attributes=[torch.tensor(rows) for rows in judged])


SCORES = [[1.0, 0.0], [0.5, 1.0], [0.0, 3.0], [2.0, -1.0], [0.0, 0.0]]
JUDGEMENTS = [[[4.0, 0.0], [3.0, NAN], [3.0, 2.0]], [[NAN, 1.0], [2.0, 5.0]]]


def test_each_attribute_learns_from_its_own_pairs_by_hand() -> None:
    made: Any = Stub(SCORES)
    given = reward.Settings(attributes=("kind", "right"), margin_coef=0.5, centring_coef=0.0)
    batch = judged_batch(JUDGEMENTS, [[0, 1, 2], [0, 1]])
    metrics = backward(made, reward.passes(given), [batch])
    # kind: of the first ranking the first over both others, by 1 each; right: the third over the first, by 2; of the
    # second ranking right alone, the last over the first, by 4.
    kind = (bradley_terry(0.5 - 0.5) + bradley_terry(1.0 - 0.5)) / 2
    right = bradley_terry(3.0 - 1.0) + bradley_terry(1.0 - 2.0)
    assert total_counts([batch])["attribute_ranking"] == 3
    assert metrics["loss"] == pytest.approx((kind + right) / 3, rel=1e-7)
    assert (metrics["rewards/accuracies/kind"], metrics["rewards/accuracies/right"]) == (1.0, 1.0)
    # Means 0.5, 0.75, 1.5 and 0.5, 0 against the order of the data: one of four pairs.
    assert metrics["rewards/accuracies"] == 0.25
    assert "reward/disagreement" not in metrics
    made.scores = torch.tensor([*SCORES[:3], [2.0, 1.0], SCORES[4]], requires_grad=True)
    metrics = backward(made, reward.passes(given), [batch])
    assert (metrics["rewards/accuracies/kind"], metrics["rewards/accuracies/right"]) == (1.0, 0.5)


def test_what_was_not_judged_teaches_nothing_by_hand() -> None:
    made: Any = Stub(SCORES)
    batch = judged_batch(JUDGEMENTS, [[0, 1, 2], [0, 1]])
    passes = reward.passes(reward.Settings(attributes=("kind", "right"), loss="regression"))
    metrics = backward(made, passes, [batch])
    kind, right = [3.0**2, 2.5**2, 3.0**2, 2.0**2], [0.0, 1.0, 2.0**2, 5.0**2]
    assert metrics["loss"] == pytest.approx(sum(kind + right) / 8, rel=1e-7)
    assert metrics["rewards/error/kind"] == pytest.approx(sum(kind) / 4)
    assert metrics["rewards/error/right"] == pytest.approx(sum(right) / 4)
    assert made.scores.grad[1, 1] == 0 and made.scores.grad[3, 0] == 0
    assert int((made.scores.grad != 0).sum()) == 7  # the first response's second score is right


def test_single_responses_are_rated_and_compared_with_nothing() -> None:
    made: Any = Stub([[1.0, 0.0], [0.5, 1.0]])
    batch = judged_batch([[[4.0, 0.0]], [[2.0, 3.0]]], [[0], [0]])
    metrics = backward(made, reward.passes(reward.Settings(attributes=("a", "b"), loss="regression")), [batch])
    assert metrics["loss"] == pytest.approx((9 + 0 + 2.25 + 4) / 4)
    assert not any("accuracies" in name or "margins" in name for name in metrics)


# --- the bootstrap -------------------------------------------------------------------------------------------------


def test_a_bootstrap_counts_as_poisson_does() -> None:
    times = reward_data.bootstrap(7, 3, range(40_000))
    for k in range(4):
        share = math.exp(-1) / math.factorial(k)
        # Five standard errors of a share of 120,000.
        assert float((times == k).float().mean()) == pytest.approx(share, abs=5 * math.sqrt(share / 120_000))
    assert times.max() >= 6
    assert float(torch.corrcoef(times.T)[0, 1]) == pytest.approx(0, abs=5 / math.sqrt(40_000))


def test_a_bootstrap_is_keyed_by_seed_member_and_pair_alone() -> None:
    whole = reward_data.bootstrap(7, 4, range(100))
    assert torch.equal(reward_data.bootstrap(7, 2, [3, 90, 41]), whole[[3, 90, 41], :2])
    assert not torch.equal(reward_data.bootstrap(8, 4, range(100)), whole)


# --- settings ------------------------------------------------------------------------------------------------------

TWO = ("kind", "right")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"members": 1}, "greater than or equal to 2"),
    ({"members": 2, "attributes": TWO}, "an ensemble or attributes"),
    ({"attributes": ("kind", "kind")}, "attributes holds kind more than once"),
    ({"attributes": TWO, "loss": "plackett_luce"}, "bradley_terry or regression"),
    ({"combine": "minimum"}, "combine=minimum is for several heads"),
    ({"combine": "minimum", "attributes": ("kind",)}, "combine=minimum is for several heads"),
    ({"combine": "mean-minus-disagreement", "attributes": TWO}, "attributes measure different things"),
    ({"attribute_weights": {"kind": 1.0}}, "attribute_weights are of kind, attributes are none"),
    ({"attributes": TWO, "attribute_weights": {"kind": 1.0}}, "attributes are kind, right"),
    ({"attributes": TWO, "attribute_weights": {"kind": 1.0, "right": 2.0}, "combine": "minimum"}, "for the mean"),
    ({"attributes": ("kind",), "attribute_weights": {"kind": 1.0}}, "for the mean of several"),
    ({"attributes": TWO, "loss": "regression", "label_smoothing": 0.1}, "for loss bradley_terry"),
    ({"loss": "regression", "centring_coef": 0.1}, "for losses of comparisons"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        reward.Settings(**given)


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({}, 0.0),
        ({"members": 2}, 0.01),
        ({"members": 2, "loss": "regression"}, 0.0),
        ({"members": 2, "centring_coef": 0.0}, 0.0),
        ({"attributes": ("kind",)}, 0.0),
        ({"attributes": TWO}, 0.01),
        ({"centring_coef": 0.3}, 0.3),
    ],
)
def test_several_heads_that_compare_are_centred(given: dict[str, Any], weight: float) -> None:
    found = {term.name: term.weight for term in reward.passes(reward.Settings(**given))[0].terms}
    assert found.get("centring", 0.0) == weight


# --- data ----------------------------------------------------------------------------------------------------------

JUDGED_ROWS = [
    {
        "prompt": f"why does the {topic} stop?",
        "responses": [f"the {fault} is loose", f"buy a {topic}"],
        "attributes": {"kind": [4, 2], "right": [number % 3, 1]},
    }
    for topic in TOPICS
    for number, fault in enumerate(FAULTS)
]


def train(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Any:
    given = settings("reward", folder, **{"model.scratch": SCRATCH, **more})
    return fairlead.train({"algorithm": "reward"}, given, data=rows)


def test_an_attribute_that_no_row_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no row has a score of wise, which reward\.attributes .*: kind, right;"):
        train(tmp_path, JUDGED_ROWS, **{"reward.attributes": ["kind", "wise"]})
    with pytest.raises(DataError, match=r"(?s)no row has a score of kind.*the rows have: none"):
        train(tmp_path, PAIRS, **{"reward.attributes": ["kind"]})


def test_equal_scores_of_a_ranking_share_a_place(tmp_path: Path) -> None:
    row = {"prompt": "a b", "responses": ["a", "b", "a b", "b b"], "scores": [3, 2, 2, 1]}
    given = {"reward.rankings": True, "train.steps": 1, "train.batch_size": 1, "data.eval_fraction": 0}
    run = staged(Task("ab", 3, ("a b",)), "reward", given, [row, row], tmp_path)
    (batch,) = next(run.steps())
    assert batch.level.tolist() == [0, 1, 1, 2] and batch.counts["pair"] == 5


def test_rankings_that_teach_nothing_are_counted_and_alone_refused(tmp_path: Path) -> None:
    blank = {"prompt": "why?", "responses": ["a", "b"], "scores": [1, 2], "attributes": {"kind": [None, None]}}
    tie = {"prompt": "how?", "responses": ["a", "b"], "attributes": {"kind": [3, 3], "right": [None, 1]}}
    more: dict[str, Any] = {"reward.attributes": ["kind", "right"], "data.eval_fraction": 0}
    run = train(tmp_path, [*JUDGED_ROWS, blank, tie], **more)
    counts = json.loads((run.path / "manifest.json").read_text())["data"]["train"]
    # Of the four faults of a topic the second is a tie by right, but not by kind.
    assert (counts["kept"], counts["dropped"]) == (32, {"no score of an attribute": 1, "tie": 1})
    with pytest.raises(DataError, match=r"(?s)nothing to learn from 2 train rankings: \{'tie': 2\}.*loss=regression"):
        train(
            tmp_path, [tie, tie | {"prompt": "when?"}], **(more | {"run.name": "ties", "reward.attributes": ["kind"]})
        )


def test_a_run_with_several_heads_learns_and_measures_each(tmp_path: Path) -> None:
    more = {"reward.attributes": ["kind", "right"], "train.steps": 30, "optim.learning_rate": 1e-2}
    run = train(tmp_path, JUDGED_ROWS, **more)
    last = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()][-1]
    # kind is always the first answer's; who is right goes by the fault.
    assert last["eval/rewards/accuracies/kind"] > 0.9
    assert last["eval/rewards/accuracies/right"] > 0.6
    members = train(tmp_path, PAIRS, **{"reward.members": 3, "run.name": "ensemble"})
    first = json.loads((members.path / "metrics.jsonl").read_text().splitlines()[0])
    assert {f"eval/rewards/accuracies/member_{k}" for k in (1, 2, 3)} <= first.keys()
    assert first["eval/reward/disagreement"] > 0
    manifest = json.loads((members.path / "manifest.json").read_text())
    assert manifest["parameters"]["heads"] == {"reward": 3 * SCRATCH["hidden_size"]}
