"""What a person sees of a sweep: the plan, the table, the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_build import Page
from tests.sweep.conftest import Files

from fairlead.cli import main
from fairlead.sweep import sweep
from fairlead.sweep.show import write_page

Stub = Callable[..., None]
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`fairlead sweep` in this process: its stdout."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fairlead", "sweep", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        return printed.out

    return call


def test_a_dry_run_prints_the_plan_and_leaves_nothing(files: Files, tmp_path: Path, run: Run) -> None:
    recipe, space = files()
    assert run(recipe, space, "--dry-run").splitlines() == [
        f"{tmp_path}/sft-sweep: 4 trials of {recipe}",
        "  metric: eval/loss",
        "  goal: min",
        "  read: last",
        "  sampler: tpe",
        "  pruner: none",
        "  seed: 0",
        '  optim.learning_rate: {"loguniform": [1e-05, 0.1]}',
        '  optim.schedule: {"choice": ["cosine", "linear"]}',
    ]
    plan = json.loads(run(recipe, space, "--dry-run", "--json", "--out", tmp_path / "here"))
    assert (plan["folder"], plan["planned"], plan["max_failures"]) == (str(tmp_path / "here"), 4, 5)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows.jsonl", "sft.yaml", "space.yaml"]


def test_the_table_has_a_row_a_trial_and_names_the_best(files: Files, run: Run, stub: Stub) -> None:
    recipe, space = files()
    stub(fail=[1])
    given = (recipe, space, "optim.weight_decay=0.1", "--jobs", "2")
    table = run(*given)
    result = json.loads(run(*given, "--json"))
    best = result["best"]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line[0] == "│"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert rows[1][1:3] == ["failed", ""] and rows[1][-1].startswith("<b>step 3</b>: no hint:")
    assert [row[1] for row in rows].index("best") == best["number"]
    assert rows[best["number"]][2] == f"{best['value']:.4g}"
    rate, schedule = best["parameters"].values()
    assert table.rstrip().endswith(f"{best['run']}: optim.learning_rate={rate} optim.schedule={schedule}")


def test_the_page_shows_every_trial_the_best_and_a_chart_of_each_key(files: Files, stub: Stub) -> None:
    stub(fail=[1], alarm=[2])
    result = sweep(*files(), say=lambda _: None)
    page = Page(Path(result["folder"]) / "report.html")
    assert page.html.count("<tr>") == 4 + 1 + 4  # of the table, its head, and of what is said of the best
    assert [page.text.count(text) for text in ("alarm: length", "<b>step 3</b>: no")] == [1, 1]
    assert page.html.count('<b title="the best">') == 1
    assert page.tags.count("svg") == 3
    assert (
        "fairlead train" in page.text
        and f"optim.schedule={result['best']['parameters']['optim.schedule']}" in page.text
    )
    assert [value for name, value in page.attributes if name in ("src", "href") and str(value)[0] != "#"] == []
    assert "3 of 4 finished 1 of 4 failed" in page.text


def hostile(value: Any) -> Any:
    """Every text of a result, keys of the space included, becomes markup."""
    if isinstance(value, dict):
        known = {"parameters", "space"}
        return {name: keys(each) if name in known else hostile(each) for name, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return f"<script>{value}</script>" if isinstance(value, str) and value not in ("finished", "min") else value


def keys(value: dict[str, Any]) -> dict[str, Any]:
    return {
        f"<script>{name}</script>": each if isinstance(each, dict) else hostile(each) for name, each in value.items()
    }


def test_no_text_is_read_as_markup(files: Files, tmp_path: Path, stub: Stub) -> None:
    stub(fail=[1], alarm=[2])
    result = sweep(*files(space={"optim.learning_rate": {"choice": [1e-3, 1e-2]}}), say=lambda _: None)
    page = Page(write_page(tmp_path, hostile(result)))
    assert "script" not in page.tags
    texts = ("eval/loss", "optim.learning_rate", "alarm: length", "trials/000", "tpe", result["recipe"])
    assert [text for text in texts if f"<script>{text}</script>" not in page.text] == []


def test_a_sweep_without_a_finished_trial_has_a_page_too(files: Files, run: Run, stub: Stub) -> None:
    stub(fail=[0, 1])
    recipe, space = files(trials=2)
    assert run(recipe, space).rstrip().endswith("sft-sweep: no trial has finished")
    assert "No trial has finished." in Page(space.parent / "sft-sweep" / "report.html").text
