"""Three kills of a run of each algorithm, at keyed moments. `make chaos` kills hundreds of times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.chaos.kills import base_model, chaos
from tests.chaos.left import differing
from tests.chaos.runs import ALGORITHMS
from tests.end_to_end.rows import ONLINE

from fairlead.algorithms import REGISTRY

SAMPLED = {"sampling", "scoring", "measuring", "round write"}
ALWAYS = {
    "starting",
    "resuming",
    "training",
    "evaluating",
    "logging",
    "checkpoint write",
    "pruning",
    "model save",
    "finishing",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_runs_killed_at_any_moment_end_with_the_bytes_of_an_uninterrupted_one(
    algorithm: str, base: Path, tmp_path: Path
) -> None:
    *_, tally = chaos(algorithm, tmp_path, base, forked=3, fresh=0)
    assert tally.kills == sum(tally.phases.values()) == 3
    assert tally.mismatches == []
    assert tally.restarts >= 1
    events = json.loads((tmp_path / "whole" / "events.json").read_text())
    assert set(events) == ALWAYS | (SAMPLED if algorithm in ONLINE else set())  # no phase lost its name


def test_the_algorithms_are_names_that_there_are() -> None:
    assert set(ALGORITHMS) <= set(REGISTRY)
    assert {"ppo", "rloo", "raft", "online_dpo"} == set(ALGORITHMS) & set(ONLINE)


def test_a_file_that_is_missing_added_or_changed_differs() -> None:
    assert differing({"a": b"1", "b": b"2", "c": b"3"}, {"a": b"1", "b": b"0", "d": b"3"}) == ["b", "c", "d"]
