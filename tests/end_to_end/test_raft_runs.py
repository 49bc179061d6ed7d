"""Whole runs of RAFT and its relatives: what each round measures, how a run ends, what samples, and the '#' exploit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.end_to_end.rows import DEMONSTRATIONS, PROMPTS, SCRATCH, TOPICS, settings, write

import fairlead
from fairlead.runner import RunResult, resolve

PLAIN = {"model.scratch": SCRATCH, "data.eval_fraction": 0.0, "train.num_samples": 0}


def _train(
    algorithm: str, folder: Path, reward: str, rows: list[dict[str, Any]] = PROMPTS, /, **more: Any
) -> RunResult:
    folder.mkdir(exist_ok=True)
    data = write(folder / f"{algorithm}.jsonl", rows)
    given = settings(algorithm, folder, **PLAIN | more)
    return fairlead.train({"algorithm": algorithm}, given, data=data, reward=f"tests.end_to_end.hooks:{reward}")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def _values(result: RunResult, name: str) -> list[float]:
    return [row[name] for row in _rows(result.path / "metrics.jsonl") if name in row]


# --- one round, and what samples -----------------------------------------------------------------------------------


def test_one_round_of_all_prompts_is_sft_on_what_was_selected(tmp_path: Path) -> None:
    """The shipped recipe is that round; and the round leaves the weights of SFT on its file of selected responses."""
    recipe = resolve("rejection-sampling").recipe
    assert (recipe.algorithm, recipe.settings.rollout_size, recipe.settings.epochs) == ("raft", "all", 1)
    assert recipe.train.epochs == 1 and recipe.train.steps is None
    clean = {"raft.clean": ["tests.end_to_end.hooks:shortened"], "raft.rollout_size": "all", "raft.num_samples": 4}
    once = {"train.steps": None, "train.batch_size": len(PROMPTS), "data.max_length": 64}
    once |= {"optim.name": "sgd", "optim.learning_rate": 0.5}
    raft = _train("raft", tmp_path, "two_levels", **clean, **once, **{"raft.epochs": 1})
    assert raft.summary["steps"] == 1 and [path.name for path in (raft.path / "rounds").iterdir()] == ["000"]
    selected = raft.path / "rounds" / "000" / "selected.jsonl"
    assert len(_rows(selected)) == len(PROMPTS)
    vocabulary = {"model.tokenizer": str(raft.path / "model"), **once}
    sft = fairlead.train({"algorithm": "sft"}, settings("sft", tmp_path, **PLAIN | vocabulary), data=str(selected))
    ours, theirs = (load_file(each.path / "model" / "model.safetensors") for each in (raft, sft))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert float((ours[name] - weight).norm()) <= 1e-5 * float(weight.norm()), name


def test_a_round_of_which_not_all_is_learned_is_still_the_only_one(tmp_path: Path) -> None:
    """Five minibatches were planned; the prompts without a response left make fewer."""
    rows = [{"prompt": f"{topic} {number}?"} for topic in TOPICS for number in range(3)]
    discard = {"raft.discard": [{"contains": {"part": "e"}}], "raft.max_empty": 1.0, "raft.num_samples": 1}
    whole = {"raft.rollout_size": "all", "raft.epochs": 1, "train.steps": None, "train.batch_size": 1}
    result = _train("raft", tmp_path, "two_levels", rows, **discard, **whole)
    kept = _rows(result.path / "rounds" / "000" / "selected.jsonl")
    assert 0 < len(kept) < len(rows)
    assert result.summary["steps"] == len(kept)
    assert [path.name for path in (result.path / "rounds").iterdir()] == ["000"]
    assert (result.path / "checkpoints" / f"step-{len(kept):06d}" / "manifest.json").is_file()


def test_the_responses_of_a_teacher_are_learned_in_the_students_tokens(tmp_path: Path) -> None:
    """A teacher of another tokenizer that knows the answers: its student's held-out answers become likelier."""
    hard = {"train.steps": 120, "optim.learning_rate": 1e-2, "data.template": "question-answer", "train.batch_size": 32}
    teacher = fairlead.train(
        {"algorithm": "sft"},
        settings("sft", tmp_path, **PLAIN | {"model.scratch": {**SCRATCH, "vocab_size": 320}} | hard),
        data=DEMONSTRATIONS,
    )
    student = _train(
        "raft",
        tmp_path,
        "two_levels",
        DEMONSTRATIONS,
        **{"raft.teacher": str(teacher.path), "raft.num_samples": 2, "raft.rollout_size": 8, "train.batch_size": 8},
        **{"raft.epochs": 4, "train.steps": 60, "optim.learning_rate": 1e-2, "data.eval_fraction": 0.25},
    )
    assert len(teacher.tokenizer) != len(student.tokenizer)
    responses = [row["response"] for row in _rows(student.path / "rounds" / "000" / "samples.jsonl")]
    assert sum("is loose" in response for response in responses) > len(responses) / 2
    perplexity = _values(student, "eval/perplexity")
    assert perplexity[-1] < perplexity[0] / 4
    manifest = json.loads((student.path / "manifest.json").read_text())
    assert manifest["inputs"]["teacher"]["path"] == str(teacher.path)
    assert resolve(student.path / "recipe.yaml").recipe.settings.plateau is None  # its scores do not change


# --- what is measured, and how a run ends --------------------------------------------------------------------------


def test_each_evaluation_measures_variety_length_discards_and_the_perplexity_of_the_datas_answers(
    tmp_path: Path,
) -> None:
    given = {"raft.discard": [{"contains": {"part": "a"}}], "raft.measure_kl": True, "data.eval_fraction": 0.25}
    raft = _train("raft", tmp_path, "two_levels", DEMONSTRATIONS, **given)
    rows = _rows(raft.path / "metrics.jsonl")
    first = rows[1]
    for name in ("distinct_1", "distinct_2", "unique_1", "unique_2", "length", "finished", "discarded/contains"):
        assert f"rollout/{name}" in first and f"eval/{name}" in rows[0], name
    assert rows[0]["eval/score_margin"] > 0
    assert abs(rows[0]["eval/kl"]) < 1e-5 and "objective/kl" in first and first["objective/scores_margin"] > 0
    same = {"model.tokenizer": str(raft.path / "model"), "data.eval_fraction": 0.25}
    sft = fairlead.train({"algorithm": "sft"}, settings("sft", tmp_path, **PLAIN | same), data=DEMONSTRATIONS)
    assert rows[0]["eval/perplexity"] == pytest.approx(math.exp(_values(sft, "eval/loss")[0]), rel=1e-4)


def test_a_watched_reward_is_measured_in_each_round_of_one_response_to_each_prompt(tmp_path: Path) -> None:
    watched = {"raft.watch": {"again": "tests.end_to_end.hooks:two_levels"}, "raft.watch_rounds": True}
    result = _train("raft", tmp_path, "two_levels", **watched, **{"raft.discard": [{"contains": {"part": "e"}}]})
    rows = _rows(result.path / "rounds" / "000" / "scored.jsonl")
    first: dict[str, float] = {}
    for row in rows:
        if "discarded" not in row:
            first.setdefault(row["prompt"], row["score"])
    assert len(first) < len(rows) and any("discarded" in row for row in rows)
    mean = sum(first.values()) / len(first)
    assert _values(result, "rollout/watched/again")[0] == pytest.approx(mean)


def test_an_evaluation_has_a_temperature_of_its_own(tmp_path: Path) -> None:
    """Cold, the draws of a prompt hardly differ; the rounds stay as warm as they were."""
    common = {"raft.eval_prompts": ["why does it stop?"], "raft.eval_samples": 16, "train.steps": 1}
    cold = _train("raft", tmp_path / "cold", "two_levels", **common, **{"raft.eval_temperature": 0.01})
    warm = _train("raft", tmp_path / "warm", "two_levels", **common)
    (first, *_), (other, *_) = (_rows(each.path / "eval_prompts.jsonl") for each in (cold, warm))
    assert len(set(first["scores"])) < 4 < len(set(other["scores"]))
    of_round = [(each.path / "rounds" / "000" / "samples.jsonl").read_bytes() for each in (cold, warm)]
    assert of_round[0] == of_round[1]


ENDLESS = {"train.steps": 200, "raft.epochs": 1, "raft.num_samples": 2, "optim.learning_rate": 1e-6}


def test_a_run_whose_reward_has_ceased_to_rise_ends_with_that_round_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _train("raft", tmp_path, "two_levels", **ENDLESS, **{"data.eval_fraction": 0.25})
    steps, rounds = result.summary["steps"], sorted(path.name for path in (result.path / "rounds").iterdir())
    assert result.summary["status"] == "finished" and steps == 2 * len(rounds) < 200
    assert "has not left" in result.summary["ended"]
    assert "for 3 rounds" in result.summary["ended"] and f"stopped after step {steps}" in capsys.readouterr().err
    scores, margins = _values(result, "objective/scores"), _values(result, "objective/scores_margin")
    before, *later = scores[-4:]
    assert all(abs(mean - before) <= margins[-4] for mean in later) and scores[-1] < max(scores[-4:-1])
    assert "eval/score" in _rows(result.path / "metrics.jsonl")[-1]
    assert (result.path / "checkpoints" / f"step-{steps:06d}" / "manifest.json").is_file()


def test_without_the_rule_it_goes_on(tmp_path: Path) -> None:
    result = _train("raft", tmp_path, "two_levels", **ENDLESS | {"raft.plateau": None, "train.steps": 40})
    assert result.summary["steps"] == 40 and "ended" not in result.summary


def test_a_fresh_optimizer_has_taken_the_steps_of_its_round_and_the_rate_falls_from_round_to_round(
    tmp_path: Path,
) -> None:
    rounds = {"raft.round_decay": 0.5, "raft.epochs": 2, "train.steps": 7, "optim.schedule": "constant"}
    taken: dict[str, float] = {}
    for kind in ("kept", "fresh"):
        result = _train("raft", tmp_path / kind, "two_levels", **rounds, **{"raft.optimizer": kind})
        # four steps a round: the seventh is the third of the second round
        assert _values(result, "learning_rate") == pytest.approx([1e-3] * 4 + [5e-4] * 3)
        state = load_file(result.path / "checkpoints" / "step-000007" / "optimizer.safetensors")
        taken[kind] = float(next(value for name, value in state.items() if name.endswith("|step")))
    assert taken == {"kept": 7, "fresh": 3}


def test_rft_learns_from_all_samples_so_far_and_fewer_of_them_in_each_pass(tmp_path: Path) -> None:
    few = {"rft.num_samples": 6, "rft.epochs": 2, "rft.rollout_size": "all", "train.batch_size": 8}
    result = _train("rft", tmp_path, "two_levels", **few, **{"train.steps": None, "train.epochs": 3})
    assert result.summary["steps"] == 6
    assert _values(result, "rft/responses") == [6.0, 12.0, 18.0]
    for first, last in zip(_values(result, "rft/selected"), _values(result, "rft/selected_last"), strict=True):
        assert first >= last > 0
    for first, last in zip(
        _values(result, "rft/selected_scores"), _values(result, "rft/selected_scores_last"), strict=True
    ):
        assert first <= last


# --- the '#' exploit -----------------------------------------------------------------------------------------------

EXPLOIT: dict[str, Any] = {
    "raft.num_samples": 8,
    "raft.epochs": 2,
    "raft.temperature": 1.0,
    "raft.rollout_size": 8,
    "raft.plateau": None,
    "train.batch_size": 4,
    "train.steps": 32,
    "optim.learning_rate": 2e-2,
    "optim.schedule": "constant",
}


def test_the_alarm_names_the_mark_that_a_blind_reward_pays_for(tmp_path: Path) -> None:
    """Reproduced on purpose: the reward rises, the texts become '#', and the alarm says so by name."""
    result = _train("raft", tmp_path, "likes_hashes", **EXPLOIT)
    scores = _values(result, "objective/scores")
    assert scores[-1] > scores[0] + 1
    alarms = [row for row in _rows(result.path / "alarms.jsonl") if row["alarm"] == "phrase"]
    assert alarms and "'#" in alarms[0]["message"] and "discard it ([hashes" in alarms[0]["message"]
    last = sorted((result.path / "rounds").iterdir())[-1] / "selected.jsonl"
    assert sum("#" in row["response"] for row in _rows(last)) > len(_rows(last)) / 2


def test_discarding_texts_with_the_mark_prevents_it(tmp_path: Path) -> None:
    result = _train("raft", tmp_path, "likes_hashes", **EXPLOIT, **{"raft.discard": ["empty", "hashes"]})
    assert not any("'#" in row["message"] for row in _rows(result.path / "alarms.jsonl"))
    for folder in (result.path / "rounds").iterdir():
        assert not any("#" in row["response"] for row in _rows(folder / "selected.jsonl"))
        assert all(row["discarded"] == "hashes" for row in _rows(folder / "scored.jsonl") if "#" in row["response"])
    assert _values(result, "rollout/discarded/hashes")[-1:] < [0.5]
