"""`fairlead prove`: a few quick cases here, all of them when asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fairlead.cli import app
from fairlead.conformance.bias import ESTIMATORS, bias
from fairlead.conformance.cases import CASES
from fairlead.conformance.converge import converge
from fairlead.conformance.invariance import invariance
from fairlead.conformance.prove import chosen, names, one
from fairlead.errors import ConfigError, RunError


def test_a_run_that_stops_early_fails_its_case(tmp_path: Path) -> None:
    case = CASES["dpo-sigmoid"]
    row = converge(replace(case, settings={**case.settings, "train.steps": 10}), tmp_path)
    assert row["distance"] > 10 * row["bound"] and not row["pass"]


def test_a_batch_coupled_loss_has_one_gradient_however_it_is_laid_out(tmp_path: Path) -> None:
    row = invariance("kto", tmp_path)
    assert row["pass"], row


def test_k1_as_a_loss_is_shown_to_have_no_gradient(tmp_path: Path) -> None:
    row = bias("k1-plain", tmp_path, rounds=12)
    assert row["pass"], row
    assert row["low"] < -1 < row["high"]


def test_a_case_whose_run_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["bco"]
    monkeypatch.setitem(CASES, "bco", replace(case, settings={**case.settings, "bco.beta": -1.0}))
    with pytest.raises(RunError, match=r"^convergence/bco: bco\.beta"):
        one("convergence/bco", tmp_path)


def test_no_case_takes_more_than_3000_steps() -> None:
    assert max(case.settings["train.steps"] for case in CASES.values()) <= 3000


def test_a_case_that_there_is_not_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no case 'dpo-sigmoit'"):
        chosen(["dpo-sigmoit"])
    biases = [f"bias/{name}" for name in ESTIMATORS]
    assert chosen(["kto", "bias", "kto"]) == ["invariance/kto", *biases]


def test_the_verb_prints_the_table_and_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["prove", "--case", "convergence/bco", "--processes", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "1 of 1 pass" in done.output
    kept = json.loads((out / "conformance.json").read_text("utf-8"))
    assert kept["convergence"][0]["distance"] <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_case(name: str, tmp_path: Path) -> None:
    row = one(name, tmp_path)
    assert row["pass"], row
