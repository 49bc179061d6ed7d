"""`fairlead.train` with paths and with loaded objects, for each algorithm; what it leaves behind."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
from tests.end_to_end.rows import ONLINE, PAIRS, ROWS, SCRATCH, brevity, settings, write
from tests.tiny import base, tokenizer

import fairlead
from fairlead.algorithms import REGISTRY
from fairlead.errors import ConfigError, DataError, RunError
from fairlead.models.load import load_causal


@pytest.mark.parametrize("algorithm", sorted(REGISTRY))
@pytest.mark.parametrize("lora", [False, True])
def test_each_algorithm_trains_from_loaded_objects(algorithm: str, lora: bool, tmp_path: Path) -> None:
    rows = ROWS[algorithm]
    model = base("llama", hidden_size=16, num_layers=1, num_heads=2, context_length=64).model
    before = copy.deepcopy(model.state_dict())
    more = {"model.adapter": {"rank": 2}} if lora else {}
    result = fairlead.train(
        {"algorithm": algorithm},
        settings(algorithm, tmp_path, **more),
        model=model,
        tokenizer=tokenizer(),
        data=datasets.Dataset.from_list(rows) if lora else rows,
        reward=brevity if algorithm in ONLINE else None,
    )
    assert result.summary["status"] == "finished"
    assert result.summary["steps"] == 4
    assert {"checkpoints", "manifest.json", "metrics.jsonl", "model", "recipe.yaml", "summary.json"} <= {
        path.name for path in tmp_path.joinpath(algorithm).iterdir()
    }
    after = model.state_dict()
    base_weights = [name for name in before if name in after]
    changed = [name for name in base_weights if not torch.equal(before[name], after[name])]
    assert bool(changed) is not lora
    metrics = [json.loads(line) for line in (tmp_path / algorithm / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    held_out = "eval/score" if algorithm in ONLINE else "eval/loss"
    assert all(held_out in metrics[step] for step in (0, 4))
    assert all("grad_norm" in row for row in metrics[1:])


def test_the_chain_runs_from_paths_and_each_stage_reads_the_one_before(tmp_path: Path) -> None:
    paths = {name: str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in ROWS.items()}

    def run(algorithm: str, **more):
        return fairlead.train({"algorithm": algorithm}, settings(algorithm, tmp_path, **more), data=paths[algorithm])

    pretrain = run("pretrain", **{"model.scratch": SCRATCH})
    sft = run("sft", **{"model.path": str(pretrain.path)})
    reward = run("reward", **{"model.path": str(sft.path), "data.template": "auto"})
    ppo = run("ppo", **{"model.path": str(sft.path), "data.template": "auto", "ppo.reward": str(reward.path)})
    dpo = run("dpo", **{"model.path": str(sft.path), "data.template": "auto", "data.packing": "none"})
    for result in (reward, ppo, dpo):
        assert json.loads((result.path / "model" / "fairlead.json").read_text())["template"] == "question-answer"
        manifest = json.loads((result.path / "manifest.json").read_text())
        assert manifest["inputs"]["model.path"]["path"] == str(sft.path)
    assert "reward" in json.loads((ppo.path / "manifest.json").read_text())["inputs"]
    assert (ppo.path / "rounds" / "000" / "round.safetensors").is_file()
    assert not list((ppo.path / "rounds").glob("*/chunk-*"))
    assert load_causal(str(dpo.path / "model"), torch.float32).num_parameters() == sft.model.num_parameters()


def test_the_manifest_counts_what_was_read_kept_cut_and_dropped(tmp_path: Path) -> None:
    rows = [
        *PAIRS[:12],
        {**PAIRS[0], "rejected": PAIRS[0]["chosen"]},
        {**PAIRS[1], "chosen": " "},
        {**PAIRS[2], "prompt": "why " * 60},
        {**PAIRS[3], "chosen": "because " * 60},
    ]
    result = fairlead.train(
        {"algorithm": "reward"},
        settings("reward", tmp_path, **{"model.scratch": SCRATCH, "data.eval_fraction": 0}),
        data=rows,
    )
    counts = json.loads((result.path / "manifest.json").read_text())["data"]["train"]
    assert counts == {
        "read": 16,
        "kept": 13,
        "cut": 1,
        "dropped": {"chosen equal to rejected": 1, "empty answer": 1, "prompt longer than 47 tokens": 1},
    }


def test_lora_checkpoints_hold_the_adapter_alone_and_the_base_serves_as_reference(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = fairlead.train(
        {"algorithm": "dpo"},
        settings("dpo", tmp_path, **{"model.adapter": {"rank": 2}}),
        model=base("llama", hidden_size=16, num_layers=1, num_heads=2, context_length=64).model,
        tokenizer=tokenizer(),
        data=PAIRS,
    )
    saved = load_file(result.path / "checkpoints" / "step-000004" / "model.safetensors")
    assert saved and all(".lora_" in name and ".policy." in name for name in saved)
    assert (result.path / "model" / "adapter_model.safetensors").is_file()


def test_a_finished_run_is_not_overwritten_and_another_recipe_is_refused(tmp_path: Path) -> None:
    given = settings("sft", tmp_path, **{"model.scratch": SCRATCH})
    fairlead.train({"algorithm": "sft"}, given, data=ROWS["sft"])
    with pytest.raises(RunError, match="finished run of this recipe"):
        fairlead.train({"algorithm": "sft"}, given, data=ROWS["sft"])
    with pytest.raises(RunError, match="another recipe"):
        fairlead.train({"algorithm": "sft"}, {**given, "seed": 1}, data=ROWS["sft"])


def test_mistakes_are_named_before_a_model_is_built(tmp_path: Path) -> None:
    given = settings("sft", tmp_path, **{"model.scratch": SCRATCH})
    with pytest.raises(DataError, match=r"row 1: the row has .* read as text .*gives no demonstrations"):
        fairlead.train({"algorithm": "sft"}, given, data=[ROWS["sft"][0], {"text": "x"}])
    with pytest.raises(ConfigError, match="no data"):
        fairlead.train({"algorithm": "sft"}, {**given, "run.name": "b"})
    with pytest.raises(ConfigError, match="held-out prompts are also in the training data"):
        fairlead.train({"algorithm": "sft"}, {**given, "run.name": "c"}, data=ROWS["sft"], eval_data=ROWS["sft"][:2])


def test_a_prompt_that_leaves_no_room_for_a_response_is_refused_with_figures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record is left to learn from at max_length=4"):
        fairlead.train(
            {"algorithm": "sft"},
            settings("sft", tmp_path, **{"model.scratch": SCRATCH, "data.max_length": 4}),
            data=ROWS["sft"],
        )


def test_an_algorithm_of_ones_own_needs_no_fork(tmp_path: Path) -> None:
    result = fairlead.train(
        {"algorithm": "fairlead.algorithms.sft:ALGORITHM"},
        settings("mine", tmp_path, **{"model.scratch": SCRATCH}),
        data=ROWS["sft"],
    )
    assert result.summary["algorithm"] == "sft"


def test_a_data_set_folder_of_prepare_is_read_by_stage_and_its_held_out_part_evaluates(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    folder.mkdir()
    write(folder / "sft.jsonl", ROWS["sft"][:-4])
    write(folder / "heldout_sft.jsonl", ROWS["sft"][-4:])
    result = fairlead.train(
        {"algorithm": "sft"},
        settings("sft", tmp_path, **{"model.scratch": SCRATCH, "data.eval_fraction": 0}),
        data=folder,
    )
    data = json.loads((result.path / "manifest.json").read_text())["data"]
    assert (data["train"]["kept"], data["eval"]["kept"]) == (len(ROWS["sft"]) - 4, 4)
