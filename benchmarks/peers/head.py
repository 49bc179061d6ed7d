"""Log-probabilities over a vocabulary, forward and backward: `head.py JOB RESULT`, in the peers' environment.

The job names the way: plain (torch's log_softmax over all logits) or fused (TRL's autograd function).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from head_case import measure


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None])[:, 0]


def fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    form = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())  # temperature 1, no cap, nothing besides log-probs
    return _ChunkedLogProbFunction.apply(hidden, weight, None, targets, *form)[0]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(measure(job, {"plain": plain, "fused": fused}[job["way"]])))
