import math

import pytest
import torch
from torch import Tensor

from fairlead.ops.masked import masked_sum, sequence_sums, whiten

MASK = torch.tensor([[True, True, False], [False, True, False]])


@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan, math.inf, -math.inf])
def test_what_stands_off_the_mask_does_not_matter(padding: float) -> None:
    """Counted: 1, 2, 6. Mean 3, variance (4 + 1 + 9) / 3."""
    values = torch.tensor([[1.0, 2.0, padding], [padding, 6.0, padding]], dtype=torch.float64)
    assert masked_sum(values, MASK).item() == 9.0
    sigma = math.sqrt(14 / 3)
    wanted = [[-2 / sigma, -1 / sigma, 0.0], [0.0, 3 / sigma, 0.0]]
    torch.testing.assert_close(whiten(values, MASK), torch.tensor(wanted, dtype=torch.float64))
    wanted = [[1 / sigma, 2 / sigma, 0.0], [0.0, 6 / sigma, 0.0]]
    torch.testing.assert_close(whiten(values, MASK, center=False), torch.tensor(wanted, dtype=torch.float64))
    ids = torch.tensor([[0, 0, -1], [-1, 1, -1]])
    assert sequence_sums(values, MASK, ids, 2).tolist() == [3.0, 6.0]


def test_no_gradient_comes_from_off_the_mask() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [math.inf, 6.0, 0.0]], requires_grad=True)
    assert torch.autograd.grad(masked_sum(values, MASK), values)[0].tolist() == [[1, 1, 0], [0, 1, 0]]
    ids = torch.tensor([[0, 1, -1], [-1, 1, -1]])
    sums = sequence_sums(values, MASK, ids, 2)
    assert torch.autograd.grad((sums * torch.tensor([3.0, 5.0])).sum(), values)[0].tolist() == [[3, 5, 0], [0, 5, 0]]


def test_whitened_values_have_mean_zero_and_variance_one_over_the_mask_alone() -> None:
    values = torch.randn(8, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 30 + 200
    mask = torch.rand(8, 50, generator=torch.Generator().manual_seed(2)) < 0.5
    white = whiten(values, mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-13)
    assert white[mask].var(correction=0).item() == pytest.approx(1.0, rel=1e-13)
    assert not white[~mask].any()
    scaled = whiten(values, mask, center=False)[mask]
    assert scaled.var(correction=0).item() == pytest.approx(1.0, rel=1e-13)
    assert scaled.mean().item() == pytest.approx((values[mask].mean() / values[mask].std(correction=0)).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1.1, 33.3, 1000.1, 1e6 / 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (10, 33)])
def test_values_all_alike_are_not_blown_up(shape: tuple[int, int], value: float, dtype: torch.dtype) -> None:
    """Their mean may miss them by a rounding, which is no spread to divide by."""
    values, mask = torch.full(shape, value, dtype=dtype), torch.ones(shape, dtype=torch.bool)
    assert whiten(values, mask).abs().max().item() <= 1e-5 * max(1.0, abs(value))
    assert torch.equal(whiten(values, mask, center=False), values)


def test_a_real_spread_is_whitened_however_small_or_far_from_zero() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    for shift, spread in [(0.0, 1e-3), (100.0, 0.01), (1000.0, 1.0)]:
        values = torch.tensor([[shift - spread, shift + spread, shift - spread, shift + spread]])
        torch.testing.assert_close(whiten(values, mask), torch.tensor([[-1.0, 1, -1, 1]]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("counted", [[], [4]])
def test_a_mask_of_fewer_than_two_tokens_gives_zeros(counted: list[int]) -> None:
    values, mask = torch.arange(6.0).view(2, 3), torch.zeros(6, dtype=torch.bool)
    mask[counted] = True
    assert not whiten(values, mask.view(2, 3)).any()


def test_sums_of_sequences_follow_their_ids_wherever_the_tokens_stand() -> None:
    """Rows hold runs of several sequences; sequence 2 has no counted token; padding is -1."""
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    ids = torch.tensor([[1, 1, 0, -1], [0, 3, 3, 2]])
    mask = torch.tensor([[True, True, True, False], [True, False, True, False]])
    sums: Tensor = sequence_sums(values, mask, ids, 4)
    assert sums.tolist() == [20.0, 3.0, 0.0, 64.0]
