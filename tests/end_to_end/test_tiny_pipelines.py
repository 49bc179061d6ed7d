"""The shipped pipelines on real files, cut down to seconds: every stage runs from the raw data to the report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from benchmarks.hh_raft import accuracies, exploit, rounds

from fairlead.pipeline import run_pipeline

needs_data = pytest.mark.skipif("FAIRLEAD_DATA" not in os.environ, reason="FAIRLEAD_DATA names no folder of real data")


def cut_down(tmp_path: Path, source: str) -> dict[str, Any]:
    data = Path(os.environ["FAIRLEAD_DATA"])
    small: dict[str, Any] = {
        "name": "tiny",
        "directory": str(tmp_path),
        "data.path": str(data / source),
        "data.text": str(data / "text" / "wikitext-2" / "valid.txt"),
        "stages.pretrain.model.scratch.hidden_size": 16,
        "stages.pretrain.model.scratch.num_layers": 1,
        "stages.pretrain.model.scratch.num_heads": 2,
        "stages.pretrain.model.scratch.vocab_size": 600,
        "stages.pretrain.train.steps": 3,
        "stages.pretrain.data.limit": 40,
        "stages.pretrain.data.eval_fraction": 0.2,
        "stages.folds.folds": 2,
        "stages.folds.learning_curve": [0.5],
        "stages.ppo.ppo.rollout_size": 4,
        "stages.ppo.ppo.num_eval_prompts": 2,
        "stages.ppo.ppo.max_new_tokens": 8,
        "stages.ppo.data.max_prompt_length": 300,
        "stages.evaluation.num_prompts": 4,
        "stages.evaluation.max_new_tokens": 8,
    }
    for stage in ("sft", "reward", "folds", "dpo", "ppo"):
        small |= {f"stages.{stage}.train.steps": 2, f"stages.{stage}.train.batch_size": 4}
    for stage in ("sft", "reward", "folds", "dpo"):
        small[f"stages.{stage}.data.limit"] = 60
    return small


def check(summary: dict[str, Any]) -> None:
    assert summary["status"] == "finished"
    assert set(summary["models"]) == {"sft", "dpo", "ppo", "reward"}
    assert {"score", "kl", "length", "distinct_2", "win_rate"} <= summary["models"]["ppo"]["metrics"].keys()
    assert {"accuracy", "baselines", "verdict", "learning_curve"} <= summary["crossval"]["folds"].keys()


@needs_data
def test_hh_tiny_runs_from_the_raw_transcripts_to_the_report(tmp_path: Path) -> None:
    check(run_pipeline("hh-tiny", cut_down(tmp_path, "hh-rlhf/harmless-base/test.jsonl.gz")))
    prepared = json.loads((tmp_path / "tiny" / "prepared" / "manifest.json").read_text())
    assert prepared["counts"]["read"] == 1600
    assert prepared["counts"]["dropped"] == {"empty answer": 4, "two turns of the same role running": 4}
    page = (tmp_path / "tiny" / "report.html").read_text("utf-8")
    assert "two turns of the same role running" in page or "prompt longer than" in page


@needs_data
def test_hh_raft_tiny_runs_from_the_raw_transcripts_to_what_its_script_reads(tmp_path: Path) -> None:
    runs = ("raft", "exploit", "guarded")
    small = {
        key: value
        for key, value in cut_down(tmp_path, "hh-rlhf/harmless-base/test.jsonl.gz").items()
        if key.split(".")[0] != "stages" or key.split(".")[1] in ("pretrain", "sft", "reward", "evaluation")
    }
    small |= {"stages.second.train.steps": 2, "stages.second.train.batch_size": 4, "stages.second.data.limit": 60}
    for run in runs:
        small |= {f"stages.{run}.train.steps": 4, f"stages.{run}.train.batch_size": 2, f"stages.{run}.raft.epochs": 1}
        small |= {f"stages.{run}.raft.rollout_size": 4, f"stages.{run}.raft.max_new_tokens": 8}
        small |= {f"stages.{run}.raft.num_samples": 2, f"stages.{run}.raft.max_empty": 1.0}
    small |= {"stages.raft.train.eval_every": 2, "stages.raft.raft.num_eval_prompts": 4}
    summary = run_pipeline("hh-raft-tiny", small)
    assert {"sft", *runs, "reward", "second"} == set(summary["models"])
    folder = tmp_path / "tiny"
    found = rounds(folder / "raft")
    assert [row["step"] for row in found] == [0, 2, 4] and all(row["score_margin"] > 0 for row in found)
    assert exploit(folder / "exploit", "x")["rounds"] == 2
    assert [line["case"] for line in accuracies(folder)] == ["reward", "second"]


@needs_data
def test_stack_exchange_tiny_runs_from_the_raw_dumps_to_the_report(tmp_path: Path) -> None:
    check(run_pipeline("stack-exchange-tiny", cut_down(tmp_path, "stackexchange")))
    prepared = json.loads((tmp_path / "tiny" / "prepared" / "manifest.json").read_text())
    assert prepared["counts"]["read"] == 2354 + 592 + 624 + 1986
    sample = json.loads((tmp_path / "tiny" / "sft" / "samples.jsonl").read_text("utf-8").split("\n")[0])
    assert sample["prompt"].startswith("Question: ")
    assert sample["prompt"].endswith("\n\nAnswer:")
    assert (tmp_path / "tiny" / "report.html").is_file()


@needs_data
def test_stack_llama_tiny_runs_from_the_raw_dumps_over_a_merged_adapter_to_the_report(tmp_path: Path) -> None:
    given = cut_down(tmp_path, "stackexchange")
    small = {key: value for key, value in given.items() if key.split(".")[1:2] != ["folds"]} | {
        key.replace("pretrain", "llama"): value for key, value in given.items() if ".pretrain." in key
    }
    small = {key: value for key, value in small.items() if ".pretrain." not in key}
    summary = run_pipeline("stack-llama-tiny", {**small, "stages.ppo.ppo.shortest_limit": 4})
    assert summary["status"] == "finished"
    assert set(summary["models"]) == {"sft", "ppo", "dpo", "reward"}
    folder = tmp_path / "tiny"
    notes = [json.loads((folder / name / "manifest.json").read_text())["notes"] for name in ("ppo", "dpo")]
    assert all(f"reference: {folder / 'merged'} with adapters off" in told for told in notes)
    assert json.loads((folder / "merged" / "merge.json").read_text())["into"] == "original"


@needs_data
def test_imdb_sentiment_runs_from_the_reviews_to_the_report(tmp_path: Path) -> None:
    data = Path(os.environ["FAIRLEAD_DATA"])
    small: dict[str, Any] = {
        "directory": str(tmp_path),
        "data.path": str(data / "imdb"),
        "data.second": str(data / "rt-polarity"),
        "stages.pretrain.model.scratch.hidden_size": 16,
        "stages.pretrain.model.scratch.num_layers": 2,
        "stages.pretrain.model.scratch.num_heads": 2,
        "stages.pretrain.model.scratch.vocab_size": 600,
        "stages.pretrain.data.limit": 40,
        "stages.pretrain.data.eval_fraction": 0.2,
        "stages.ppo.model.adapter.last": 2,
        "stages.raft.model.adapter.last": 2,
        "stages.ppo.ppo.rollout_size": 4,
        "stages.ppo.ppo.max_new_tokens": 8,
        "stages.ppo.ppo.eval_samples": 2,
        "stages.raft.raft.rollout_size": 4,
        "stages.raft.raft.max_new_tokens": 8,
        "stages.evaluation.num_prompts": 4,
        "stages.evaluation.max_new_tokens": 8,
    }
    for stage in ("classifier", "second"):
        held_out = tmp_path / f"{stage}.jsonl"
        rows = [{"prompt": "", "response": f"{word} film", "label": word == "good"} for word in ("good", "bad")]
        held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        small[f"stages.{stage}.data.eval_path"] = str(held_out)
    for stage in ("pretrain", "classifier", "second", "ppo", "raft"):
        small |= {f"stages.{stage}.train.steps": 2, f"stages.{stage}.train.batch_size": 4}
    summary = run_pipeline("imdb-sentiment", small)
    assert summary["status"] == "finished"
    for run in ("pretrain", "ppo", "raft"):
        found = summary["models"][run]["metrics"]
        assert 0 < found["positive"]["mean"] < 1 and 0 < found["second"]["mean"] < 1
    folder = tmp_path / "imdb-sentiment"
    watched = [json.loads(line) for line in (folder / "ppo" / "eval_prompts.jsonl").read_text("utf-8").splitlines()]
    assert {(row["step"], row["prompt"]) for row in watched} >= {(step, "This movie was terrible") for step in (0, 2)}
    assert {len(row["scores"]) for row in watched} == {2}
    assert "eval/second" in json.loads((folder / "ppo" / "summary.json").read_text("utf-8"))["metrics"]
    assert (folder / "report.html").is_file()


def test_random_walks_run_from_the_graph_to_the_evaluation(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "directory": str(tmp_path),
        "shared.steps": 2,
        "shared.rounds.epochs": 1,
        "shared.rounds.num_samples": 2,
        "shared.rounds.eval_samples": 1,
        "stages.pretrain.model.scratch.hidden_size": 16,
        "stages.pretrain.model.scratch.num_layers": 1,
        "stages.pretrain.model.scratch.num_heads": 2,
        "stages.pretrain.train.steps": 2,
        # No walk arrives so early, and without a difference there is no pair.
        "stages.online_dpo.online_dpo.reward": "tests.end_to_end.rows:brevity",
        "stages.evaluation.draws": 1,
    }
    summary = run_pipeline("random-walks", small)
    assert summary["status"] == "finished"
    algorithms = ("ppo", "rloo", "grpo", "raft", "online_dpo", "dpo")
    assert list(summary["models"]) == ["pretrain", *algorithms]
    for run in summary["models"].values():
        assert 0 <= run["metrics"]["optimality"]["mean"] <= 1
        assert run["metrics"]["optimality"]["n"] == 20
    for name in algorithms[:5]:
        lines = (tmp_path / "random-walks" / name / "metrics.jsonl").read_text("utf-8").splitlines()
        assert [row["step"] for row in map(json.loads, lines) if "eval/score" in row] == [0, 2]


def test_arithmetic_runs_from_the_sums_to_the_report(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "directory": str(tmp_path),
        "stages.prepared.solved": 60,
        "stages.prepared.unsolved": 20,
        "stages.prepared.heldout": 10,
        "stages.sft.model.scratch.hidden_size": 16,
        "stages.sft.model.scratch.num_layers": 1,
        "stages.grpo.train.batch_size": 4,
        "stages.grpo.grpo.rollout_size": 8,
        "stages.grpo.grpo.num_samples": 2,
        "stages.grpo.grpo.num_eval_prompts": 4,
        "stages.grpo.grpo.max_new_tokens": 16,
        "stages.evaluation.num_prompts": 4,
        "stages.evaluation.max_new_tokens": 16,
    }
    summary = run_pipeline("arithmetic", small | {f"stages.{stage}.train.steps": 2 for stage in ("sft", "grpo")})
    assert summary["status"] == "finished"
    for run in ("sft", "grpo"):
        assert 0 <= summary["models"][run]["metrics"]["exact"]["mean"] <= 1
    lines = (tmp_path / "arithmetic" / "grpo" / "metrics.jsonl").read_text("utf-8").splitlines()
    evaluated = {row["step"]: row["eval/score"] for row in map(json.loads, lines) if "eval/score" in row}
    assert evaluated.keys() == {0, 2}
    assert set(evaluated.values()) <= {number / 4 for number in range(5)}  # of four held-out sums so many are right
    assert (tmp_path / "arithmetic" / "report.html").is_file()
