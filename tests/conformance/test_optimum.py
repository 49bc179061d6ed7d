"""The other opinion itself: enumeration token by token, a closed form against a search over the published loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from fairlead.conformance import optimum
from fairlead.conformance.tasks import Task

TASK = Task("ab", 2, ("a", "b"), seed=3)


def test_every_response_is_there_once_and_their_probabilities_sum_to_one() -> None:
    assert len(TASK.responses) == len(set(TASK.responses)) == len(set(TASK.texts)) == 1 + 2 + 4
    total = TASK.enumerated(TASK.model().double()).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), atol=1e-9, rtol=0)


@torch.no_grad()
def test_a_response_has_the_probability_of_its_tokens_one_by_one() -> None:
    model = TASK.model().double().eval()
    found = TASK.enumerated(model)
    for at in (0, 1, 5):
        ids, wanted = [1], 0.0  # the prompt "a"
        for token in TASK.responses[at]:
            wanted += float(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
            ids.append(token)
        assert float(found[0, at]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_the_sigmoid_loss_is_smallest_where_it_is_said_to_end(p: float) -> None:
    d = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    log_s = torch.nn.functional.logsigmoid
    loss = -p * log_s(0.5 * d) - (1 - p) * log_s(-0.5 * d)
    assert optimum.sigmoid(p, 0.5) == pytest.approx(float(d[loss.argmin()]), abs=1e-4)


def ls(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.logsigmoid(x)


B, E = 0.5, 0.05
DIFFERENCE: dict[str, tuple[Callable[[float], float], Callable[[torch.Tensor], torch.Tensor]]] = {
    "smoothed": (lambda p: optimum.sigmoid(p, B, E), lambda d: -(1 - E) * ls(B * d) - E * ls(-B * d)),
    "robust": (lambda p: optimum.robust(p, B, E), lambda d: (-(1 - E) * ls(B * d) + E * ls(-B * d)) / (1 - 2 * E)),
    "ipo": (lambda p: optimum.ipo(p, B), lambda d: (d - 1 / (2 * B)) ** 2),
    "hinge": (lambda p: optimum.hinge(p, B), lambda d: (1 - B * d).clamp(min=0)),
    "exo": (
        lambda p: optimum.exo(p, B, E),
        lambda d: (
            torch.sigmoid(B * d) * (ls(B * d) - math.log(1 - E)) + torch.sigmoid(-B * d) * (ls(-B * d) - math.log(E))
        ),
    ),
    "simpo": (lambda p: optimum.simpo(p, 2.0, 0.5), lambda d: -ls(2.0 * d - 0.5)),
}
"""Of a difference: what it is said to end at, and the loss of a pair."""


@pytest.mark.parametrize("name", DIFFERENCE)
@pytest.mark.parametrize("p", [0.2, 0.4, 0.9])
def test_a_loss_of_the_difference_is_smallest_where_it_is_said_to_end(name: str, p: float) -> None:
    said, loss = DIFFERENCE[name]
    d = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    expected = p * loss(d) + (1 - p) * loss(-d)
    assert said(p) == pytest.approx(float(d[expected.argmin()]), abs=2e-4)


APART: dict[str, tuple[Callable[[float], float], Callable[..., torch.Tensor]]] = {
    "nca": (lambda p: optimum.nca(p, B), lambda c, r: -ls(B * c) - (ls(-B * c) + ls(-B * r)) / 2),
    "bco": (lambda p: optimum.apart_bco(p, B), lambda c, r: -ls(B * c) - ls(-B * r)),
    "sppo": (lambda p: optimum.sppo(p, B), lambda c, r: (c - 1 / (2 * B)) ** 2 + (r + 1 / (2 * B)) ** 2),
    "cal": (lambda p: optimum.cal(p, B), lambda c, r: -ls(c - r) + (c - 1 / (2 * B)) ** 2 + (r + 1 / (2 * B)) ** 2),
}
"""Of both log-ratios."""


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("p", [0.2, 0.9])
def test_a_loss_of_both_responses_is_smallest_where_it_is_said_to_end(name: str, p: float) -> None:
    said, loss = APART[name]
    grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    first, second = grid[:, None], grid[None]
    expected = p * loss(first, second) + (1 - p) * loss(second, first)
    row, column = divmod(int(expected.argmin()), len(grid))
    assert said(p) == pytest.approx(float(grid[row] - grid[column]), abs=2e-2)


def test_orpo_ends_where_its_likelihood_and_odds_are_least_together() -> None:
    q = torch.linspace(1e-4, 1 - 1e-4, 100_001, dtype=torch.float64)
    p, weight, lengths = 0.7, 0.5, (2, 3)
    means = [q.log() / lengths[0], (1 - q).log() / lengths[1]]
    ratio = (means[0] - (1 - means[0].exp()).log()) - (means[1] - (1 - means[1].exp()).log())
    loss = -(p * q.log() + (1 - p) * (1 - q).log()) / 2.3 - weight * (p * ls(ratio) + (1 - p) * ls(-ratio))
    assert optimum.orpo(p, weight, lengths, 2.3) == pytest.approx(float(q[loss.argmin()]), abs=1e-4)


def test_the_tilted_reference_beats_every_other_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    best = optimum.tilted(reference, rewards, 0.5)
    reached = optimum.objective(best, reference, rewards, 0.5)
    for _ in range(50):
        other = (best + 0.3 * torch.randn(2, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
        assert optimum.objective(other, reference, rewards, 0.5) < reached
    whole = 0.5 * (reference + rewards / 0.5).logsumexp(-1).mean()  # beta log Z, Rafailov et al. 2023, appendix A.1
    assert reached == pytest.approx(float(whole))


def test_the_best_of_three_is_counted_as_enumeration_counts_it() -> None:
    policy = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    wanted = torch.zeros(3, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=3):
        best = max(drawn, key=lambda i: float(rewards[0, i]))
        wanted[best] += math.prod(float(policy[0, i]) for i in drawn)
    torch.testing.assert_close(optimum.best_of(policy.log(), rewards, 3)[0].exp(), wanted)
