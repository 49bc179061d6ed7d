"""The shipped pipeline on the real file, cut down to seconds: every stage runs from the raw gz to the report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fairlead.pipeline import run_pipeline


@pytest.mark.skipif("FAIRLEAD_DATA" not in os.environ, reason="FAIRLEAD_DATA names no folder of real data")
def test_hh_tiny_runs_from_the_raw_transcripts_to_the_report(tmp_path: Path) -> None:
    data = Path(os.environ["FAIRLEAD_DATA"])
    small = {
        "name": "hh",
        "directory": str(tmp_path),
        "data.path": str(data / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"),
        "data.text": str(data / "text" / "wikitext-2" / "valid.txt"),
        "stages.pretrain.model.scratch.hidden_size": 16,
        "stages.pretrain.model.scratch.num_layers": 1,
        "stages.pretrain.model.scratch.num_heads": 2,
        "stages.pretrain.model.scratch.vocab_size": 600,
        "stages.pretrain.train.steps": 3,
        "stages.pretrain.data.limit": 40,
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
    summary = run_pipeline("hh-tiny", small)
    assert summary["status"] == "finished"
    prepared = json.loads((tmp_path / "hh" / "prepared" / "manifest.json").read_text())
    assert prepared["counts"]["read"] == 1600
    assert prepared["counts"]["dropped"] == {"empty answer": 4, "two turns of the same role running": 4}
    assert set(summary["models"]) == {"sft", "dpo", "ppo", "reward"}
    assert {"score", "kl", "length", "distinct_2", "win_rate"} <= summary["models"]["ppo"]["metrics"].keys()
    assert {"accuracy", "baselines", "verdict", "learning_curve"} <= summary["crossval"]["folds"].keys()
    page = (tmp_path / "hh" / "report.html").read_text("utf-8")
    assert "two turns of the same role running" in page or "prompt longer than" in page
