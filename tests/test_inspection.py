"""`fairlead inspect` from the command line: what it takes, what it says, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairlead.cli import main
from fairlead.data.prepare import prepare
from tests.tiny import base, tokenizer

PAIRS = [
    {"prompt": "Why does the lamp flicker?", "chosen": "The fuse is loose.", "rejected": "No.", "margin": 1},
    {"prompt": "Why does the lamp hum?", "chosen": "No idea.", "rejected": "The fuse is loose.", "margin": 3},
    {"prompt": "Why does the lamp smell?", "chosen": "Switch it off!", "rejected": ""},
]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, stdout and stderr of a command run in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fairlead", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, printed.out, printed.err

    return call


def inspected(command: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = command("inspect", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_recognised_and_another_kind_can_be_asked_for(command: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    found = inspected(command, file)
    assert (found["kind"], found["records"]) == ("preference", 2)
    assert found["counts"]["dropped"] == {"empty answer": 1}
    assert (found["length_bias"]["longer"]["hits"], found["length_bias"]["longer"]["number"]) == (1, 2)
    assert found["histograms"]["margin"] == [{"low": 1, "high": 1, "number": 1}, {"low": 3, "high": 3, "number": 1}]
    assert inspected(command, file, "--as", "prompt")["kind"] == "prompt"
    code, _, err = command("inspect", file, "--as", "pairs")
    assert code == 2 and "no kind of record 'pairs'" in err


def test_settings_are_those_of_training(command: Command, tmp_path: Path) -> None:
    rows = [{"q": "Why?", "good": "So it is.", "bad": "No"}, *[{"q": "Who?", "good": "I", "bad": "You"}] * 2]
    file = write(tmp_path / "pairs.jsonl", rows)
    columns = "data.columns={prompt: q, chosen: good, rejected: bad}"
    found = inspected(command, file, columns, "data.filter.dedupe=exact", "data.filter.max_response_length=8")
    assert found["counts"]["dropped"] == {"duplicate": 1, "response longer than 8 characters": 1}
    code, _, err = command("inspect", file, "data.filter.dedup=exact")
    assert code == 2 and "unknown key 'data.filter.dedup'" in err and "dedupe" in err


def test_a_tokenizer_gives_tokens_and_masks_and_the_page_shows_them(command: Command, tmp_path: Path) -> None:
    file, page = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "page" / "pairs.html"
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings = (f"tokenizer={tmp_path / 'tokenizer'}", "data.template=question-answer")
    code, out, err = command("inspect", file, *settings, "--html", page, "--rows", 1)
    assert code == 0, err
    assert "Lengths in tokens" in out and "Record 1 as the model sees it" in out and "Record 2" not in out
    assert "│  Question: Why does the lamp flicker?↵\n" in out and "The fuse is loose.<eos>\n" in out
    assert '<span class="special">&lt;eos&gt;</span>' in page.read_text("utf-8")


def test_a_recipe_is_inspected_with_its_own_data_model_and_kind(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "algorithm: sft\nmodel: {scratch: {vocab_size: 300}}\n"
        f"data: {{path: {tmp_path / 'pairs.jsonl'}, template: hh, eval_fraction: 0.5, max_length: 40}}\n"
    )
    found = inspected(command, recipe, "seed=1")
    assert (found["kind"], found["template"], found["limits"]["max_length"]) == ("sft", "hh", 40)
    assert found["tokenizer"] == "trained on these records"
    assert found["heldout"]["records"] + found["records"] == 3
    code, _, err = command("inspect", "hh-tiny")
    assert code == 2 and "hh-tiny is a pipeline" in err
    code, _, err = command("inspect", tmp_path / "nowhere.jsonl")
    assert code == 3 and "does not exist" in err


def test_a_prepared_folder_shows_its_files_and_the_richest_kind(command: Command, tmp_path: Path) -> None:
    turns = [f"\n\nHuman: Why does lamp {i} flicker?\n\nAssistant:" for i in range(40)]
    source = write(
        tmp_path / "hh.jsonl", [{"chosen": f"{turn} The fuse.", "rejected": f"{turn} No."} for turn in turns]
    )
    manifest = prepare("hh-rlhf", source, tmp_path / "prepared", say=lambda _: None)
    found = inspected(command, tmp_path / "prepared")
    assert found["kind"] == "preference"
    files = found["prepared"]["files"]
    assert found["prepared"]["counts"]["read"] == 40
    assert files == {name: output["rows"] for name, output in manifest["outputs"].items()}
    assert found["records"] == files["preference.jsonl"]
    assert found["heldout"]["records"] == files["heldout_preference.jsonl"] == 40 - found["records"]
    assert inspected(command, tmp_path / "prepared", "--as", "prompt")["records"] == files["prompts.jsonl"]


def test_scores_beside_the_pairs_are_shown_as_histograms(command: Command, tmp_path: Path) -> None:
    rows = [{**row, "chosen_score": 3, "rejected_score": score} for row, score in zip(PAIRS[:2], (-1, 0), strict=True)]
    found = inspected(command, write(tmp_path / "preference.jsonl", rows))["histograms"]
    assert found["chosen_score"] == [{"low": 3, "high": 3, "number": 2}]
    assert found["rejected_score"] == [{"low": -1, "high": -1, "number": 1}, {"low": 0, "high": 0, "number": 1}]


def test_data_that_never_end_are_refused_before_the_weights_are_read(command: Command, tmp_path: Path) -> None:
    """The model's folder has no weights at all: reading them would be another error."""
    model = tmp_path / "model"
    tokenizer().save_pretrained(model)
    base().model.config.save_pretrained(model)
    file = write(tmp_path / "sft.jsonl", [{"prompt": "Why?", "response": "The fuse is loose. " * 20}] * 3)
    where = (f"model.path={model}", f"data.path={file}", f"run.directory={tmp_path / 'runs'}")
    arguments = ("train", "sft", *where, "data.eval_fraction=0")
    code, _, err = command(*arguments, "data.max_length=32")
    assert code == 3 and "no response of 3 records ends: each is cut at data.max_length=32" in err
    code, _, err = command(*arguments, "data.max_length=256")
    assert code == 4 and "cannot be loaded as a causal language model" in err


# --- models --------------------------------------------------------------------------------------------------------


def test_llama_2_7b_is_drawn_from_its_configuration(command: Command) -> None:
    code, out, err = command("inspect", "llama-2-7b", "model.dtype=bfloat16")
    assert code == 0, err
    assert "layers.0-31 (LlamaDecoderLayer)" in out and "11008 x 4096" in out
    assert "(2 + 8) bytes x 7 billion parameters = 70 GB" in out
    assert "of all 6,738,415,616 parameters 67.4 GB; with gradients in 16 bits 80.9 GB" in out


def test_opt_1_3b_as_the_sources_train_it_counts_adapters_and_value_head(command: Command) -> None:
    settings = ("model.adapter.rank=8", "model.adapter.targets=attention", "model.adapter.last=2")
    found = inspected(command, "opt-1.3b", "algorithm=ppo", *settings)["model"]
    parts = {part["role"]: part for part in found["parts"]}
    assert parts["policy adapter"]["trainable"] == 2 * 4 * (8 * 2048 + 2048 * 8) == 262_144
    assert parts["value head"]["trainable"] == 2048 + 1
    assert (found["trainable"], found["parameters"]) == (264_193, 1_315_758_080 + 264_193)
    assert parts["base"]["weights"] == 4 * 1_315_758_080
    assert parts["policy adapter"]["states"]["exp_avg"] == 4 * 262_144
    _, out, _ = command("inspect", "opt-1.3b", "algorithm=ppo", *settings)
    assert "policy adapter 262,144, value head 2,049" in out
    assert "├─ 0-21 (OPTDecoderLayer)" in out and "└─ 22-23 (OPTDecoderLayer)" in out


def test_a_model_may_be_a_folder_its_config_or_a_run(command: Command, tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    base().model.config.save_pretrained(model)
    parameters = base().model.num_parameters()
    for target in (model, model / "config.json", tmp_path / "run"):
        assert inspected(command, target)["model"]["parameters"] == parameters
    code, _, err = command("inspect", "nobody/nothing")
    assert code in (3, 4) and "nobody/nothing" in err
    code, _, err = command("inspect", model, "--html", tmp_path / "page.html")
    assert code == 2 and "--html writes what is in data, and none are inspected" in err


def test_a_recipe_shows_its_memory_and_its_data_or_one_of_them(command: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    scratch = ("model.path=null", "model.adapter=null", "model.scratch={vocab_size: 300}")
    settings = (*scratch, f"data.path={file}", "data.template=hh", "data.max_length=64", "data.eval_fraction=0")
    found = inspected(command, "dpo", *settings)
    assert found["kind"] == "preference"
    parts = {part["role"]: part["parameters"] for part in found["model"]["parts"]}
    assert parts == {"policy": found["model"]["trainable"]}  # the reference is asked before the first step alone
    assert "kind" not in inspected(command, "dpo", *settings, "--model-only")
    assert inspected(command, "dpo", *settings, "--data-only")["model"] is None
    assert inspected(command, "dpo", "model.path=null", *settings[-4:])["model"] is None
    assert "kind" not in inspected(command, "dpo", *scratch, "data.path=null")
    fewer = inspected(command, "dpo", *settings, "train.micro_batch_tokens=1024", "--model-only")["model"]
    assert (found["model"]["step"]["tokens"], fewer["step"]["tokens"]) == (8192, 1024)
    code, _, err = command("inspect", "dpo", "--model-only", "--data-only")
    assert code == 2 and "nothing to inspect" in err
    code, _, err = command("inspect", "dpo", "model.path=null", "--model-only")
    assert code == 2 and "no model" in err


def test_a_run_says_at_its_start_what_it_trains_and_what_it_takes(command: Command, tmp_path: Path) -> None:
    file = write(tmp_path / "sft.jsonl", [{"prompt": "Why?", "response": "The fuse is loose."}] * 3)
    scratch = ("model.path=null", "model.adapter=null", "model.scratch={vocab_size: 300, hidden_size: 32}")
    data = (f"data.path={file}", "data.max_length=64", "data.eval_fraction=0")
    where = (*data, f"run.directory={tmp_path / 'runs'}", "train.steps=1")
    code, _, err = command("train", "sft", *scratch, *where)
    assert code == 0, err
    manifest = json.loads((tmp_path / "runs" / "sft" / "manifest.json").read_text())
    trained = manifest["parameters"]["trainable"]
    assert f"trained: {trained:,} of {trained:,} parameters (100.0000%): policy {trained:,}" in err
    assert "at the worst moment" in err and "will not fit" not in err
