"""Two responses to each prompt, preferred in known shares: where losses of preferences end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fairlead.conformance import optimum
from fairlead.conformance.case import KL, Case, Found, Rows
from fairlead.conformance.tasks import Task

PAIRS = Task("abcdef", 3, ("a b", "b c", "c d", "d e", "e f"))
FIRST, SECOND = "a", "b c"
COPIES = 10
SHARES = (0.7, 0.9, 0.4, 0.5, 0.2)
"""In which the first response is preferred, by prompt."""
ROWS = COPIES * len(SHARES)
BETA = 0.5


def pair_rows(kind: str = "pairs") -> Rows:
    """Each prompt 10 times, the first response preferred in its share: the population in small."""
    found: Rows = []
    for prompt, share in zip(PAIRS.prompts, SHARES, strict=True):
        for number in range(COPIES):
            first = number < round(COPIES * share)
            won, lost = (FIRST, SECOND) if first else (SECOND, FIRST)
            if kind == "pairs":
                found.append({"prompt": prompt, "chosen": won, "rejected": lost})
            else:
                found += [
                    {"prompt": prompt, "completion": won, "label": True},
                    {"prompt": prompt, "completion": lost, "label": False},
                ]
    return found


def of_two(table: Tensor) -> Tensor:
    """The columns of the two responses [P, 2]."""
    return table[:, [PAIRS.at(FIRST), PAIRS.at(SECOND)]]


def differences(wanted: Callable[[float], float]) -> Callable[[Found], float]:
    """KL between the two responses' shares and those that d = ``wanted(p)`` gives."""

    def distance(found: Found) -> float:
        start, after = of_two(found.before), of_two(found.after)
        best = start[:, 0] - start[:, 1] + torch.tensor([wanted(p) for p in SHARES], dtype=torch.float64)
        odds = torch.stack([after[:, 0] - after[:, 1], best])
        one, other = (torch.stack([each, torch.zeros_like(each)], 1).log_softmax(1) for each in odds)
        return optimum.kl(one, other)

    return distance


def score_difference(found: Found) -> float:
    got = of_two(found.after)
    wanted = torch.tensor([optimum.logit(p) for p in SHARES], dtype=torch.float64)
    return float((got[:, 0] - got[:, 1] - wanted).abs().max())


FIT = {
    "optim.learning_rate": 1e-2,
    "train.batch_size": ROWS,
    "train.steps": 120,
    "train.micro_batch_tokens": 256,
    "data.packing": "none",
}
"""Full batches in several micro-batches, padded but where a case says otherwise."""


def pair_cases() -> Iterable[Case]:
    given = FIT | {"dpo.beta": BETA, "data.packing": "best-fit"}
    near = differences(lambda p: optimum.sigmoid(p, BETA))
    yield Case("dpo-sigmoid", "dpo", PAIRS, given, pair_rows(), near, KL, 1e-3, "beta d = log odds")
    given, near = FIT | {"bco.beta": 1.0, "train.batch_size": 2 * ROWS}, differences(lambda p: 2 * optimum.logit(p))
    yield Case("bco", "bco", PAIRS, given, pair_rows("labels"), near, KL, 1e-3, "h - shift = log odds of good")
    error, told = "largest error of a score", "difference = log odds"
    yield Case("reward-pairs", "reward", PAIRS, FIT, pair_rows(), score_difference, error, 1e-2, told)
