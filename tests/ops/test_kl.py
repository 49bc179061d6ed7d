import math

import pytest
import torch

from fairlead.ops.kl import k1, k3


def test_both_estimators_by_hand() -> None:
    """Policy 1/2, reference 1/4 and 1: log-ratios ln 2 and -ln 2."""
    policy = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    reference = torch.tensor([0.25, 1.0], dtype=torch.float64).log()
    assert k1(policy, reference).tolist() == pytest.approx([math.log(2), -math.log(2)])
    assert k3(policy, reference).tolist() == pytest.approx([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])


def test_the_mean_of_both_under_the_policy_is_the_divergence() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    divergence = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    for estimator in (k1, k3):
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(divergence, rel=1e-14)


def test_k3_is_never_negative_and_keeps_its_digits_where_the_two_almost_agree() -> None:
    """x^2 / 2 - x^3 / 6 + ... is what exp(-x) - 1 + x is for small x; the naive form has no digit left at 1e-3."""
    x = torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 3.0])
    values = k3(x, torch.zeros(5))
    assert bool((values >= 0).all())
    assert values[[1, 3]].tolist() == pytest.approx([5e-7 + 1e-9 / 6, 5e-7 - 1e-9 / 6], rel=2e-4)
