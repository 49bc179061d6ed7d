import math

import pytest
import torch
from torch import Tensor

from fairlead.ops.returns import gae, group_centred, leave_one_out, rewards_to_go, shaped_rewards

NAN = math.nan


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values, lengths; past the ends stands nan."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([1, 6, 3, 5])
    outside = torch.arange(6)[None] >= lengths[:, None]
    return rewards.masked_fill(outside, NAN), values.masked_fill(outside, NAN), lengths


def test_advantages_and_returns_by_hand() -> None:
    """gamma = lambda = 1/2. Deltas: 1 + 0.5 - 0.5 = 1;  2 + 1 - 1 = 2;  4 - 2 = 2.
    Advantages from the end: 2;  2 + 2 / 4 = 2.5;  1 + 2.5 / 4 = 1.625.  Second row: 3 - 1 = 2 alone."""
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, 2.0], [1.0, 9.0, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([3, 1]), gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[1.625, 2.5, 2.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.125, 3.5, 4.0], [3.0, 0.0, 0.0]]


def test_lambda_zero_is_the_error_of_one_step() -> None:
    """r_t + gamma V_{t+1} - V_t: 1 + 0.9 * 3 - 2 and 5 - 3."""
    rewards, values = torch.tensor([[1.0, 5.0]]).double(), torch.tensor([[2.0, 3.0]]).double()
    advantages, _ = gae(rewards, values, torch.tensor([2]), gamma=0.9, gae_lambda=0.0)
    assert advantages[0].tolist() == pytest.approx([1.7, 2.0])


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_lambda_one_is_the_discounted_return_less_the_value(gamma: float) -> None:
    rewards, values, lengths = ragged()
    advantages, returns = gae(rewards, values, lengths, gamma=gamma, gae_lambda=1.0)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            wanted = sum(gamma ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert returns[row, t].item() == pytest.approx(wanted, rel=1e-12)
            assert advantages[row, t].item() == pytest.approx(wanted - values[row, t].item(), rel=1e-12, abs=1e-14)


def test_rows_of_other_lengths_beside_it_do_not_change_a_row_and_padding_is_zero() -> None:
    rewards, values, lengths = ragged()
    together = gae(rewards, values, lengths, gamma=0.97, gae_lambda=0.8)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = gae(rewards[one, :length], values[one, :length], lengths[one], gamma=0.97, gae_lambda=0.8)
        for whole, part in zip(together, alone, strict=True):
            assert whole[row, :length].tolist() == part[0].tolist()
            assert whole[row, length:].tolist() == [0.0] * (6 - length)


def test_the_advantage_is_the_weighted_sum_of_equation_16() -> None:
    rewards, values, lengths = ragged()
    advantages, _ = gae(rewards, values, lengths, gamma=0.95, gae_lambda=0.7)
    for row, length in enumerate(lengths.tolist()):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + 0.95 * v[t + 1] - v[t] for t in range(length)]
        wanted = [sum((0.95 * 0.7) ** k * d for k, d in enumerate(deltas[t:])) for t in range(length)]
        assert advantages[row, :length].tolist() == pytest.approx(wanted, rel=1e-12)


def test_shaped_rewards_are_the_price_of_the_kl_and_the_score_at_the_last_token() -> None:
    scores, kl = torch.tensor([10.0, -4.0]), torch.tensor([[1.0, 2.0, -3.0], [5.0, NAN, NAN]])
    rewards = shaped_rewards(scores, kl, torch.tensor([3, 1]), kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 1.5 + 10.0], [-2.5 - 4.0, 0.0, 0.0]]


def test_the_sum_of_shaped_rewards_is_the_score_less_the_kl_of_the_response() -> None:
    """gamma = lambda = 1: the first token's return is score - kl_coef * KL."""
    scores, kl, lengths = torch.tensor([2.0]).double(), torch.tensor([[0.3, 0.1, 0.2, 9.0]]).double(), torch.tensor([3])
    rewards = shaped_rewards(scores, kl, lengths, kl_coef=0.1)
    _, returns = gae(rewards, torch.zeros_like(kl), lengths, gamma=1.0, gae_lambda=1.0)
    assert returns[0, 0].item() == pytest.approx(2.0 - 0.1 * 0.6)


def test_the_baseline_of_a_response_is_the_mean_of_the_others() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    torch.testing.assert_close(leave_one_out(scores), torch.tensor([[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]))


def test_a_group_is_centred_and_scaled_by_its_own_spread() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [7.1, 7.1, 7.1]])
    torch.testing.assert_close(group_centred(scores, scale=False)[0], torch.tensor([-2.0, -1.0, 3.0]))
    torch.testing.assert_close(group_centred(scores, scale=True)[0], torch.tensor([-2.0, -1.0, 3.0]) / 7**0.5)
    assert group_centred(scores, scale=True)[1].tolist() == [0.0, 0.0, 0.0]


def test_rewards_to_go_are_discounted_from_each_token_on() -> None:
    rewards = torch.tensor([[1.0, 0.0, 4.0], [2.0, 1.0, 0.0]])
    torch.testing.assert_close(rewards_to_go(rewards, gamma=0.5), torch.tensor([[2.0, 2.0, 4.0], [2.5, 1.0, 0.0]]))
    torch.testing.assert_close(rewards_to_go(rewards, gamma=1.0), torch.tensor([[5.0, 4.0, 4.0], [3.0, 1.0, 0.0]]))


def test_a_dense_reward_is_added_token_by_token() -> None:
    scores, kl = torch.tensor([2.0, 1.0]), torch.tensor([[0.5, 0.5], [1.0, 9.0]])
    dense = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    rewards = shaped_rewards(scores, kl, torch.tensor([2, 1]), kl_coef=1.0, dense=dense)
    torch.testing.assert_close(rewards, torch.tensor([[0.5, 3.5], [3.0, 0.0]]))


@pytest.mark.parametrize("number", [3, 5, 7, 11])
@pytest.mark.parametrize("score", [0.1, 0.7, -1.3, 123.4])
def test_scores_that_differ_by_rounding_alone_teach_nothing(score: float, number: int) -> None:
    assert group_centred(torch.full((1, number), score), scale=True).tolist() == [[0.0] * number]
