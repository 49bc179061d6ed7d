"""Each alarm speaks on the metrics of a run gone wrong, and is silent on those of a sound one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairlead.health.alarms import Alarms
from fairlead.tracking.run_directory import RunDirectory
from fairlead.types import Progress

SOUND = {
    "objective/scores": 0.4,
    "objective/scores_std": 0.3,
    "objective/kl": 0.5,
    "rollout/sampler_difference_mean": 1e-6,
    "policy/ratio": 1.01,
    "rollout/distinct_2": 0.8,
    "rollout/length": 40.0,
    "policy/entropy": 2.5,
    "rollout/finished": 0.9,
    "rewards/chosen": 0.01,
    "rewards/rejected": -0.01,
    "logps/chosen_change": -0.5,
}


def _directory(path: Path) -> RunDirectory:
    return RunDirectory.create(path / "run", "algorithm: ppo\n")


def _told(alarms: Alarms, steps: list[dict[str, float]], first: int = 1) -> None:
    for step, metrics in enumerate(steps, first):
        alarms.after_step(Progress(step, 100, metrics, 0, 0.0))


def _raised(directory: RunDirectory) -> list[tuple[int, str]]:
    if not directory.alarms.exists():
        return []
    rows = [json.loads(line) for line in directory.alarms.read_text().splitlines()]
    return [(row["step"], row["alarm"]) for row in rows]


def test_a_sound_run_raises_none(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    _told(Alarms(directory, print), [SOUND | {"objective/kl": 0.1 * step} for step in range(30)])
    assert _raised(directory) == []


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("reward_constant", {"objective/scores_std": 0.0}),
        ("reward_jump", {"objective/scores": 1.1}),
        ("kl_negative", {"objective/kl": -0.4}),
        ("sampler_mismatch", {"rollout/sampler_difference_mean": 0.1}),
        ("ratio", {"policy/ratio": 12.0}),
        ("variety", {"rollout/distinct_2": 0.44}),  # the '#' case of the source: 0.39 -> 0.22
        ("length", {"rollout/length": 75.0}),
        ("length", {"rollout/length": 15.0}),
        ("entropy", {"policy/entropy": 0.1}),
        ("unfinished", {"rollout/finished": 0.1}),
        ("rewards_stuck", {"rewards/chosen": 0.0, "rewards/rejected": 0.0}),
        ("chosen_falls", {"logps/chosen_change": -30.0}),
    ],
)
def test_each_alarm_is_raised_once_until_all_is_well_again(
    name: str, broken: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, bad = _directory(tmp_path), SOUND | broken
    _told(Alarms(directory, print), [SOUND, SOUND, SOUND, bad, bad, SOUND, bad])
    assert _raised(directory) == [(4, name), (7, name)]
    assert f"alarm at step 4: {name}: " in capsys.readouterr().out


def test_rewards_are_zero_before_the_first_update_and_that_is_no_alarm(tmp_path: Path) -> None:
    directory, zero = _directory(tmp_path), SOUND | {"rewards/chosen": 0.0, "rewards/rejected": 0.0}
    _told(Alarms(directory, print), [zero, SOUND, zero])
    assert _raised(directory) == [(3, "rewards_stuck")]


def test_rewards_are_zero_where_a_round_takes_the_policy_as_its_reference_and_that_is_no_alarm(tmp_path: Path) -> None:
    directory, zero = _directory(tmp_path), SOUND | {"rewards/chosen": 0.0, "rewards/rejected": 0.0}
    fresh = zero | {"rewards/fresh_reference": 1.0}
    _told(Alarms(directory, print), [fresh, SOUND, fresh, SOUND, fresh, zero])
    assert _raised(directory) == [(6, "rewards_stuck")]


def test_an_alarm_shows_a_sample_of_the_newest_round_with_what_each_reward_says(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    for number, text in ((999, "old"), (1000, "####"), (1001, "of a round that a killed process was ahead")):
        row: dict[str, Any] = {"prompt": "p", "response": text, "score": 1.5, "scores": {"a": 1.0, "rule:length": 0.5}}
        (directory.rounds / str(number)).mkdir(parents=True)
        discarded = {"prompt": "p", "response": "", "score": None, "discarded": "empty"}
        lines = [json.dumps(each) + "\n" for each in (discarded, row)]
        (directory.rounds / str(number) / "scored.jsonl").write_text("".join(lines))
    (directory.rounds / "000").mkdir()
    (directory.rounds / "000" / "samples.jsonl").write_text(json.dumps({"response": "####"}) + "\n")
    _told(Alarms(directory, lambda _: None), [SOUND | {"objective/scores_std": 0.0, "rollout/round": 1000.0}])
    message = json.loads(directory.alarms.read_text())["message"]
    assert "every response of the round scores 0.4" in message
    assert message.endswith("For example: '####' (a 1, rule:length 0.5; round 1000)")


def test_a_checkpoint_from_before_an_alarm_looked_back_is_read(tmp_path: Path) -> None:
    state = Alarms(_directory(tmp_path / "old"), print).state_dict()
    del state["last"]
    directory = _directory(tmp_path / "new")
    alarms = Alarms(directory, lambda _: None)
    alarms.load_state_dict(state)
    _told(alarms, [SOUND, SOUND | {"objective/scores": 1.1}], first=5)
    assert _raised(directory) == [(6, "reward_jump")]


def test_a_continued_run_raises_what_an_uninterrupted_one_would(tmp_path: Path) -> None:
    bad = SOUND | {"rollout/length": 90.0}
    steps = [SOUND, SOUND, bad, bad, SOUND, bad]
    whole = _directory(tmp_path / "whole")
    _told(Alarms(whole, lambda _: None), steps)
    for cut in range(1, len(steps)):
        directory = _directory(tmp_path / f"cut-{cut}")
        before, after = Alarms(directory, lambda _: None), Alarms(directory, lambda _: None)
        _told(before, steps[:cut])
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        _told(after, steps[cut:], first=cut + 1)
        assert _raised(directory) == _raised(whole)
