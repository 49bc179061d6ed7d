"""The alarm that names what the responses have come to repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairlead.health.alarms import Alarms
from fairlead.health.phrases import phrase_rule
from fairlead.tracking.run_directory import RunDirectory
from fairlead.types import Progress

SOUND = [f"the {part} of the {topic} is loose" for part in ("fuse", "belt", "seal") for topic in ("lamp", "pump")] * 4
HASHES = [f"{text} ###" for text in SOUND[:12]] + SOUND[12:]
"""Half of the responses end with '#': the case of the source."""


def _write(rounds: Path, number: int, name: str, texts: list[str], **more: Any) -> None:
    folder = rounds / f"{number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"response": text, **more}) + "\n" for text in texts))


def _said(rounds: Path, number: int) -> str:
    return phrase_rule(rounds).check({"rollout/round": float(number)}, {}) or ""


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    rounds = RunDirectory.create(tmp_path / "run", "algorithm: raft\n").rounds
    _write(rounds, 0, "samples", SOUND)
    return rounds


def test_it_names_the_mark_with_its_shares(rounds: Path) -> None:
    _write(rounds, 3, "selected", HASHES)
    _write(rounds, 3, "scored", SOUND)
    assert _said(rounds, 3).startswith("'#' has become 18% of what is learned from, 0.6% of the first samples: ")


@pytest.mark.parametrize(("mark", "told"), [("\N{FIRE}", "\N{FIRE}"), ("```", "`")])
def test_it_names_emojis_and_code_fences(mark: str, told: str, rounds: Path) -> None:
    _write(rounds, 3, "selected", [f"{mark} {text} {mark}" for text in SOUND])
    assert f"'{told}' has become" in _said(rounds, 3)


def test_where_nothing_is_selected_it_reads_what_was_scored_and_not_discarded(rounds: Path) -> None:
    _write(rounds, 1, "scored", HASHES)
    assert "'#'" in _said(rounds, 1)
    _write(rounds, 2, "scored", HASHES, discarded="hashes")
    assert _said(rounds, 2) == ""


def test_it_is_silent_on_a_sound_run(rounds: Path) -> None:
    for number in range(3):
        _write(rounds, number, "selected", SOUND[number * 3 :])
        assert _said(rounds, number) == ""


def test_the_alarm_looks_at_the_round_that_the_step_begins_not_at_the_newest(rounds: Path) -> None:
    """A run that was killed may have sampled a round more than its checkpoint knows of."""
    _write(rounds, 1, "scored", SOUND, score=1.0)
    _write(rounds, 2, "scored", HASHES, score=1.0)
    directory = RunDirectory.open(rounds.parent)
    alarms = Alarms(directory, lambda _: None)
    alarms.after_step(Progress(3, 9, {"rollout/round": 1.0}, 0, 0.0))
    assert not directory.alarms.exists()
    alarms.after_step(Progress(5, 9, {"rollout/round": 2.0}, 0, 0.0))
    (row,) = map(json.loads, directory.alarms.read_text().splitlines())
    assert (row["step"], row["alarm"]) == (5, "phrase") and "'#'" in row["message"]
