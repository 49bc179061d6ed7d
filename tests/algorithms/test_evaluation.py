"""What an evaluation on held-out prompts measures, against exact figures of a task that can be enumerated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fairlead.algorithms.online import evaluation
from fairlead.conformance.case import prompts
from fairlead.conformance.staged import staged
from fairlead.conformance.tasks import Task

TASK = Task("ab", 2, ("a b", "b a"), seed=5)


def test_the_kl_and_the_score_are_those_of_the_policy_that_answers(tmp_path: Path) -> None:
    """2,000 responses a prompt against sums over all of them."""
    given = {
        "train.steps": 1,
        "ppo.max_new_tokens": TASK.length,
        "ppo.rollout_rows": 4096,
        "ppo.eval_prompts": list(TASK.prompts),
        "ppo.eval_samples": 2000,
    }
    run = staged(TASK, "ppo", given, prompts(TASK), tmp_path, reward=TASK.reward)
    with torch.no_grad():
        before = TASK.enumerated(run.model)
        run.move()
        after = TASK.enumerated(run.model)
    found, share = evaluation(run.stage)(), after.exp()
    kl, score = ((share * each).sum(1).mean() for each in (after - before, TASK.rewards))
    assert found["eval/kl"] == pytest.approx(float(kl), abs=0.1) and float(kl) > 0.3
    assert found["eval/score"] == pytest.approx(float(score), abs=2 * found["eval/score_margin"])
