"""The log-probability head alone, from hidden states, forward and backward, beside plain logits and TRL's fused one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from benchmarks.gpu import device as machine
from benchmarks.gpu.results import Case, rates
from benchmarks.gpu.sizes import SIZES
from torch import Tensor

KINDS = {
    "bf16": (torch.bfloat16, True),
    "bf16, frozen": (torch.bfloat16, False),
    "fp32": (torch.float32, True),
}
"""Type, and whether the weight is trained. Under an adapter it is frozen; where all weights are trained under autocast,
hidden states leave the trunk in fp32, and so the head is asked."""
ON_CPU = {"fp32": (torch.float32, True), "fp32, frozen": (torch.float32, False)}
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def head(job: Mapping[str, Any]) -> Iterator[Callable[[], Case]]:
    on_gpu = job["device"].startswith("cuda")
    for name, (kind, trained) in (KINDS if on_gpu else ON_CPU).items():
        yield partial(beside_plain, job, name, kind, trained)
    yield partial(beside_fused, job, *(("bf16", torch.bfloat16) if on_gpu else ("fp32", torch.float32)))


def beside_plain(job: Mapping[str, Any], name: str, kind: torch.dtype, trained: bool) -> Case:
    size = SIZES[job["size"]]
    given = states(job, kind, trained)
    ours, theirs = measured(job, chunked, *given), measured(job, plain, *given)
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(ours[2], theirs[2], strict=True)]
    beside = {"peer_name": "plain logits", "agree": max(gaps) < (2e-2 if kind == torch.bfloat16 else 1e-4)}
    case = Case(f"head, {name}, {shape(job)}", notes={"largest_gap": max(gaps)})
    case.add("milliseconds", "ms", 1e3 * ours[0], peer=1e3 * theirs[0], **beside)
    case.add("memory above the inputs", "GB", ours[1] / 1e9, peer=theirs[1] / 1e9, **beside)
    products = 3 if trained else 2
    needed = products * 2 * size.load.head_rows * size.shape.head_weights
    rates(case, job["limits"]["operations"], needed / ours[0])
    return case


def beside_fused(job: Mapping[str, Any], name: str, kind: torch.dtype) -> Case:
    size = SIZES[job["size"]]
    spent, above, _ = measured(job, chunked, *states(job, kind, True))
    case = Case(f"head, {name}, {shape(job)}, fused")
    case.add("milliseconds", "ms", 1e3 * spent)
    case.add("memory above the inputs", "GB", above / 1e9)
    case.job = {
        "kind": "head",
        "device": job["device"],
        "rows": size.load.head_rows,
        "hidden_size": size.shape.hidden_size,
        "vocabulary": size.shape.vocab_size,
    }
    return case


def shape(job: Mapping[str, Any]) -> str:
    size = SIZES[job["size"]]
    return f"{size.load.head_rows} rows of {size.shape.hidden_size}, vocabulary {size.shape.vocab_size}"


def states(job: Mapping[str, Any], kind: torch.dtype, trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets, and what the log-probabilities' gradients are."""
    size, device = SIZES[job["size"]], job["device"]
    rows, width, vocabulary = size.load.head_rows, size.shape.hidden_size, size.shape.vocab_size
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, dtype=kind, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).to(kind).requires_grad_(trained)
    return hidden, weight, torch.randint(vocabulary, (rows,), device=device), torch.randn(rows, device=device)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from fairlead.ops.logprobs import token_logprobs

    return token_logprobs(hidden, weight, targets)[0]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def measured(
    job: Mapping[str, Any], function: Head, hidden: Tensor, weight: Tensor, targets: Tensor, pull: Tensor
) -> tuple[float, float, list[Tensor]]:
    """Seconds of a call, bytes above what lay there before, and what came out, gradients included."""
    device = job["device"]

    def work() -> None:
        hidden.grad = weight.grad = None
        function(hidden, weight, targets).backward(pull)

    hidden.grad = weight.grad = None
    machine.forget_peak(device)
    before = torch.cuda.memory_allocated() if device.startswith("cuda") else machine.peak(device)
    spent = statistics.median(machine.seconds(device, work, repeats=5, warmup=2))
    above = max(0, machine.peak(device) - before)
    found = (function(hidden, weight, targets), hidden.grad, weight.grad)
    return spent, above, [tensor.detach().float() for tensor in found if tensor is not None]


STAGES = {"head": head}
