"""`fairlead merge` on what `fairlead train` leaves: the merged model loads in plain transformers and answers alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.rows import ROWS, SCRATCH, settings, write

from fairlead.cli import main
from fairlead.runner import train

TEXT = "why does the pump stop after 4 hours?"


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["fairlead", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def trained(folder: Path, algorithm: str, name: str, **more: Any) -> Path:
    data = write(folder / f"{algorithm}.jsonl", ROWS[algorithm])
    given = settings(algorithm, folder / "runs", **{"data.path": str(data), "run.name": name, **more})
    return train({"algorithm": algorithm}, given).path


@pytest.mark.parametrize("algorithm", ["sft", "reward"])
def test_a_trained_adapter_is_merged_checked_and_described(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    start = trained(tmp_path, "pretrain", "base", **{"model.scratch": SCRATCH})
    lora = {"rank": 4, "alpha": 64.0}
    run = trained(tmp_path, algorithm, "run", **{"model.path": str(start), "model.adapter": lora})
    capsys.readouterr()
    assert called(monkeypatch, "merge", run, "--out", tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "merge.json").read_text())
    assert printed["verification"]["largest"] <= printed["verification"]["bound"] == 1e-4
    assert called(monkeypatch, "merge", run, "--out", tmp_path / "out") == 0  # nothing to do
    assert "the bound is 0.0001" in capsys.readouterr().out
    assert called(monkeypatch, "merge", run, "--out", tmp_path / "out", "--dtype", "bfloat16") == 7

    kind: Any = AutoModelForCausalLM if algorithm == "sft" else AutoModelForSequenceClassification
    options: dict[str, Any] = {} if algorithm == "sft" else {"num_labels": 1, "pad_token_id": 0}
    merged = kind.from_pretrained(tmp_path / "out")
    adapted = PeftModel.from_pretrained(kind.from_pretrained(start / "model", **options), run / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"Trained by {algorithm} from base." in text
    assert "adapters (method lora, rank 4" in text
    assert f"Trained by {algorithm} from base." in (run / "model" / "README.md").read_text("utf-8")
    assert str(tmp_path) not in text
