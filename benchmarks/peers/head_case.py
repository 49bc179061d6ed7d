"""One way of the log-prob head measured alone in its process; both environments run this. Needs torch only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def measure(job: dict[str, Any], head: Head) -> dict[str, Any]:
    """Seconds of each call but the first, MB above what lay there before, and sums to compare results by."""
    torch.manual_seed(0)
    hidden = torch.randn(job["rows"], job["hidden_size"], requires_grad=True)
    weight = torch.randn(job["vocabulary"], job["hidden_size"]).mul_(0.05).requires_grad_()
    targets, pull = torch.randint(job["vocabulary"], (job["rows"],)), torch.randn(job["rows"])
    head(hidden[:8], weight, targets[:8]).sum().backward()  # libraries are loaded, threads begun
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, seconds = memory("VmRSS"), list[float]()
    for _ in range(job["calls"] + 1):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        logprobs = head(hidden, weight, targets)
        logprobs.backward(pull)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "memory": memory("VmHWM") - before,
        "facts": [float(x.double().norm()) for x in (logprobs.detach(), hidden.grad, weight.grad)],
        "versions": {"torch": version("torch")},
    }


def memory(name: str) -> float:
    """A field of /proc/self/status in MB."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024 / 1e6
