"""What is read from run directories, and what becomes of files that are missing, torn or elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.run_directories import responses, write_run

from fairlead.errors import RunError
from fairlead.report.read import compare, finite, read_run, read_runs


def test_a_prompts_change_is_the_difference_of_two_means_over_draws(tmp_path: Path):
    # By hand: p (0.4 + 0.8)/2 - (0.1 + 0.3)/2 = 0.4, q 0.2 - (0.6 + 0.2)/2 = -0.2, r 0.5 - 0.5 = 0.
    before = write_run(tmp_path / "sft", evaluation_responses=responses({"p": [0.1, 0.3], "q": [0.6, 0.2], "r": [0.5]}))
    after = write_run(
        tmp_path / "ppo", evaluation_responses=responses({"q": [0.2], "r": [0.5], "p": [0.4, 0.8], "s": [9.0]})
    )
    comparison = compare(read_run(before), read_run(after))
    assert [c.prompt for c in comparison.changes] == ["p", "r", "q"]
    assert [c.change for c in comparison.changes] == pytest.approx([0.4, 0.0, -0.2])
    assert comparison.changes[0].scores["gold"] == pytest.approx((0.2, 0.6))
    assert comparison.changes[0].draws == (2, 2)
    assert comparison.num_unmatched == 1
    # Mean 0.2/3; the deviations 1/3, -1/15, -4/15 have the squares 25, 1 and 16 of 225: their sum 42/225, halved,
    # gives the variance 21/225, and 1.96 sqrt(21/225/3) = 0.345706.
    mean = comparison.mean
    assert mean is not None
    assert mean.mean == pytest.approx(0.0666667, abs=1e-6)
    assert (mean.low, mean.high) == pytest.approx((0.0666667 - 0.345706, 0.0666667 + 0.345706), abs=1e-5)


def test_the_response_shown_is_the_draw_closest_to_the_mean(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", evaluation_responses=responses({"p": [0.0, 0.5, 1.0]})))
    assert compare(run, run).changes[0].before["response"] == "a response 1"


def test_draws_without_a_score_do_not_enter_a_mean(tmp_path: Path):
    rows = responses({"p": [1.0, 3.0], "q": [1.0]})
    rows[1]["scores"]["gold"] = None
    rows[2]["scores"] = None
    run = read_run(write_run(tmp_path / "a", evaluation_responses=rows))
    comparison = compare(run, run)
    assert [(c.prompt, c.scores["gold"]) for c in comparison.changes] == [("p", (1.0, 1.0))]
    assert comparison.num_unmatched == 1


def test_lines_of_one_step_become_one_row_and_the_later_value_counts(tmp_path: Path):
    rows = [{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4.0}, {"step": 2, "eval/loss": 5.0}, {"step": 2, "loss": 2.0}]
    run = read_run(write_run(tmp_path / "a", metrics=rows))
    assert run.metrics == [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0, "eval/loss": 5.0}]


def test_missing_and_torn_files_are_told_apart(tmp_path: Path):
    folder = write_run(tmp_path / "a", metrics=[{"step": 1, "loss": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (folder / "summary.json").write_text("[]")
    run = read_run(folder)
    assert set(run.missing) == {
        "samples.jsonl",
        "alarms.jsonl",
        "evaluation/metrics.json",
        "evaluation/responses.jsonl",
    }
    assert run.damage == ("summary.json is not readable", "metrics.jsonl: lines that are not readable: 1")
    assert run.metrics == [{"step": 1, "loss": 1.0}]


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    (folder / "summary.json").write_text('{"status": "fin')
    (folder / "recipe.yaml").write_text("optim: [")
    (folder / "samples.jsonl").mkdir()
    damage = read_run(folder).damage
    assert damage[:2] == ("recipe.yaml is not readable", "summary.json is not readable")
    assert damage[2].startswith("samples.jsonl cannot be read (")


def test_a_line_may_hold_unicode_line_separators(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    (folder / "samples.jsonl").write_text('{"step": 1, "response": "a\u0085b\u2028c"}\n', encoding="utf-8")
    run = read_run(folder)
    assert run.samples == [{"step": 1, "response": "a\u0085b\u2028c"}]
    assert run.damage == ()


def test_a_pipeline_expands_to_its_runs_in_order_of_creation(pipeline: Path):
    assert [run.name for run in read_runs([pipeline])] == ["sft", "reward", "dpo", "raft", "ppo"]


def test_a_run_without_a_date_comes_last(tmp_path: Path):
    write_run(tmp_path / "a", manifest={})
    write_run(tmp_path / "b", manifest={"created": "2026-11-21T04:00:00+00:00"})
    (tmp_path / "summary.json").write_text('{"models": {}}')
    assert [run.name for run in read_runs([tmp_path])] == ["b", "a"]


def test_a_byte_order_mark_is_no_damage(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    (folder / "manifest.json").write_text('{"seed": 3}', encoding="utf-8-sig")
    assert (read_run(folder).manifest, read_run(folder).damage) == ({"seed": 3}, ())


def test_a_run_given_twice_is_read_once(pipeline: Path):
    assert [run.name for run in read_runs([pipeline / "ppo", pipeline])] == ["ppo", "sft", "reward", "dpo", "raft"]


def test_runs_of_one_name_get_their_folders_name_too(tmp_path: Path):
    paths = [write_run(tmp_path / seed / "ppo") for seed in ("seed-0", "seed-1")]
    assert [run.name for run in read_runs(paths)] == ["seed-0/ppo", "seed-1/ppo"]


def test_what_is_no_run_is_an_error_that_says_what_to_give(tmp_path: Path):
    with pytest.raises(RunError, match="no such run directory"):
        read_runs([tmp_path / "nowhere"])
    write_run(tmp_path / "runs" / "dpo")
    with pytest.raises(RunError, match="not a run directory") as error:
        read_runs([tmp_path / "runs"])
    assert error.value.hint == "it holds runs; give them one by one: dpo"
    with pytest.raises(RunError, match="no run directory was given"):
        read_runs([])


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), 10**400, [1]])
def test_what_is_no_finite_number_is_none(value: object):
    assert finite(value) is None
