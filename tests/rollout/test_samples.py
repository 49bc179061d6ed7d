"""Samples as rows of a file: what stands in them, and what is read back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from tests.tiny import tokenizer

from fairlead.data.records import load_records
from fairlead.data.render import Renderer
from fairlead.errors import DataError
from fairlead.rollout.samples import (
    numbers_of,
    prompt_rows,
    read_samples,
    rollouts_of,
    round_prompts,
    sample_rows,
    score_kept,
    scored_rows,
)
from fairlead.types import Demonstration, Prompt, Rollout, Scores

TURNS: Any = (
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "so."},
    {"role": "user", "content": "oh?"},
)
PROMPTS = [Prompt("why does it stop?", {"topic": "lamp", "response": "a column of that name"}), Prompt(TURNS)]


def _renderer(template: str = "question-answer") -> Renderer:
    return Renderer(tokenizer(), template=template, max_length=64)


def _rollouts(renderer: Renderer) -> list[Rollout]:
    """Two responses to each prompt, the second of each cut at its limit."""
    one, two = PROMPTS
    texts = [(one, "the fuse", True), (one, "is", False), (two, "loose", True), (two, "", False)]
    ids = [tuple(tokenizer()(f" {text}").input_ids) for _, text, _ in texts]
    ends = [(renderer.eos,) if finished else () for _, _, finished in texts]
    return [
        Rollout(prompt, (1,), own + end, (-1.0,) * len(own + end), finished, text)
        for (prompt, text, finished), own, end in zip(texts, ids, ends, strict=True)
    ]


def _written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_every_prompt_comes_once_an_epoch_and_rounds_go_on_where_the_last_one_ended() -> None:
    drawn = [each for number in range(7) for each in round_prompts(range(10), 3, number, 5)]
    assert Counter(drawn[:10]) == Counter(range(10)) == Counter(drawn[10:20])
    assert drawn[:10] != drawn[10:20]
    assert round_prompts(range(10), 10, 0, 5) == drawn[:10]
    assert round_prompts(range(10), 3, 0, 6) != drawn[:3]


def test_a_row_holds_prompt_response_and_how_it_ended(tmp_path: Path) -> None:
    renderer = _renderer()
    rows = sample_rows(_rollouts(renderer), 2, renderer)
    assert rows[0] == {
        "prompt": "why does it stop?",
        "columns": PROMPTS[0].columns,
        "response": "the fuse",
        "sample": 0,
        "finished": True,
        "length": len(_rollouts(renderer)[0].response_ids),
    }
    assert rows[3] == {"prompt": list(TURNS), "response": "", "sample": 1, "finished": False, "length": 1}
    assert read_samples(_written(tmp_path / "samples.jsonl", rows)) == rows
    assert numbers_of(rows) == [2, 2]
    assert numbers_of([*rows, *rows[2:], rows[0]]) == [2, 2, 2, 1]


def test_what_is_read_back_has_the_tokens_that_were_sampled(tmp_path: Path) -> None:
    renderer = _renderer()
    sampled = _rollouts(renderer)
    rows = read_samples(_written(tmp_path / "samples.jsonl", sample_rows(sampled, 2, renderer)))
    for found, wanted in zip(rollouts_of(rows, renderer), sampled, strict=True):
        assert (found.prompt, found.text, found.finished) == (wanted.prompt, wanted.text, wanted.finished)
        assert found.response_ids == wanted.response_ids


@pytest.mark.parametrize("template", ["question-answer", "plain"])
def test_rows_are_demonstrations_of_the_very_tokens_and_a_cut_one_learns_no_end(template: str, tmp_path: Path) -> None:
    renderer = _renderer(template)
    sampled = _rollouts(renderer)[:3]
    path = _written(tmp_path / "samples.jsonl", sample_rows(sampled, 2, renderer))
    records, _ = load_records(str(path), Demonstration)
    trees, _, _ = renderer.trees(records)
    assert [tree.responses[0] for tree in trees] == [rollout.response_ids for rollout in sampled]


def test_columns_by_other_formats_names_do_not_make_a_row_something_else(tmp_path: Path) -> None:
    columns = {"chosen": "a", "rejected": "b", "label": True, "messages": [{"role": "user", "content": "x"}]}
    rollout = Rollout(Prompt("why?", columns), (1,), (5, 1), (-1.0, -1.0), True, "so")
    path = _written(tmp_path / "samples.jsonl", sample_rows([rollout], 1, _renderer()))
    assert load_records(str(path), Demonstration)[0] == [Demonstration("why?", "so")]
    assert prompt_rows([rollout.prompt]) == [{**columns, "prompt": "why?"}]


def test_a_discarded_sample_has_its_reason_and_a_cleaned_one_its_new_text() -> None:
    renderer = _renderer()
    sampled = _rollouts(renderer)
    cleaned = [Rollout(sampled[0].prompt, (1,), (9, 1), (math.nan,) * 2, True, "the"), *sampled[1:]]
    scores = Scores((0.5, math.nan, 1.0, 2.0), parts={"length": (1.0, math.nan, 2.0, 3.0)})
    rows = list(scored_rows(sample_rows(sampled, 2, renderer), cleaned, scores, [None, "too_short", None, None]))
    assert (rows[0]["response"], rows[0]["length"]) == ("the", 2)
    assert (rows[0]["score"], rows[0]["scores"]) == (0.5, {"length": 1.0})
    assert (rows[1]["response"], rows[1]["score"], rows[1]["discarded"]) == ("is", None, "too_short")
    assert "scores" not in rows[1] and "discarded" not in rows[2]


def test_scores_stand_at_the_samples_that_were_not_discarded() -> None:
    def reward(rollouts: Sequence[Rollout]) -> Scores:
        values = tuple(float(len(rollout.text)) for rollout in rollouts)
        return Scores(values, parts={"twice": tuple(2 * value for value in values)})

    sampled, given = _rollouts(_renderer()), cast(Any, reward)
    found, lengths = score_kept(given, sampled, [None, "too_short", None, "empty"]), [len(r.text) for r in sampled]
    assert [found.values[0], found.values[2]] == [lengths[0], lengths[2]]
    assert [found.parts["twice"][0], found.parts["twice"][2]] == [2 * lengths[0], 2 * lengths[2]]
    assert all(math.isnan(values[i]) for values in (found.values, found.parts["twice"]) for i in (1, 3))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "why?", "response": "so"}, r"samples.jsonl:1: no sample: it has prompt, response"),
        ({"prompt": "p", "response": 3, "sample": 0, "finished": True}, r":1: response must be str, got 3"),
        ({"prompt": "p", "response": "r", "sample": "0", "finished": True}, r":1: sample must be int"),
        (
            {"prompt": 5, "response": "r", "sample": 0, "finished": True},
            r":1: prompt must be a text or a list",
        ),
    ],
)
def test_a_row_that_is_no_sample_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_samples(_written(tmp_path / "samples.jsonl", [row]))
