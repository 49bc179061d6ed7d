"""Sampled gradients of policy optimisation against the exact one, which enumeration gives: their mean over many rounds
of the real source, through the real passes, with intervals.

The mean is written in the exact gradients of the prompts: a coefficient of 1 for each is no bias. An estimator that is
right has all intervals over 0; one that is known to be wrong is shown to be, with the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.conformance.case import prompts
from fairlead.conformance.staged import Staged, staged
from fairlead.conformance.tasks import Task
from fairlead.ops.kl import k1, k2, k3
from fairlead.ops.masked import masked_sum
from fairlead.types import Outputs, Pass, RolloutBatch

ONE = Task("abcdef", 1, ("a b", "b c", "c d"), seed=4)
TREE = Task("abc", 2, ("a b", "b c", "c a"), seed=5)
UNEVEN = (0.3, 1.0, 3.0)
"""What the rewards of each prompt are multiplied with: a spread of its own."""
PRICE = 0.5
COPIES, SAMPLES, ROUNDS = 16, 8, 24
WIDE = 3.29
"""Standard errors on each side of an interval: 99.9 %, since many are looked at."""


@dataclass(frozen=True, slots=True)
class Estimator:
    name: str
    algorithm: str
    task: Task
    settings: Mapping[str, Any]
    why: str
    unbiased: bool = True
    rewarded: bool = True
    """False: the reward is zero, so that the KL alone is descended."""
    plain: Callable[[Tensor, Tensor], Tensor] | None = None
    """An estimator of the KL put into the loss as it stands, which no setting does."""
    rounds: int = ROUNDS


def _whole(**more: Any) -> dict[str, Any]:
    return {"loss_over": "constant", "kl_coef": PRICE, **more}


def _grpo(**more: Any) -> dict[str, Any]:
    return _whole(**{"scale": "none", **more})


def _ppo() -> dict[str, Any]:
    return _whole(gae_lambda=1.0, whiten_advantages=False, value={"trunk": "model"})


DEEPER = "the same; two tokens"
OWN = "mean of the group, a response's own reward in it: (K - 1) / K"

ESTIMATORS: dict[str, Estimator] = {
    each.name: each
    for each in (
        Estimator("rloo", "rloo", TREE, _whole(), "leave-one-out baseline, k1 in the reward"),
        Estimator("ppo", "ppo", TREE, _ppo(), "learned baseline, GAE with lambda 1, k1 in the reward"),
        Estimator("grpo-whole-kl", "grpo", ONE, _grpo(), "k3 in the loss, weighted; one token", rewarded=False),
        Estimator("k2-plain", "grpo", ONE, _grpo(), "k2 as a loss", rewarded=False, plain=k2),
        Estimator("grpo-tree-kl", "grpo", TREE, _grpo(), DEEPER, unbiased=False, rewarded=False, rounds=72),
        Estimator("grpo-mean", "grpo", TREE, _grpo(kl_in="reward", kl_estimator="k1"), OWN, unbiased=False),
        Estimator(
            "grpo-std", "grpo", TREE, _grpo(scale="group", kl_coef=0.0), "divided by the group's std", unbiased=False
        ),
        Estimator("k1-plain", "grpo", ONE, _grpo(), "k1 as a loss", unbiased=False, rewarded=False, plain=k1),
        Estimator("k3-plain", "grpo", ONE, _grpo(), "k3 as a loss", unbiased=False, rewarded=False, plain=k3),
    )
}


def bias(name: str, folder: Path, rounds: int | None = None) -> dict[str, Any]:
    """A row: the relative bias along the exact gradient, with its interval."""
    each = ESTIMATORS[name]
    rounds = rounds or each.rounds
    run = _staged(each, folder, rounds)
    exact = _exact(each, run) / len(each.task.prompts)
    inverse = torch.linalg.pinv(exact.T)
    whole = exact.sum(0)
    found: list[Tensor] = []
    for step in run.steps():
        gradient = _flat(run, run.gradients(step))
        along = gradient @ whole / (whole @ whole)
        found.append(torch.cat([inverse @ gradient, along[None]]))
    values = torch.stack(found) - 1
    mean, error = values.mean(0), WIDE * values.std(0) / math.sqrt(len(values))
    inside = mean.abs() <= error
    return {
        "case": name,
        "algorithm": each.algorithm,
        "task": f"{len(each.task.prompts)} x {len(each.task.responses)}",
        "estimator": each.why,
        "known": "unbiased" if each.unbiased else "biased",
        "bias": float(mean[-1]),
        "low": float(mean[-1] - error[-1]),
        "high": float(mean[-1] + error[-1]),
        "responses": rounds * len(each.task.prompts) * COPIES * SAMPLES,
        "pass": bool(inside.all()) if each.unbiased else not bool(inside[-1]),
    }


def _staged(each: Estimator, folder: Path, rounds: int) -> Staged:
    task, name = each.task, each.algorithm
    given = {"num_samples": SAMPLES, "max_new_tokens": task.length, "rollout_size": "all", "rollout_rows": 512}
    own = {f"{name}.{key}": value for key, value in {**given, "epochs": 1, **each.settings}.items()}
    train = {"train.batch_size": COPIES * len(task.prompts), "train.steps": rounds}
    factors = dict(zip(task.prompts, UNEVEN, strict=True))

    def reward(prompts: list[str], outputs: list[str], **_: object) -> list[float]:
        values = task.reward(prompts, outputs)
        return [v * factors[p.strip()] * each.rewarded for v, p in zip(values, prompts, strict=True)]

    run = staged(task, name, own | train, prompts(task, COPIES), folder, reward=reward)
    run.move()
    if each.plain is not None:
        run.passes = tuple(_plainly(p, each.plain, task.length) for p in run.passes)
    return run


def _plainly(each: Pass, estimator: Callable[[Tensor, Tensor], Tensor], length: int) -> Pass:
    """The pass with another estimator in the place of its KL."""

    def term(outputs: Outputs, batch: RolloutBatch) -> tuple[Tensor, dict[str, Any]]:
        assert batch.reference_logprobs is not None
        kl = estimator(outputs.logprobs, batch.reference_logprobs)
        return masked_sum(kl, batch.loss_mask) / length, {}

    return replace(each, terms=tuple(replace(t, fn=term) if t.name == "kl" else t for t in each.terms))


def _flat(run: Staged, gradients: Mapping[str, Tensor]) -> Tensor:
    """Of the policy's own weights, as `_exact` has them."""
    names = {id(p): name for name, p in run.stage.models.trainable.items()}
    return torch.cat([gradients[names[id(p)]].flatten() for p in run.model.parameters()])


def _exact(each: Estimator, run: Staged) -> Tensor:
    """Minus the gradient of E r - beta KL of each prompt, divided by the length as the loss is [P, weights]."""
    task, kl_coef = each.task, each.settings["kl_coef"]
    reference = task.enumerated(task.model("opt").double())
    policy = task.enumerated(run.model)
    factors = torch.tensor(UNEVEN, dtype=torch.float64)[:, None] * each.rewarded
    value = policy.exp() * (task.rewards * factors - kl_coef * (policy - reference.detach()))
    weights = list(run.model.parameters())
    rows: list[Tensor] = []
    for of_prompt in value:
        gradient = torch.autograd.grad(-of_prompt.sum() / task.length, weights, retain_graph=True)
        rows.append(torch.cat([each.flatten() for each in gradient]))
    return torch.stack(rows)
