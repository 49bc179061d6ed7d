import json
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.conftest import PAIRS, Runs, settings

from fairlead.errors import ConfigError, RunError
from fairlead.evaluation import crossval
from fairlead.evaluation.crossval import compare, cross_validate, group_key, verdict
from fairlead.evaluation.metrics import Estimate
from fairlead.runner import resolve
from fairlead.types import Message, Preference

# Length tells nothing, the words tell everything.
ROWS = [
    {"prompt": row["prompt"], "chosen": f"Good {i % 3}.", "rejected": f"Evil {i % 3}."} for i, row in enumerate(PAIRS)
]


def tiny(runs: Runs, folder: Path, **more: Any) -> dict[str, Any]:
    return settings(folder, "reward", **{"model.path": str(runs.reference), "train.steps": 12, **more})


def test_each_pair_is_scored_once_out_of_fold(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[set[str], set[str]]] = []
    original = crossval.run_stage

    def spy(resolved: Any, given: Any, *, folder: Path) -> Any:
        seen.append(({row["prompt"] for row in given.data}, {row["prompt"] for row in given.eval_data}))
        return original(resolved, given, folder=folder)

    monkeypatch.setattr(crossval, "run_stage", spy)
    base = {"algorithm": "reward"}
    found = cross_validate(base, tiny(runs, tmp_path), folds=2, out=tmp_path / "cv", learning_curve=[0.5, 1], data=ROWS)
    prompts = {row["prompt"] for row in ROWS}
    (train, heldout), (other_train, other_heldout), (half, half_heldout) = seen
    assert train | heldout == prompts and not train & heldout
    assert (other_train, other_heldout) == (heldout, train)
    assert half < train and half_heldout == heldout and len(half) == -(-len(train) // 2)

    assert found == json.loads((tmp_path / "cv" / "crossval.json").read_text("utf-8"))
    assert (found["pairs"], found["prompts"], found["folds"]) == (12, 12, 2)
    assert sum(fold["pairs"] for fold in found["by_fold"]) == 12
    assert found["baselines"]["length_only"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 12}  # all of one length
    assert found["baselines"]["tf_idf"]["mean"] == 1.0
    weighted = sum(fold["pairs"] * fold["accuracy"]["reward"] for fold in found["by_fold"]) / 12
    assert found["accuracy"]["mean"] == pytest.approx(weighted)
    assert found["differences"]["tf_idf"]["mean"] == pytest.approx(found["accuracy"]["mean"] - 1.0)
    assert [point["pairs"] for point in found["learning_curve"]] == [len(half), len(train)]
    assert found["learning_curve"][1]["accuracy"]["mean"] == found["by_fold"][0]["accuracy"]["reward"]

    # Finished folds are read back; other data in the same folder are refused.
    again = cross_validate(base, tiny(runs, tmp_path), folds=2, out=tmp_path / "cv", learning_curve=[0.5, 1], data=ROWS)
    assert again == found
    assert len(seen) == 3
    with pytest.raises(RunError, match="cross-validation of another data"):
        cross_validate(base, tiny(runs, tmp_path), folds=2, out=tmp_path / "cv", data=ROWS[:11])


def test_a_fold_keeps_conversations_that_begin_alike_together():
    first = Message(role="user", content="Hello")
    system = Message(role="system", content="Be kind.")
    later = [first, Message(role="assistant", content="Hi"), Message(role="user", content="Soup?")]
    keys = {group_key(Preference(turns, "a", "b")) for turns in ([first], later, [system, first])}
    assert keys == {"Hello"}
    assert group_key(Preference("Hello", "a", "b")) == "Hello"


def test_the_comparison_by_hand():
    # Right: reward 3 of 4, the baseline 1.5 of 4; differences 1, 0, 1, -0.5.
    found = compare({"reward": [1, 1, 1, -1], "rule": [-1, 1, -1, 0]}, ["a", "b", "c", "d"], seed=0)
    assert found["accuracy"]["mean"] == 0.75
    assert found["baselines"]["rule"]["mean"] == 0.375
    assert found["differences"]["rule"]["mean"] == 0.375
    # Totals of +-1 +-1 +-0.5 that reach 1.5: 1.5, 2.5 and their mirrors -> four of eight.
    assert found["differences"]["rule"]["p_value"] == 0.5


def test_the_verdict_says_when_a_baseline_is_not_beaten():
    accuracy = Estimate(0.61, 0.58, 0.64, 1000)
    baselines = {"length_only": Estimate(0.55, 0.52, 0.58, 1000), "tf_idf": Estimate(0.6, 0.57, 0.63, 1000)}
    differences = {"length_only": Estimate(0.06, 0.03, 0.09, 1000), "tf_idf": Estimate(0.01, -0.02, 0.04, 1000)}
    assert verdict(accuracy, baselines, differences) == (
        "The reward model's accuracy of 0.610 (0.580 to 0.640) on 1000 held-out pairs is not reliably above tf_idf "
        "0.600 (difference 0.010 (-0.020 to 0.040)), but above length_only 0.550 by 0.060 (0.030 to 0.090)."
    )


def test_the_verdict_says_by_how_much_both_are_beaten():
    accuracy, baseline = Estimate(0.7, 0.68, 0.72, 1000), Estimate(0.6, 0.57, 0.63, 1000)
    assert verdict(accuracy, {"tf_idf": baseline}, {"tf_idf": Estimate(0.1, 0.07, 0.13, 1000)}) == (
        "The reward model's accuracy of 0.700 (0.680 to 0.720) on 1000 held-out pairs is above tf_idf 0.600 by 0.100 "
        "(0.070 to 0.130)."
    )


def test_a_stage_without_a_reward_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="algorithm=dpo trains no reward model"):
        cross_validate({"algorithm": "dpo"}, out=tmp_path, data=ROWS)


def test_the_best_checkpoint_may_not_be_chosen_on_the_held_out_fold(tmp_path: Path):
    resolved = resolve({"algorithm": "reward", "train": {"save_best": True}})
    with pytest.raises(ConfigError, match="would then be flattered"):
        cross_validate(resolved, out=tmp_path, data=ROWS)


def test_the_best_checkpoint_is_chosen_on_the_recipes_own_held_out_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Stopped(Exception): ...

    def spy(_: Any, given: Any, *, folder: Path) -> None:
        assert given.eval_data is None
        raise Stopped

    monkeypatch.setattr(crossval, "run_stage", spy)
    recipe = {"algorithm": "reward", "train": {"save_best": True}, "data": {"eval_fraction": 0.3}}
    with pytest.raises(Stopped):
        cross_validate(recipe, out=tmp_path, data=ROWS, folds=2)


def test_too_few_prompts_for_the_folds_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="1 prompts leave one of 5 folds empty"):
        cross_validate({"algorithm": "reward"}, out=tmp_path, data=ROWS[:1])
    with pytest.raises(ConfigError, match="folds must be at least 2, got 1"):
        cross_validate({"algorithm": "reward"}, out=tmp_path, data=ROWS, folds=1)
    with pytest.raises(ConfigError, match=r"at most 1, got 1\.5"):
        cross_validate({"algorithm": "reward"}, out=tmp_path, data=ROWS, learning_curve=[1.5])


def test_columns_and_filters_hold_for_the_pairs_of_every_fold(runs: Runs, tmp_path: Path):
    named = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in (*ROWS, ROWS[0])]
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    wanted = tiny(runs, tmp_path, **{"data.columns": columns, "data.filter": {"dedupe": "exact"}, "train.steps": 2})
    found = cross_validate({"algorithm": "reward"}, wanted, folds=2, out=tmp_path / "cv", data=named)
    assert found["pairs"] == len(ROWS)
    assert sum(found["data"]["dropped"].values()) == 1
