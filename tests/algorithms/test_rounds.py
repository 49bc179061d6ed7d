"""Rounds as a source of steps: which advantage stands at which response, what moves once a round, what ends a round,
and where a resumed one goes on. A real run on an enumerable task, whose steps are taken by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairlead.conformance.case import prompts
from fairlead.conformance.staged import Staged, staged
from fairlead.conformance.tasks import Task
from fairlead.errors import CheckpointError

TASK = Task("abc", 2, ("a b", "b c", "c a", "a a"), seed=5)
SAMPLES = 4
QUIET = {"policy/approx_kl": 0.0, "policy/ratio": 1.0}


def begun(
    folder: Path, algorithm: str = "rloo", packing: str = "best-fit", steps: int | None = 16, **settings: Any
) -> Staged:
    """Rounds of 8 prompts, the task's each twice, in minibatches of 2."""
    own = {
        "rollout_size": 8,
        "rollout_rows": 64,
        "max_new_tokens": TASK.length,
        "epochs": 1,
        "kl_coef": 0.0 if algorithm == "rloo" else 0.1,
        **({"num_samples": SAMPLES} if algorithm == "rloo" else {}),
        **settings,
    }
    given = {"train.batch_size": 2, "train.steps": steps, "data.packing": packing}
    given |= {f"{algorithm}.{name}": value for name, value in own.items()}
    return staged(TASK, algorithm, given, prompts(TASK, 2), folder, reward=TASK.reward)


def sequences(batch: Any) -> list[tuple[tuple[int, ...], Tensor]]:
    """Ids and advantages of each response of a micro-batch."""
    ids, owner = batch.input_ids[batch.loss_mask], batch.sequence_ids[batch.loss_mask]
    values = batch.advantages[batch.loss_mask]
    return [(tuple(ids[owner == s].tolist()), values[owner == s]) for s in range(batch.num_sequences)]


def prompt_of(batch: Any, first: int) -> str:
    """The prompt that the responses from ``first`` on answer: what stands before them, up to where they begin."""
    row, column = divmod(int(batch.sequence_ends[first]), batch.input_ids.shape[1])
    path = [column]
    while (before := int(batch.previous[row, path[-1]])) >= 0:
        path.append(before)
    ids = [int(batch.input_ids[row, at]) for at in reversed(path)]
    return " ".join(TASK.words[i - 1] for i in ids[: TASK.prompt_length])


@pytest.mark.parametrize("packing", ["best-fit", "none"])
def test_each_response_bears_the_advantage_that_its_text_and_prompt_earn(packing: str, tmp_path: Path) -> None:
    run = begun(tmp_path, packing=packing)
    steps, seen = run.steps(), 0
    for _ in range(4):
        for batch in next(steps):
            found = sequences(batch)
            for first in range(0, len(found), SAMPLES):
                group, row = found[first : first + SAMPLES], TASK.rewards[TASK.prompts.index(prompt_of(batch, first))]
                scores = [float(row[TASK.responses.index(ids)]) for ids, _ in group]
                for score, (_, advantages) in zip(scores, group, strict=True):
                    others = (sum(scores) - score) / (SAMPLES - 1)
                    assert torch.allclose(advantages.double(), torch.tensor(score - others).double(), atol=1e-5)
                    seen += 1
    assert seen == 8 * SAMPLES


def test_the_kl_controller_moves_once_a_round_and_from_its_beginning(tmp_path: Path) -> None:
    """Ziegler et al. 2019, section 2.2, of the 8 responses of a round."""
    run = begun(tmp_path, "ppo", adaptive_kl={"target": 0.5, "horizon": 100.0})
    coefficients, following = list[float](), 0.0
    for step in run.steps():
        metrics = run.source.after_step(QUIET)
        coefficients.append(run.source.state_dict()["shaping"]["kl_coef"])
        if not following:
            error = min(max(metrics["objective/kl"] / 0.5 - 1, -0.2), 0.2)
            following = coefficients[-1] * (1 + error * 8 / 100)
        assert step
        if len(coefficients) == 5:
            break
    assert coefficients[:4] == [0.1] * 4
    assert coefficients[4] == pytest.approx(following) and following not in (0.0, 0.1)


@pytest.mark.parametrize(("found", "wanted"), [(0.009, 0), (0.011, 1)])
def test_a_step_beyond_the_target_kl_ends_its_round(found: float, wanted: int, tmp_path: Path) -> None:
    run = begun(tmp_path, "ppo", target_kl=0.01)
    steps = run.steps()
    next(steps)
    told = run.source.after_step({"policy/approx_kl": found, "policy/ratio": 1.0})
    next(steps)
    state = run.source.state_dict()
    assert (state["round"], state["position"]) == (wanted, 2 - wanted)
    assert told.get("policy/round_ended_early", 0.0) == wanted


def test_a_resumed_round_goes_on_where_it_stood(tmp_path: Path) -> None:
    whole = begun(tmp_path / "whole")
    steps, states, wanted = whole.steps(), list[dict[str, Any]](), list[Any]()
    for _ in range(3):
        wanted.append(next(steps))
        whole.source.after_step(QUIET)
        states.append(whole.source.state_dict())
    resumed = begun(tmp_path / "whole")
    resumed.source.load_state_dict(states[1])
    (batch,), (following,) = next(resumed.steps()), wanted[2]
    assert torch.equal(batch.input_ids, following.input_ids)
    assert torch.equal(batch.advantages, following.advantages)
    assert not torch.equal(batch.input_ids, wanted[0][0].input_ids)


def test_a_round_that_is_not_the_checkpoints_is_refused(tmp_path: Path) -> None:
    run = begun(tmp_path)
    next(run.steps())
    run.source.after_step(QUIET)
    resumed = begun(tmp_path)
    resumed.source.load_state_dict(run.source.state_dict() | {"rollout": "another's"})
    with pytest.raises(CheckpointError, match="round 0 of the rollouts is not the one"):
        next(resumed.steps())


def test_no_advantage_counts_in_the_steps_of_the_values_warm_up(tmp_path: Path) -> None:
    run = begun(tmp_path, "ppo", value={"warm_up_steps": 2})
    steps, are_zero = run.steps(), list[bool]()
    for _ in range(4):
        batches = next(steps)
        are_zero.append(all(float(batch.advantages.abs().max()) == 0 for batch in batches))
        assert all(float(batch.returns.abs().max()) > 0 for batch in batches)
        run.source.after_step(QUIET)
    assert are_zero == [True, True, False, False]


def test_the_last_round_ends_with_its_steps_where_it_learns_less_than_was_planned(tmp_path: Path) -> None:
    """8 prompts are 4 minibatches; those whose only response was cut at its limit are left out."""
    run = begun(tmp_path, "reinforce", steps=None, drop=["unfinished"])
    assert run.source.num_steps == 4
    told = [run.source.after_step(QUIET) for _ in run.steps()]
    kept = 8 * told[0]["rollout/finished"]
    assert kept <= 6 and run.source.num_steps == len(told) == math.ceil(kept / 2) > 0
