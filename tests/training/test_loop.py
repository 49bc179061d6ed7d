"""What the loop refuses before anything is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fairlead.algorithms.terms import nll
from fairlead.data.pack import token_batch
from fairlead.errors import TrainingError
from fairlead.training.loop import backward
from fairlead.types import Pass, Term
from tests.tiny import TREES, models

PASSES = (Pass("policy", (Term("nll", "token", nll),), frozenset({"logprobs"})),)


def test_a_batch_in_which_every_token_is_masked_is_refused_by_name() -> None:
    batch = token_batch(TREES, packed=True, pad_id=0)
    masked = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), counts={**batch.counts, "token": 0.0})
    made = models(("policy",))
    with pytest.raises(TrainingError, match=r"step 7: .*nothing to learn from \(no token counts\)"):
        backward(made, PASSES, [masked], step=7)
    assert backward(made, PASSES, [masked, batch])["loss"] > 0
