"""`fairlead score`: what stands in the rows it writes, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.end_to_end.rows import DEMONSTRATIONS, PAIRS, ROWS, SCRATCH, settings, write

from fairlead.cli import main
from fairlead.evaluation import score as score_room
from fairlead.runner import train


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    stdout: str
    stderr: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


Command = Callable[..., Done]


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`fairlead score` in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["fairlead", "score", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Done(int(end.value.code or 0), printed.out, printed.err)

    return call


class Runs(NamedTuple):
    policy: Path
    reward: Path
    adapter: Path
    """A reward, trained as an adapter of the policy."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")

    def made(algorithm: str, name: str, **more: Any) -> Path:
        given = settings(algorithm, folder, **{"run.name": name, "train.num_samples": 0, **more})
        return train({"algorithm": algorithm}, given, data=ROWS[algorithm]).path

    policy = made("sft", "policy", **{"model.scratch": SCRATCH})
    return Runs(
        policy,
        made("reward", "reward", **{"model.path": str(policy)}),
        made("reward", "adapter", **{"model.path": str(policy), "model.adapter": {"rank": 4}}),
    )


def by_transformers(run: Path, prompt: str, response: str) -> float:
    """The score that transformers alone gives, from what the run saved."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(run / "model", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = [*tokenizer(f"Question: {prompt}\n\nAnswer: {response}").input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        return float(model(torch.tensor([ids[-SCRATCH["context_length"] :]])).logits[0, 0])


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reward", "adapter"])
def test_a_demonstration_gets_the_score_that_transformers_gives(
    kind: str, runs: Runs, tmp_path: Path, score: Command
) -> None:
    run = getattr(runs, kind)
    data = write(tmp_path / "rows.jsonl", [{**row, "id": i} for i, row in enumerate(DEMONSTRATIONS)])
    done = score(run, data, "--out", tmp_path / "out.jsonl")
    assert done.code == 0, done.stderr
    rows = written(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(len(DEMONSTRATIONS)))
    assert [set(row) for row in rows] == [{"prompt", "response", "id", "score"}] * len(rows)
    for row in (rows[0], rows[-1]):
        assert row["score"] == pytest.approx(by_transformers(run, row["prompt"], row["response"]), abs=1e-5)
    assert len({row["score"] for row in rows}) > 3
    assert "32 rows read as prompt-response, 32 kept; dropped: none; 32 scores from" in done.stdout


def test_both_sides_of_a_pair_are_scored_and_a_folder_serves_as_its_run(
    runs: Runs, tmp_path: Path, score: Command
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS[:5])
    done = score(runs.reward / "model", data)
    assert done.code == 0, done.stderr
    assert [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in done.rows] == PAIRS[:5]
    for row in done.rows[:2]:
        for side in ("chosen", "rejected"):
            wanted = by_transformers(runs.reward, row["prompt"], row[side])
            assert row[f"{side}_score"] == pytest.approx(wanted, abs=1e-5)
    assert "5 rows read as preference, 5 kept; dropped: none; 10 scores" in done.stderr


def test_the_scores_of_a_ranking_stand_in_the_order_of_its_answers(runs: Runs, tmp_path: Path, score: Command) -> None:
    answers = ["buy a lamp", "the fuse is loose", " ", "it is so"]
    row = {"prompt": "why?", "responses": answers, "scores": [1, 3, 0, 2]}
    (found,) = score(runs.reward, write(tmp_path / "rows.jsonl", [row])).rows
    assert found["responses"] == answers
    assert found["given_scores"] == row["scores"]
    assert found["scores"][2] is None
    for i in (0, 1, 3):
        assert found["scores"][i] == pytest.approx(by_transformers(runs.reward, "why?", answers[i]), abs=1e-5)


def test_rows_of_every_kind_may_stand_in_one_file_and_dropped_ones_are_counted_by_reason(
    runs: Runs, tmp_path: Path, score: Command
) -> None:
    rows = [
        DEMONSTRATIONS[0],
        {"prompt": "why?", "response": ""},
        {"prompt": "why?", "completion": "so", "label": True},
        PAIRS[0],
        {"prompt": "why?", "response": None},
        {"prompt": "why?", "response": " "},
    ]
    done = score(runs.reward, write(tmp_path / "rows.jsonl", rows), "--json", "--out", tmp_path / "out.jsonl")
    found = json.loads(done.stdout)
    assert (found["read"], found["kept"]) == (6, 3)
    assert found["dropped"] == {"empty response": 2, "response is null": 1}
    assert found["formats"] == {"prompt-response": 3, "kto": 1, "preference": 1}
    kept = written(tmp_path / "out.jsonl")
    assert [set(row) & {"score", "chosen_score"} for row in kept] == [{"score"}, {"score"}, {"chosen_score"}]
    scores = [row[name] for row in kept for name in ("score", "chosen_score", "rejected_score") if name in row]
    assert found["scores"] == {
        "mean": pytest.approx(sum(scores) / 4),
        "lowest": min(scores),
        "highest": max(scores),
        "n": 4,
    }


def test_a_score_of_the_datas_own_is_kept_under_another_name(runs: Runs, tmp_path: Path, score: Command) -> None:
    rows = [{**DEMONSTRATIONS[0], "score": 7, "x": 1}, {**DEMONSTRATIONS[1], "score": None}]
    first = tmp_path / "first.jsonl"
    done = score(runs.reward, write(tmp_path / "rows.jsonl", rows), "--out", first)
    assert "noted 1: score of the data kept as given_score" in done.stdout
    once = written(first)
    assert (once[0]["given_score"], once[0]["x"]) == (7, 1) and "given_score" not in once[1]
    done = score(runs.adapter, first, "--out", tmp_path / "second.jsonl")
    assert "noted 1: score of an earlier scoring replaced" in done.stdout
    again = written(tmp_path / "second.jsonl")
    assert again[0]["given_score"] == 7 and again[1]["given_score"] == once[1]["score"]
    assert again[0]["score"] != once[0]["score"]


def test_a_row_longer_than_the_model_is_scored_by_its_end_and_counted(
    runs: Runs, tmp_path: Path, score: Command
) -> None:
    rows = [{"prompt": "why " * 90, "response": "so"}, DEMONSTRATIONS[0]]
    done = score(runs.reward, write(tmp_path / "rows.jsonl", rows), "--json")
    found = json.loads(done.stdout)
    assert found["notes"] == {"answers read without their beginning, beyond 64 tokens": 1}
    wanted = by_transformers(runs.reward, rows[0]["prompt"], rows[0]["response"])
    assert found["rows"][0]["score"] == pytest.approx(wanted, abs=1e-5)


def test_the_order_of_many_rows_is_kept_over_chunks(
    runs: Runs, tmp_path: Path, score: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", DEMONSTRATIONS)
    whole = score(runs.reward, data).rows
    monkeypatch.setattr(score_room, "CHUNK", 5)
    parts = score(runs.reward, data).rows
    assert [row["response"] for row in parts] == [row["response"] for row in DEMONSTRATIONS]
    assert [row["score"] for row in parts] == pytest.approx([row["score"] for row in whole], abs=1e-6)


def test_columns_may_be_named_and_rows_limited(runs: Runs, tmp_path: Path, score: Command) -> None:
    rows = [{"ask": row["prompt"], "told": row["response"]} for row in DEMONSTRATIONS]
    data = write(tmp_path / "rows.jsonl", rows)
    done = score(runs.reward, data, "data.columns={prompt: ask, response: told}", "data.limit=3")
    assert [set(row) for row in done.rows] == [{"ask", "told", "score"}] * 3
    done = score(runs.reward, data)
    assert done.code == 3 and "no known format has these fields: ask, told" in done.stderr
    done = score(runs.reward, data, "data.colums={prompt: ask}")
    assert done.code == 2 and "did you mean 'data.columns'?" in done.stderr


# --- what is kept --------------------------------------------------------------------------------------------------


def test_the_best_share_is_kept_in_the_order_of_the_file(runs: Runs, tmp_path: Path, score: Command) -> None:
    rows = [{**row, "id": i} for i, row in enumerate(DEMONSTRATIONS)]
    data = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "why?", "response": " "}])
    everything = {row["id"]: row["score"] for row in score(runs.reward, data).rows}
    best = sorted(sorted(everything, key=lambda i: -everything[i])[:5])
    # 4.8 of 32 rows that could be scored: five.
    done = score(runs.reward, data, "--top-share", 0.15)
    assert [row["id"] for row in done.rows] == best
    assert "33 rows read as prompt-response, 5 kept; dropped: 1 empty response; 27 not of the best 0.15;" in done.stderr


def test_of_equal_scores_the_earlier_rows_are_kept(runs: Runs, tmp_path: Path, score: Command) -> None:
    data = write(tmp_path / "rows.jsonl", [{**DEMONSTRATIONS[0], "id": i} for i in range(8)])
    assert [row["id"] for row in score(runs.reward, data, "--top-share", 0.5).rows] == [0, 1, 2, 3]


def test_rows_below_a_score_are_dropped_and_both_filters_hold_together(
    runs: Runs, tmp_path: Path, score: Command
) -> None:
    data = write(tmp_path / "rows.jsonl", [{**row, "id": i} for i, row in enumerate(DEMONSTRATIONS)])
    everything = {row["id"]: row["score"] for row in score(runs.reward, data).rows}
    least = sorted(everything.values())[20]
    good = [i for i, value in everything.items() if value >= least]
    done = score(runs.reward, data, "--min-score", least)
    assert [row["id"] for row in done.rows] == good and len(good) >= 12
    done = score(runs.reward, data, "--min-score", least, "--top-share", 0.9, "--json")
    found = json.loads(done.stdout)
    assert [row["id"] for row in found["rows"]] == good
    assert found["read"] == found["kept"] + sum(found["dropped"].values()) == 32
    assert found["dropped"]["not of the best 0.9"] == 3


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(done: Done, code: int, *words: str) -> None:
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.code == code, done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.jsonl"], 3, ["nowhere.jsonl does not exist", "hint: "]),
        (["prompts.jsonl"], 3, ["prompts.jsonl:1: the row has prompt, topic", "holds no answer", "hint: "]),
        (["blank.jsonl"], 3, ["no row of blank.jsonl is left: 1 read, dropped {'empty response': 1}", "hint: "]),
        (["good.jsonl", "--min-score", "1e6"], 3, ["no row of good.jsonl is left", "hint: the scores lie between"]),
        (
            ["pairs.jsonl", "--min-score", "0"],
            2,
            ["min-score needs rows with one score", "pairs.jsonl:1 holds 2"],
        ),
        (["pairs.jsonl", "--top-share", "0.5"], 2, ["top-share needs rows with one score each", "hint: "]),
        (["good.jsonl", "--top-share", "0"], 2, ["top-share must be above 0 and at most 1, got 0"]),
        (["good.jsonl", "--top-share", "1.5"], 2, ["top-share must be above 0 and at most 1, got 1.5"]),
        (["good.jsonl", "--min-score", "nan"], 2, ["min-score must be a number, got nan"]),
        (["good.jsonl", "--out", "out.parquet"], 2, ["out.parquet is not the name of a file of JSON Lines", "hint: "]),
        (["good.jsonl", "--out", "folder.jsonl"], 2, ["folder.jsonl is a folder", "hint: "]),
        (["good.jsonl", "train.steps=3"], 2, ["train.steps is no setting of score", "hint: "]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_explained_and_leaves_no_file(
    arguments: list[str],
    code: int,
    words: list[str],
    runs: Runs,
    tmp_path: Path,
    score: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "good.jsonl", DEMONSTRATIONS)
    write(tmp_path / "pairs.jsonl", PAIRS)
    write(tmp_path / "prompts.jsonl", ROWS["ppo"])
    write(tmp_path / "blank.jsonl", [{"prompt": "why?", "response": " "}])
    (tmp_path / "folder.jsonl").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", "out.jsonl"]
    refused(score(runs.reward, *arguments, *out), code, *words)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_reward_run_is_refused(runs: Runs, tmp_path: Path, score: Command) -> None:
    data = write(tmp_path / "rows.jsonl", DEMONSTRATIONS)
    refused(score(runs.policy, data), 4, "was trained as a policy and has no reward head", "hint: give a reward run")
    refused(score(tmp_path / "nowhere", data), 4, "nowhere does not exist")
    refused(score(tmp_path, data), 4, "holds no model")
    shutil.copytree(runs.policy / "model", tmp_path / "plain")
    (tmp_path / "plain" / "fairlead.json").unlink()
    refused(score(tmp_path / "plain", data), 4, "lacks its head", "hint: give the run of a reward stage")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(runs.reward / "recipe.yaml", unfinished)
    refused(score(unfinished, data), 7, "has not finished", f"hint: continue it with `fairlead resume {unfinished}`")


def test_a_bad_row_behind_good_ones_leaves_the_file_that_was_there(
    runs: Runs, tmp_path: Path, score: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_room, "CHUNK", 4)
    data = write(tmp_path / "rows.jsonl", [*DEMONSTRATIONS[:9], {"prompt": "why?", "response": 3}])
    out = tmp_path / "out.jsonl"
    out.write_text("what was there\n")
    refused(score(runs.reward, data, "--out", out), 3, "rows.jsonl:10: response must be text, got int 3")
    assert out.read_text() == "what was there\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]
