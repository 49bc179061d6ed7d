"""Policies under a known reward: the best there is under a price of the KL, which policy gradients must come to, and
where learning the best of one's own samples ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fairlead.conformance import optimum
from fairlead.conformance.case import Case, Found, prompts
from fairlead.conformance.tasks import Task

TREE = Task("abcd", 2, ("a b", "b c", "c d"), seed=2)
DEEP = replace(TREE, layers=2)
BETA = 1.0
"""Price of a nat of KL."""
GAIN = "share of the gain missed"


def missed_gain(found: Found) -> float:
    """Of E r - beta KL: how much of what there is to gain over the start is not gained."""
    rewards, start = found.task.rewards, found.before
    reached, began, best = (
        optimum.objective(policy, start, rewards, BETA)
        for policy in (found.after, start, optimum.tilted(start, rewards, BETA))
    )
    return (best - reached) / (best - began)


def apart_from_best_of(number: int) -> Callable[[Found], float]:
    """KL(what is the best of ``number`` samples of the start, policy)."""
    return lambda found: optimum.kl(optimum.best_of(found.before, found.task.rewards, number), found.after)


def top_share(rewards: Tensor, percentile: float) -> Tensor:
    """log-probabilities of all responses that score at the percentile of their prompt's or above, each as likely."""
    kept = rewards >= rewards.quantile(percentile, -1, keepdim=True)
    return torch.where(kept, 0.0, -torch.inf).log_softmax(-1)


def apart_from_top(percentile: float) -> Callable[[Found], float]:
    """KL(equal shares of what scores at the percentile or above, policy)."""
    return lambda found: optimum.kl(top_share(found.task.rewards, percentile), found.after)


def _given(algorithm: str, copies: int, rate: float, steps: int, **own: Any) -> dict[str, Any]:
    shared = {"max_new_tokens": TREE.length, "temperature": 1.0, "rollout_size": "all", "rollout_rows": 512}
    return {
        "optim.learning_rate": rate,
        "train.steps": steps,
        "train.batch_size": copies * len(TREE.prompts),
        "train.micro_batch_tokens": 8192,
        **{f"{algorithm}.{name}": value for name, value in (shared | own).items()},
    }


def policy_cases() -> Iterable[Case]:
    yield from _priced_cases()
    yield from _ranked_cases()


def _priced_cases() -> Iterator[Case]:
    """The best there is under the price of a nat of KL."""
    one, price = {"kl_coef": BETA, "loss_over": "constant"}, {"kl_in": "reward", "kl_estimator": "k1"}
    several = one | {"num_samples": 4}
    table: dict[str, tuple[int, dict[str, Any]]] = {
        "ppo": (128, _given("ppo", 128, 1e-3, 400, **one, gae_lambda=1.0, epochs=2, value={"trunk": "model"})),
        "rloo": (32, _given("rloo", 32, 2e-3, 300, **several)),
        "grpo": (32, _given("grpo", 32, 2e-3, 300, **several, **price, scale="none")),
        "reinforce": (128, _given("reinforce", 128, 1e-3, 900, **one)),
    }
    told = "ref exp(r / beta)"
    for name, (copies, settings) in table.items():
        rows = prompts(TREE, copies)
        yield Case(name, name, TREE, settings, rows, missed_gain, GAIN, 1e-2, told, TREE.reward)


def _ranked_cases() -> Iterator[Case]:
    """What is learned of one's own samples."""
    number, measure = 4, "KL(those, policy)"
    given: dict[str, Any] = {"plateau": None, "num_samples": number, "discard": []}
    for name, rounds, copies in (("raft-once", 1, 4096), ("raft-five", 5, 2048)):
        batches = copies // 341
        settings = _given("raft", copies, 3e-3, 20 * batches * rounds, **given, epochs=20)
        settings["train.batch_size"] = copies * len(DEEP.prompts) // batches
        near, told = apart_from_best_of(number**rounds), f"the best of {number**rounds} samples of the start"
        yield Case(name, "raft", DEEP, settings, prompts(DEEP, copies), near, measure, 1e-2, told, DEEP.reward)
    percentile = 0.78  # between two of the 21 responses
    own = {
        "discard": [],
        "temperature": 6.0,
        "num_samples": 32,
        "epochs": 400,
        "start_percentile": percentile,
        "end_percentile": percentile,
    }
    settings = _given("rft", 128, 3e-3, 400, **own)

    told = "all responses of the upper 22 %, each as likely"
    yield Case(
        "rft", "rft", DEEP, settings, prompts(DEEP, 128), apart_from_top(percentile), measure, 1e-2, told, DEEP.reward
    )
