"""The settings of rendering and packing, from the recipe to the saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.rows import ROWS, SCRATCH, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import fairlead
from fairlead.errors import ConfigError, DataError

TURNS = ["why is it dark?", "the lamp is off.", "why is it off?", "the fuse is loose."]
CHATS = [
    {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": f"{text} {number}"} for i, text in enumerate(TURNS)
        ]
    }
    for number in range(24)
]
CHATML = {"data.template": "chatml", "model.add_tokens": ["<|im_start|>", "<|im_end|>"]}


def run(algorithm: str, folder: Path, data: Any, **more: Any) -> Any:
    given = settings(algorithm, folder, **{"model.scratch": SCRATCH | {"context_length": 256}, **more})
    return fairlead.train({"algorithm": algorithm}, given, data=data)


def test_a_model_learns_every_turn_in_a_template_whose_tokens_it_is_given(tmp_path: Path) -> None:
    runs = {
        loss_on: run("sft", tmp_path / loss_on, CHATS, **CHATML, **{"data.loss_on": loss_on, "data.max_length": 256})
        for loss_on in ("response", "assistant", "all")
    }
    measured = {name: [json.loads(row) for row in _lines(result.path)] for name, result in runs.items()}
    losses = {name: rows[0]["eval/loss"] for name, rows in measured.items()}
    assert len(set(losses.values())) == 3
    folder = runs["assistant"].path / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [end, tokenizer.eos_token_id]
    # the next stage knows the template and its tokens
    dpo = fairlead.train(
        {"algorithm": "dpo"},
        settings(
            "dpo", tmp_path, **{"model.path": str(folder.parent), "data.template": "auto", "data.max_length": 256}
        ),
        data=ROWS["dpo"],
    )
    assert json.loads((dpo.path / "model" / "fairlead.json").read_text())["template"] == "chatml"


def _lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text("utf-8").splitlines()


def test_a_template_without_its_tokens_is_refused_before_the_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.template=chatml, but the tokenizer has no token <\|im_end\|>"):
        run("sft", tmp_path, CHATS, **{"data.template": "chatml"})


@pytest.mark.parametrize("packing", ["none", "best-fit", "wrapped"])
def test_plain_text_is_learned_in_every_packing(packing: str, tmp_path: Path) -> None:
    result = run("pretrain", tmp_path, ROWS["pretrain"], **{"data.packing": packing})
    assert result.summary["status"] == "finished"


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward", "ppo"])
def test_rows_cut_anywhere_are_for_plain_text_alone(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.packing=wrapped .* for plain text\nhint: data\.packing=best-fit"):
        run(algorithm, tmp_path, ROWS[algorithm], **{"data.packing": "wrapped"})
