"""Loss terms that several algorithms share."""

from __future__ import annotations

from torch import Tensor

from fairlead.types import Metrics, Outputs, TokenBatch


def nll(outputs: Outputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the counted tokens, summed; unit ``token``."""
    return -outputs.logprobs.sum(), {}
