import math

import pytest
import torch

from fairlead.ops.policy import clipped_surrogate, clipped_value_loss, is_clipped, sequence_ratio, token_ratio


def test_at_ratio_one_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    """d/dz of -A log softmax(z)[a] is A (p - onehot(a)): Williams 1992."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.tensor([0, 5, 2, 2]), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    logprobs = logits.log_softmax(1)[torch.arange(4), actions]
    ratio = token_ratio(logprobs, logprobs.detach())
    loss = clipped_surrogate(ratio, advantages, 0.2, 0.2)
    torch.testing.assert_close(loss.detach(), -advantages)
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    wanted = advantages[:, None] * (logits.detach().softmax(1) - torch.eye(6, dtype=torch.float64)[actions])
    torch.testing.assert_close(gradient, wanted)
    assert not is_clipped(ratio, advantages, 0.2, 0.2).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.5, 1.0, -1.2, 0.0, True),  # already far enough up
        (1.5, -1.0, 1.5, 1.5, False),  # too likely for a bad token: pulled back in full
        (0.5, 1.0, -0.5, -0.5, False),  # too unlikely for a good token: pulled up in full
        (0.5, -1.0, 0.8, 0.0, True),  # already far enough down
        (1.1, 2.0, -2.2, -2.2, False),
        (0.9, -2.0, 1.8, 1.8, False),
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_the_surrogate_is_clipped_where_clipping_lowers_the_gain(
    ratio: float, advantage: float, loss: float, slope: float, clipped: bool
) -> None:
    """With r = exp(logprob - behaviour) the unclipped branch -r A has the slope -r A in the log-probability."""
    behaviour = torch.tensor(-1.3, dtype=torch.float64)
    logprob = (behaviour + math.log(ratio)).requires_grad_(True)
    advantages = torch.tensor(advantage, dtype=torch.float64)
    moved = token_ratio(logprob, behaviour)
    value = clipped_surrogate(moved, advantages, 0.2, 0.2)
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value, logprob)[0].item() == pytest.approx(slope)
    assert bool(is_clipped(moved, advantages, 0.2, 0.2)) is clipped


@pytest.mark.parametrize(
    ("value", "target", "clip", "loss", "slope"),
    [
        (1.5, 2.0, 0.2, 0.32, 0.0),  # towards the target, but past the clip: the clipped value 1.2 is the worse one
        (1.5, 0.0, 0.2, 1.125, 1.5),  # away from the target: the true value is the worse one
        (0.5, 2.0, 0.2, 1.125, -1.5),
        (0.5, 0.0, 0.2, 0.32, 0.0),  # clipped to 0.8
        (1.1, 2.0, 0.2, 0.405, -0.9),  # inside the clip both agree
        (1.5, 2.0, None, 0.125, -0.5),
    ],
)
def test_the_value_loss_is_the_worse_of_the_true_and_the_clipped_value(
    value: float, target: float, clip: float | None, loss: float, slope: float
) -> None:
    """The old value is 1."""
    values = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor(1.0, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)
    result = clipped_value_loss(values, old, returns, value_clip_range=clip)
    assert result.item() == pytest.approx(loss)
    assert torch.autograd.grad(result, values)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "dual", "loss", "clipped"),
    [
        (1.25, 1.0, 0.2, 0.28, None, -1.25, False),  # clip-higher lets it go on up
        (1.5, 1.0, 0.2, 0.28, None, -1.28, True),
        (0.7, -1.0, 0.2, 0.28, None, 0.8, True),
        (9.0, -1.0, 0.2, 0.2, None, 9.0, False),  # a bad token grown likely: without a second clip it weighs 9
        (9.0, -1.0, 0.2, 0.2, 3.0, 3.0, True),
        (9.0, 1.0, 0.2, 0.2, 3.0, -1.2, True),
        (9.0, -1.0, 1.0, math.inf, None, 9.0, False),  # nothing is clipped
        (9.0, 1.0, 1.0, math.inf, None, -9.0, False),
    ],
)
def test_the_ranges_above_and_below_and_the_second_clip(
    ratio: float, advantage: float, low: float, high: float, dual: float | None, loss: float, clipped: bool
) -> None:
    given = torch.tensor(ratio, dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)
    assert clipped_surrogate(*given, low, high, dual_clip=dual).item() == pytest.approx(loss)
    assert bool(is_clipped(*given, low, high, dual_clip=dual)) is clipped


def test_the_ratio_of_a_sequence_is_the_geometric_mean_with_each_tokens_own_gradient() -> None:
    new = torch.tensor([[-1.0, -2.0, -0.5, 0.0, -3.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.5, -1.0, -0.5, 0.0, -2.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, True]])
    owner = torch.tensor([[0, 0, 0, -1, 1]])
    ratio = sequence_ratio(new, old, mask, owner, 2)
    first, second = math.exp((0.5 - 1.0 + 0.0) / 3), math.exp(-1.0)
    assert ratio[0].tolist() == pytest.approx([first, first, first, 1.0, second])
    torch.autograd.backward(ratio, torch.tensor([[2.0, 3.0, 5.0, 7.0, 1.0]], dtype=torch.float64))
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([2 * first, 3 * first, 5 * first, 0.0, second])
