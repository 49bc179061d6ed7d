"""RFT: what a percentile keeps in each pass, and that a prompt's samples accumulate from round to round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.algorithms import rft
from fairlead.algorithms.shaping import Shaper, Unshaped
from fairlead.data.render import Tree
from fairlead.errors import TrainingError
from fairlead.rollout.experience import Experience
from fairlead.rollout.store import RolloutStore

NAN = float("nan")


def _experience(scores: dict[tuple[int, ...], dict[int, float]], number: int = 0) -> Experience:
    """Prompts, each with responses of one token and its score."""
    trees = [Tree(prompt, tuple((token, 1) for token in held)) for prompt, held in scores.items()]
    flat = torch.tensor([score for held in scores.values() for score in held.values()])
    return Experience(trees, {}, flat, torch.ones(len(flat), dtype=torch.bool), number=number)


def _store(folder: Path, *rounds: Experience) -> RolloutStore:
    store = RolloutStore(folder)
    for number, experience in enumerate(rounds):
        store.save(number, experience.tensors(), {})
    return store


def _kept(folder: Path, *rounds: Experience, **settings: Any) -> list[dict[tuple[int, ...], list[int]]]:
    """Of each pass over the last round, the first tokens of the responses kept of each prompt."""
    made, last = rft.Settings(**settings), rounds[-1]
    pool = rft.Pool(_store(folder, *rounds))
    found = rft.estimate(last, Shaper(Unshaped())(last), settings=made, pool=pool)
    assert found.keep is not None and found.experience is not None
    flat = [(tree.prompt, response[0]) for tree in found.experience.trees for response in tree.responses]
    passes: list[dict[tuple[int, ...], list[int]]] = []
    for row in found.keep.tolist():
        kept: dict[tuple[int, ...], list[int]] = {}
        for (prompt, token), is_kept in zip(flat, row, strict=True):
            if is_kept:
                kept.setdefault(prompt, []).append(token)
        passes.append(kept)
    return passes


def test_the_percentile_rises_from_pass_to_pass_by_equal_steps(tmp_path: Path) -> None:
    """Of 0..9 the 0.7-quantile is 6.3; a quarter of the way to 0.95 further, 6.8625, 7.425 and 7.9875."""
    scores = {(5,): {20 + value: float(value) for value in range(10)}}
    highest, high = [27, 28, 29], [28, 29]
    # a single prompt has one threshold, which cannot stand both above the lowest and below the highest: the latter
    assert [kept[(5,)] for kept in _kept(tmp_path, _experience(scores))] == [highest, highest, high, high]


def test_of_rewards_with_few_values_the_lowest_are_not_learned_and_the_highest_not_left_out(tmp_path: Path) -> None:
    scores = {
        (5,): {20: 0.0, 21: 0.0, 22: 0.0, 23: 0.0},
        (6,): {20: 0.0, 21: 0.0, 22: 0.0, 23: 1.0},
        (7,): {20: 1.0, 21: 1.0, 22: 1.0, 23: 1.0},
    }
    (kept,) = _kept(tmp_path, _experience(scores), epochs=1)
    assert kept == {(6,): [23], (7,): [20, 21, 22, 23]}


def test_a_response_that_scores_the_threshold_itself_is_learned(tmp_path: Path) -> None:
    """Three quarters of the way from 0 to 4 lies 3, which other prompts keep from being the highest threshold."""
    of = {(5,): [0.0, 1.0, 2.0, 3.0, 4.0], (6,): [-9.0] * 5, (7,): [9.0] * 5}
    scores = {prompt: dict(zip(range(20, 25), values, strict=True)) for prompt, values in of.items()}
    (kept,) = _kept(tmp_path, _experience(scores), epochs=1, start_percentile=0.75)
    assert kept[(5,)] == [23, 24]


def test_samples_of_a_prompt_accumulate_each_once(tmp_path: Path) -> None:
    first = _experience({(5,): {20: 0.1, 21: 0.9}, (6,): {20: 0.3, 21: 0.2}})
    second = _experience({(6,): {20: 0.3, 22: 0.8}, (5,): {23: 0.5, 24: NAN}}, number=1)
    held = rft.Pool(_store(tmp_path, first, second)).of(second)
    assert [(tree.prompt, [response[0] for response in tree.responses]) for tree in held.trees] == [
        ((6,), [20, 21, 22]),
        ((5,), [20, 21, 23]),
    ]
    assert held.scores.tolist() == pytest.approx([0.3, 0.2, 0.8, 0.1, 0.9, 0.5])


def test_a_continued_run_has_the_pool_of_an_uninterrupted_one(tmp_path: Path) -> None:
    rounds = [_experience({(5,): {20 + number: float(number), 30: 7.0}}, number=number) for number in range(4)]
    store = _store(tmp_path, *rounds)
    pool = rft.Pool(store)
    grown = [pool.of(each).scores.tolist() for each in rounds]
    assert [len(scores) for scores in grown] == [2, 3, 4, 5]
    assert [rft.Pool(store).of(each).scores.tolist() for each in rounds] == grown  # read in one go


def test_the_pool_of_a_round_does_not_hold_what_was_sampled_later(tmp_path: Path) -> None:
    rounds = [_experience({(5,): {20 + number: 1.0}}, number=number) for number in range(2)]
    assert len(rft.Pool(_store(tmp_path, *rounds)).of(rounds[0]).scores) == 1


def test_a_round_whose_prompts_are_left_without_stops(tmp_path: Path) -> None:
    empty = replace(_experience({(5,): {20: NAN}, (6,): {20: NAN}, (7,): {20: 1.0}}), measured={"discarded/empty": 0.7})
    with pytest.raises(TrainingError, match=r"to 67% of the round's prompts were discarded: .*empty.*70%"):
        _kept(tmp_path, empty)


def test_percentiles_that_fall_are_refused() -> None:
    with pytest.raises(ValueError, match=r"end_percentile=0\.5 is below start_percentile=0\.7"):
        rft.Settings(end_percentile=0.5)
