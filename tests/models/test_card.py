"""The model card says what the run's own files say, and no path of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fairlead.models.card import write_card

RECIPE: dict[str, Any] = {
    "algorithm": "dpo",
    "seed": 3,
    "run": {"name": "dpo", "directory": "/home/someone/runs"},
    "model": {"path": "/home/someone/runs/sft", "adapter": {"method": "lora", "rank": 8}, "quantize": {"bits": 4}},
    "optim": {"name": "adamw", "learning_rate": 5e-5, "schedule": "cosine"},
    "train": {"epochs": 1.0, "steps": None, "batch_size": 32},
    "tracking": {"console": True},
    "dpo": {"beta": 0.1, "reward": None},
}
MANIFEST: dict[str, Any] = {
    "versions": {"fairlead": "0.1.0", "torch": "2.13.0"},
    "parameters": {"total": 1_000_000, "trainable": 6_500},
    "data": {"train": {"read": 1342, "kept": 1170, "cut": 1, "dropped": {"too long": 170, "empty": 2}}},
}


def a_run(folder: Path) -> Path:
    prepared = folder / "prepared"
    prepared.mkdir()
    about = {"kind": "hh-rlhf", "source": "https://example.org/hh", "licence": "MIT", "research_only": False}
    (prepared / "manifest.json").write_text(json.dumps(about))
    run = folder / "dpo"
    (run / "evaluation").mkdir(parents=True)
    recipe = {**RECIPE, "data": {"path": str(prepared), "template": "hh", "max_length": 384}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    inputs = {"data.path": {"path": str(prepared), "sha256": "ab12"}}
    (run / "manifest.json").write_text(json.dumps({**MANIFEST, "inputs": inputs}))
    return run


def card(folder: Path, run: Path | None, **options: Any) -> tuple[dict[str, Any], str]:
    write_card(folder, run, **options)
    text = (folder / "README.md").read_text("utf-8")
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_a_card_names_base_data_with_licence_method_and_versions(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    matter, body = card(model, run)
    assert matter == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fairlead", "dpo"],
    }
    for line in (
        "# dpo\n",
        "Trained by dpo from sft.\n",
        "- prepared: hh-rlhf, https://example.org/hh, licence: MIT, sha256 ab12\n",
        "- train: 1,342 records read, 172 dropped, 1 cut\n",
        "- dpo, adapters (method lora, rank 8) on a quantised base (bits 4), seed 3\n",
        "- 6,500 of 1,000,000 parameters trained\n",
        "- `optim.learning_rate: 5e-05`\n",
        "- `dpo.beta: 0.1`\n",
        "- the data are under: MIT\n",
        "- fairlead 0.1.0, torch 2.13.0\n",
    ):
        assert line in body, line
    assert "train.steps" not in body  # it was not given
    assert "/home/someone" not in body
    assert str(tmp_path) not in body


def test_figures_come_with_their_intervals_where_there_are_some(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    summary: dict[str, Any] = {"status": "interrupted", "metrics": {"eval/loss": {"mean": 0.61, "low": None, "n": 1}}}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "## Figures" not in card(tmp_path, run)[1]
    (run / "summary.json").write_text(json.dumps({**summary, "status": "finished"}))
    assert "| eval/loss | 0.61 |  |  |" in card(tmp_path, run)[1]
    metrics = {"win_rate": {"mean": 0.625, "low": 0.5, "high": 0.75, "n": 64}, "kl": {}}
    (run / "evaluation" / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    body = card(tmp_path, run)[1]
    assert "| win_rate | 0.625 | 0.5 to 0.75 | 64 |" in body
    assert "eval/loss" not in body
    assert "| kl" not in body


def test_the_card_of_a_merge_names_its_base_on_the_hub_and_the_differences(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    check: dict[str, Any] = {"quantity": "scores", "largest": 1.5e-5, "mean": 3e-6, "bound": 2e-2, "number": 10}
    check["against_original"] = {"largest": 0.5, "mean": 0.125, "number": 10}
    merged = {
        "adapters": [{"path": "/x"}],
        "base": {"path": "owner/base"},
        "dtype": "float16",
        "quantised": {"bits": 4, "type": "nf4"},
        "into": "quantised",
        "verification": check,
        "versions": {"peft": "0.21.2"},
    }
    matter, body = card(tmp_path, None, merged=merged)
    assert (matter["base_model"], matter["pipeline_tag"]) == ("owner/base", "text-classification")
    assert (
        "- 10 scores of the merged model and of its adapters: largest difference 1.5e-05, mean 3e-06, bound 0.02\n"
        in (body)
    )
    assert "- against the adapters on the original base: largest 0.5, mean 0.12\n" in body
    assert "the licence of owner/base applies" in body


def test_an_adapters_card_is_of_peft(tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": "owner/base", "task_type": "SEQ_CLS"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    matter, _ = card(tmp_path, None)
    assert matter == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["fairlead"],
        "base_model": "owner/base",
    }
