"""What benchmarks/relatives.py compares, and how its figures and those of hh_raft.py are drawn from runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.hh_raft import exploit
from benchmarks.pipelines import sampled_tokens
from benchmarks.relatives import METHODS, cases, pipeline
from benchmarks.tables import hh_exploit, imdb, relatives, relatives_by_seed

from fairlead.pipeline import plan


def test_every_method_that_samples_asks_for_as_many_responses(tmp_path: Path) -> None:
    given = {"directory": str(tmp_path), "data.path": str(tmp_path)}
    stages = {name: settings for name, verb, settings in plan(pipeline(), given) if verb == "train"}
    number: dict[str, int] = {}
    for name in ("raft", "ppo", "online_dpo", "iterative_dpo"):
        train, own = stages[name]["train"], stages[name][stages[name]["algorithm"]]
        assert own["plateau"] is None and own["reward"] == stages["raft"]["raft"]["reward"]
        assert own["max_new_tokens"] == 96 and stages[name]["model"]["path"] == stages["dpo"]["model"]["path"]
        rounds, rest = divmod(train["steps"], own["epochs"] * own["rollout_size"] // train["batch_size"])
        assert rest == 0
        number[name] = rounds * own["rollout_size"] * own["num_samples"]
    assert set(number.values()) == {1536}, number
    assert set(METHODS) - {"best_of_4"} <= stages.keys()


def _seed(seed: int, gold: float) -> dict[str, dict[str, Any]]:
    metrics = {"gold": {"mean": gold, "low": gold - 0.1, "high": gold + 0.1, "n": 9}}
    return {name: {"seed": seed, "metrics": metrics, "sampled_tokens": 10 * seed, "seconds": 2.0} for name in METHODS}


def test_a_case_has_the_mean_and_the_ends_over_the_seeds_and_each_with_its_interval() -> None:
    result = {"cases": cases([_seed(20, 0.5), _seed(21, 0.7), _seed(22, 0.9)])}
    raft = {case["metric"]: case for case in result["cases"] if case["case"] == "raft"}
    assert raft["gold"]["ours"] == pytest.approx(0.7)
    assert (raft["gold"]["lowest"], raft["gold"]["highest"], raft["gold"]["repeats"]) == (0.5, 0.9, 3)
    row = next(line for line in relatives(result).split("\n") if line.startswith("| RAFT"))
    assert row == "| RAFT | 0.700 (0.500 to 0.900) |  |  |  | 210 (200 to 220) | 2 |"
    row = next(line for line in relatives_by_seed(result).split("\n") if line.startswith("| offline DPO"))
    assert row == "| offline DPO | 0.500 [0.400, 0.600] | 0.700 [0.600, 0.800] | 0.900 [0.800, 1.000] |"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_the_exploit_is_told_by_its_first_and_last_round_and_its_first_alarm(tmp_path: Path) -> None:
    texts = [["a", "b #", "c", "d"], ["a #", "b ##", "c", "d"], ["# a", "#", "###", "d"]]
    for number, found in enumerate(texts):
        rows = [{"response": text, "length": len(text)} for text in found]
        _write(tmp_path / "rounds" / f"{number:03d}" / "samples.jsonl", rows)
    steps = [{"step": step, "objective/scores": step / 2, "rollout/distinct_2": 1 / step} for step in (1, 3, 5)]
    _write(tmp_path / "metrics.jsonl", [*steps[:1], {"step": 2, "loss": 1.0}, *steps[1:]])
    phrase = {"alarm": "phrase", "step": 3, "message": "'#' has become 9%. For example: x"}
    other = phrase | {"step": 1, "message": "'it' has become 9%. For example: '#'"}
    variety = {"alarm": "variety", "step": 1, "message": "'#' has become"}
    _write(tmp_path / "alarms.jsonl", [other, variety, phrase, phrase | {"step": 5}])
    found = exploit(tmp_path, "nothing discarded")
    assert (found["hashes"], found["score"], found["distinct_2"]) == ([0.25, 0.75], [0.5, 2.5], [1.0, 0.2])
    assert (found["alarm_round"], found["alarm"], found["rounds"]) == (1, "'#' has become 9%", 3)
    assert sampled_tokens(tmp_path) == sum(len(text) for texts_of in texts for text in texts_of)
    row = hh_exploit({"exploit": [found, found | {"alarm_round": None}]}).split("\n")[2:]
    assert row[0] == "| nothing discarded | 0.500 → 2.500 | 0.250 → 0.750 | 1.000 → 0.200 | round 1 |"
    assert row[1].endswith("| none |")


def test_each_algorithm_of_the_reviews_has_a_column() -> None:
    value = {"mean": 0.5, "low": 0.4, "high": 0.6}
    held = {"case": "held-out prompts", "metric": "positive", "before": value | {"mean": 0.45}}
    both = [held | {"algorithm": name, "ours": value} for name in ("ppo", "raft")]
    assert imdb({"cases": both}).split("\n")[2] == (
        "| positive | 0.450 [0.400, 0.600] | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |"
    )
    assert imdb({"cases": [held | {"ours": value}]}).split("\n")[0] == "| | before | PPO |"
