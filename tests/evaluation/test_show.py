"""Evaluations as they are printed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tests.evaluation.conftest import PAIRS, Runs

from fairlead.cli import main
from fairlead.evaluation.show import print_evaluation


def lines(text: str) -> list[list[str]]:
    """The cells of every row of tables."""
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines() if line[0] in "│┃"]


def estimate(mean: float, n: int = 1200) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": n}


def test_what_a_reward_model_alone_has_stands_in_a_table_of_its_own(capsys: pytest.CaptureFixture[str]):
    policy = {"kl": estimate(2.0), "perplexity": {"mean": 9.0, "low": None, "high": None, "n": 1}}
    reward = {"accuracy": estimate(0.7), "reward/ece": estimate(0.2), "reward/margin": estimate(1.5, 8)}
    print_evaluation({"sft": policy, "[b]rm[/b]": reward})
    assert lines(capsys.readouterr().out) == [
        ["", "kl", "perplexity", "accuracy"],
        ["sft", "2 [1.9, 2.1]", "9", ""],
        ["[b]rm[/b]", "", "", "0.7 [0.6, 0.8]"],
        ["[b]rm[/b]", "mean [95 %]", "n"],
        ["reward/ece", "0.2 [0.1, 0.3]", "1,200"],
        ["reward/margin", "1.5 [1.4, 1.6]", "8"],
    ]


def test_the_command_takes_several_files_of_pairs_and_prints_the_table(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    files: list[str] = []
    for name, rows in (("a.jsonl", PAIRS[:5]), ("b.jsonl", PAIRS[5:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        files += ["--pairs", str(tmp_path / name)]
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["fairlead", "evaluate", str(runs.reward), *files])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    heads, row, own, *others = lines(printed.out)
    assert (heads[1:], row[0], own) == (["accuracy", "length_accuracy"], "reward", ["reward", "mean [95 %]", "n"])
    metrics = json.loads((runs.reward / "evaluation" / "metrics.json").read_text("utf-8"))["metrics"]
    assert [name for name, _, _ in others] == [name for name in metrics if name.startswith("reward/")]
    assert {name: n for name, _, n in others}["reward/ece"] == "12"
