"""The other opinion itself: enumeration token by token, a closed form against a search over the published loss."""

from __future__ import annotations

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
