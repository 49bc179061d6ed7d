"""What benchmarks/random_walks.py makes of a finished pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from benchmarks.random_walks import ALGORITHMS, ROOT, cases, draw, outcomes, progress, read_json


def finished(folder: Path) -> Path:
    """What is read of a pipeline: PPO passes 0.95, falls below it and passes it again; DPO samples nothing."""
    evaluations = {"ppo": [(0, 0.3), (8, 0.96), (16, 0.94), (24, 0.97)], "dpo": list[tuple[int, float]]()}
    for name in ALGORITHMS:
        (folder / name).mkdir(parents=True)
        logged = {
            step: {"step": step, "eval/score": score} for step, score in evaluations.get(name, [(0, 0.3), (8, 0.9)])
        }
        lines = [logged.get(step, {"step": step, "loss": 0.1}) for step in range(0, 32, 4)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation").mkdir()
    found = {
        name: {"optimality": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 20}} for name in ("pretrain", *ALGORITHMS)
    }
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(found))
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"seed": 7}))
    stages = {name: {"seconds": 60.0 + number} for number, name in enumerate(ALGORITHMS)}
    (folder / "summary.json").write_text(json.dumps({"stages": stages}))
    return folder


def test_a_finished_pipeline_gives_each_algorithms_curve_and_the_first_step_that_passes(tmp_path: Path) -> None:
    made = {case["case"]: case for case in cases(finished(tmp_path))}
    assert list(made) == ["ppo", "rloo", "grpo", "raft", "online_dpo", "dpo"]
    assert made["ppo"]["curve"] == {"0": 0.3, "8": 0.96, "16": 0.94, "24": 0.97}
    assert [made[name]["passed"] for name in ("ppo", "rloo", "dpo")] == [8, None, None]
    assert made["dpo"]["curve"] == {}
    assert (made["raft"]["seed"], made["raft"]["seconds"], made["raft"]["ours"]["mean"]) == (7, 63.0, 0.5)


def test_a_table_says_at_which_step_each_seed_passes_and_of_what_samples_nothing_no_step(tmp_path: Path) -> None:
    rows = outcomes({"cases": cases(finished(tmp_path))}).split("\n")
    assert rows[0] == "| | seed 7 | mean | 0.95 passed at step |"
    assert [row for row in rows if row.startswith(("| `ppo`", "| `rloo`", "| `dpo`"))] == [
        "| `ppo` | 0.500 | 0.500 | 8 |",
        "| `rloo` | 0.500 | 0.500 | never |",
        "| `dpo` | 0.500 | 0.500 |  |",
    ]


def test_the_page_shows_what_is_committed(tmp_path: Path) -> None:
    result = read_json(ROOT / "benchmarks" / "results" / "random-walks.json")
    page = (ROOT / "docs" / "concepts" / "random-walks.md").read_text("utf-8")
    for shown in (outcomes(result), progress(result), result["commit"]):
        assert shown in page
    draw(result, tmp_path / "drawn.svg")
    committed = (ROOT / "docs" / "concepts" / "random-walks.svg").read_text("utf-8")
    assert (tmp_path / "drawn.svg").read_text("utf-8") == committed
