"""Two responses to each prompt, preferred in known shares: where losses of preferences end. And five responses, each
compared with each, as often as a Bradley-Terry model says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fairlead.conformance import optimum
from fairlead.conformance.case import KL, Case, Found, Rows
from fairlead.conformance.tasks import Task

PAIRS = Task("abcdef", 3, ("a b", "b c", "c d", "d a", "a c"))
FIRST, SECOND = "e", "f e"
LENGTHS = (2, 3)
"""Their tokens, ends counted."""
COPIES = 20
SHARES = (0.7, 0.9, 0.4, 0.5, 0.2)
"""In which the first response is preferred, by prompt."""
ROWS = COPIES * len(SHARES)
BETA = 0.5

COMPLETE = Task("abcdefg", 2, ("f g", "g f", "g g"), levels=(0.0, 0.6931471805599453, 1.3862943611198906), seed=1)
"""Of its responses of one word five are compared with each other; each has the strength 1, 2 or 4."""
BOUTS = 30
"""In which the stronger wins in whole numbers: 15, 20 or 24 of them."""


def pair_rows(kind: str = "pairs") -> Rows:
    """Each prompt 20 times, the first response preferred in its share: the population in small."""
    found: Rows = []
    for prompt, share in zip(PAIRS.prompts, SHARES, strict=True):
        for number in range(COPIES):
            first = number < round(COPIES * share)
            won, lost = (FIRST, SECOND) if first else (SECOND, FIRST)
            if kind == "pairs":
                found.append({"prompt": prompt, "chosen": won, "rejected": lost})
            elif kind == "demonstrations":
                found.append({"prompt": prompt, "response": won})
            else:
                found += [
                    {"prompt": prompt, "completion": won, "label": True},
                    {"prompt": prompt, "completion": lost, "label": False},
                ]
    return found


COMPARED = [COMPLETE.at(word) for word in "abcde"]
"""The five responses."""


def complete_rows() -> Rows:
    """All pairs of them, each won in the share that the Bradley-Terry model of the rewards has."""
    found: Rows = []
    for prompt, rewards in zip(COMPLETE.prompts, COMPLETE.rewards, strict=True):
        for one, other in itertools.combinations(COMPARED, 2):
            wins = round(BOUTS * float(torch.sigmoid(rewards[one] - rewards[other])))
            a, b = COMPLETE.texts[one], COMPLETE.texts[other]
            found += wins * [{"prompt": prompt, "chosen": a, "rejected": b}]
            found += (BOUTS - wins) * [{"prompt": prompt, "chosen": b, "rejected": a}]
    return found


# --- distances -----------------------------------------------------------------------------------------------------


def of_two(table: Tensor) -> Tensor:
    """The columns of the two responses [P, 2]."""
    return table[:, [PAIRS.at(FIRST), PAIRS.at(SECOND)]]


Wanted = Callable[[float], float]
"""What a loss ends at where the first response is preferred in a share."""


def _each(wanted: Wanted) -> Tensor:
    return torch.tensor([wanted(p) for p in SHARES], dtype=torch.float64)


def shares_apart(odds: Tensor, wanted: Tensor) -> float:
    """KL between the two responses' shares of which log odds [P] are given."""
    one, other = (torch.stack([each, torch.zeros_like(each)], 1).log_softmax(1) for each in (odds, wanted))
    return optimum.kl(one, other)


def log_ratios(wanted: Wanted) -> Callable[[Found], float]:
    """Against those that d = ``wanted(p)`` gives."""

    def distance(found: Found) -> float:
        start, after = of_two(found.before), of_two(found.after)
        return shares_apart(after[:, 0] - after[:, 1], start[:, 0] - start[:, 1] + _each(wanted))

    return distance


def log_odds(wanted: Wanted, lengths: tuple[int, int] = (1, 1)) -> Callable[[Found], float]:
    """The same without a reference, of log-probabilities divided by ``lengths``: the largest error."""

    def distance(found: Found) -> float:
        after = of_two(found.after) / torch.tensor(lengths)
        return float((after[:, 0] - after[:, 1] - _each(wanted)).abs().max())

    return distance


def whole(wanted: Wanted) -> Callable[[Found], float]:
    """KL from a policy that says the first response in the share ``wanted(p)``, and the second else."""

    def distance(found: Found) -> float:
        shares = _each(wanted)
        return optimum.kl(torch.stack([shares, 1 - shares], 1).log(), of_two(found.after))

    return distance


def complete(found: Found) -> float:
    """Over the responses that are compared, from pi* ~ reference exp(r / beta)."""
    before, after = (table[:, COMPARED].log_softmax(-1) for table in (found.before, found.after))
    return optimum.kl(after, optimum.tilted(before, COMPLETE.rewards[:, COMPARED], BETA))


def scores(found: Found) -> float:
    """The difference of the two scores against the log odds."""
    got = of_two(found.after)
    return float((got[:, 0] - got[:, 1] - _each(optimum.logit)).abs().max())


def good_or_bad(found: Found) -> float:
    """Each score against the log odds of a good response."""
    wanted = torch.stack([_each(optimum.logit), -_each(optimum.logit)], 1)
    return float((of_two(found.after) - wanted).abs().max())


# --- the cases -----------------------------------------------------------------------------------------------------

FIT: dict[str, Any] = {
    "optim.learning_rate": 1e-2,
    "train.batch_size": ROWS,
    "train.steps": 120,
    "train.micro_batch_tokens": 512,
    "data.packing": "none",
}
"""Full batches in several micro-batches, padded but where a case says otherwise."""
PACKED = {"data.packing": "best-fit"}
SMOOTHING = 0.05
"""The label smoothing of those that take it."""


def pair_cases() -> Iterable[Case]:
    yield from _dpo_cases()
    yield from _reference_free()
    yield from _label_cases()


def _dpo_cases() -> Iterator[Case]:
    """The losses of `dpo` that have a fixed point, by name."""
    b, e = BETA, {"dpo.label_smoothing": SMOOTHING}
    table: dict[str, tuple[Wanted, str, dict[str, Any]]] = {
        "sigmoid": (partial(optimum.sigmoid, beta=b), "beta d = log odds", PACKED),
        "sigmoid-smoothed": (partial(optimum.sigmoid, beta=b, e=SMOOTHING), "beta d = log odds of flipped labels", e),
        "robust": (partial(optimum.robust, beta=b, e=SMOOTHING), "beta d = log odds before the flips", e),
        "ipo": (partial(optimum.ipo, beta=b), "d = (2 p - 1) / 2 beta", {}),
        "hinge": (partial(optimum.hinge, beta=b), "beta d = 1 or -1", {"train.steps": 400}),
        "exo": (partial(optimum.exo, beta=b, e=SMOOTHING), "beta d = (2 p - 1) log odds of 1 - e", e),
        "nca": (partial(optimum.nca, beta=b), "beta c = log 2 p", {}),
        "bco": (partial(optimum.apart_bco, beta=1.0), "beta c = log odds", {"dpo.beta": 1.0}),
        "sppo": (partial(optimum.sppo, beta=b), "c = (p - 1/2) / beta", {}),
        "cal": (partial(optimum.cal, beta=b), "d + s(d) = p + (2 p - 1) / beta", {}),
        "discopop": (partial(optimum.discopop, beta=b, tau=1.0), "least expected loss", {"dpo.discopop_tau": 1.0}),
    }
    for name, (wanted, told, more) in table.items():
        loss = name.partition("-")[0]
        settings = FIT | {"dpo.loss": loss, "dpo.beta": b} | more
        yield Case(f"dpo-{name}", "dpo", PAIRS, settings, pair_rows(), log_ratios(wanted), KL, 1e-3, told)
    lora = {"model.adapter": {"rank": 8, "alpha": 16}, "train.steps": 300}
    near = log_ratios(partial(optimum.sigmoid, beta=b))
    settings = FIT | PACKED | {"dpo.beta": b} | lora
    yield Case("dpo-lora", "dpo", PAIRS, settings, pair_rows(), near, KL, 1e-3, "beta d = log odds, by an adapter")
    rows = complete_rows()
    sizes = {"train.batch_size": len(rows), "train.micro_batch_tokens": 8192, "train.steps": 200}
    settings = FIT | PACKED | {"dpo.beta": b} | sizes
    yield Case("dpo-complete", "dpo", COMPLETE, settings, rows, complete, KL, 1e-3, "ref exp(r / beta)")


def _reference_free() -> Iterator[Case]:
    error = "largest error, nats"
    given = FIT | {"cpo.beta": BETA, "cpo.sft_weight": 0.0}
    near, told = log_odds(partial(optimum.sigmoid, beta=BETA)), "beta (c - r) = log odds"
    yield Case("cpo", "cpo", PAIRS, given, pair_rows(), near, error, 1e-2, told)
    given = FIT | {"simpo.beta": 2.0, "simpo.gamma": 0.5}
    near = log_odds(partial(optimum.simpo, beta=2.0, gamma=0.5), LENGTHS)
    yield Case("simpo", "simpo", PAIRS, given, pair_rows(), near, error, 1e-2, "least expected loss, a token")
    weight, shares = 0.5, sum(SHARES) / len(SHARES)
    mean = shares * LENGTHS[0] + (1 - shares) * LENGTHS[1]
    near = whole(partial(optimum.orpo, weight=weight, lengths=LENGTHS, mean_length=mean))
    given = FIT | {"orpo.weight": weight, "train.steps": 300}
    yield Case("orpo", "orpo", PAIRS, given, pair_rows(), near, "KL(optimum, policy)", 1e-3, "least loss")
    given = FIT | {"train.steps": 300}
    near = whole(lambda p: p)
    yield Case(
        "sft", "sft", PAIRS, given, pair_rows("demonstrations"), near, "KL(data, policy)", 1e-3, "the data's shares"
    )


def _label_cases() -> Iterator[Case]:
    given = FIT | {"bco.beta": 1.0, "train.batch_size": 2 * ROWS}
    near, told = log_ratios(partial(optimum.apart_bco, beta=1.0)), "h - shift = log odds of good"
    yield Case("bco", "bco", PAIRS, given, pair_rows("labels"), near, KL, 1e-3, told)
    error, told = "largest error of a score", "difference = log odds"
    yield Case("reward-pairs", "reward", PAIRS, FIT, pair_rows(), scores, error, 1e-2, told)
    given = FIT | {"reward.loss": "binary", "train.batch_size": 2 * ROWS, "train.steps": 200}
    yield Case(
        "reward-binary", "reward", PAIRS, given, pair_rows("labels"), good_or_bad, error, 1e-2, "log odds of good"
    )
