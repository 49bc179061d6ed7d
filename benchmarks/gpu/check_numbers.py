"""The head, fused kernels, and what saves memory, each against the plain computation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from benchmarks.gpu.check_attention import TIMES
from benchmarks.gpu.checks import Found, Place, Skipped
from benchmarks.gpu.little import gradients_of, largest, policy, relative, trees
from torch import Tensor

from fairlead.data.pack import token_batch
from fairlead.ops.logprobs import token_logprobs

ROWS, VOCABULARY = 300, 20_000
"""Of logits that take several chunks."""


def head(place: Place) -> Iterator[Found | Skipped]:
    """Chunked log-probabilities and entropies, and their gradients, against plain logits; in bf16 against those in
    fp64, in units of what plain logits in bf16 are off by."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 64, generator=generator, dtype=torch.float64) * 0.3
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator).to(place.device)
    pull = torch.randn(2, ROWS, generator=generator, dtype=torch.float64).to(place.device)

    def plain(hidden: Tensor, weight: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
        logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)) / 0.7
        if cap is not None:
            logits = cap / 0.7 * torch.tanh(logits * 0.7 / cap)
        logs = logits.log_softmax(-1)
        return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)

    def ours(hidden: Tensor, weight: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, weight, targets, cap=cap, temperature=0.7, with_entropy=True)

    def taken(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, cap: float | None) -> list[Tensor]:
        given = [t.to(place.device, dtype).requires_grad_(True) for t in (hidden, weight)]
        found = torch.stack(function(*given, cap))
        return [found, *torch.autograd.grad(found, given, pull.to(found.dtype))]

    for cap in (None, 2.0):
        case = "plain head" if cap is None else "capped head"
        exact = named(taken(plain, torch.float64, cap))
        yield Found(f"{case}, float64", largest(named(taken(ours, torch.float64, cap)), exact), 1e-12)
        yield Found(f"{case}, float32", largest(named(taken(ours, torch.float32, cap)), exact), 1e-5)
        error = largest(named(taken(ours, torch.bfloat16, cap)), exact)
        usual = largest(named(taken(plain, torch.bfloat16, cap)), exact)
        note = f"off by {error:.1e}, plain logits by {usual:.1e}"
        yield Found(f"{case}, bfloat16: error in that of plain logits", error / usual, 1.5, note)


def named(found: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("values", "hidden", "weight"), found, strict=True))


def kernels(place: Place) -> Iterator[Found | Skipped]:
    """Norms, rotary embeddings and gated MLPs of `model.kernels` against transformers' modules."""
    if place.on_gpu and importlib.util.find_spec("liger_kernel") is None:
        yield Skipped("liger", "liger-kernel is not installed")
        return
    name = "liger" if place.on_gpu else "our own"
    batch = token_batch(trees(shared=False), packed=True, pad_id=0)
    for family in ("llama", "gemma2"):
        wanted = gradients_of(policy(family, place.device, way="sdpa"), batch)
        got = gradients_of(policy(family, place.device, way="sdpa", kernel="auto"), batch)
        yield Found(f"{name}, {family}, float32: loss", relative(got[0], wanted[0]), 1e-5)
        yield Found(f"{name}, {family}, float32: gradients", largest(got[1], wanted[1]), 1e-5)
        if not place.on_gpu:
            yield Skipped(f"{name}, {family}, bfloat16", "needs CUDA")
            continue
        half = [
            gradients_of(policy(family, place.device, way="sdpa", kernel=kernel, autocast=torch.bfloat16), batch)
            for kernel in ("auto", "none")
        ]
        error, usual = (largest(each[1], wanted[1]) for each in half)
        note = f"gradients are off by {error:.1e}, those of plain modules by {usual:.1e}"
        yield Found(f"{name}, {family}, bfloat16: error in that of plain modules", error / usual, TIMES, note)


def memory_savers(place: Place) -> Iterator[Found | Skipped]:
    """Recomputed and offloaded activations give the gradients of kept ones."""
    batch = token_batch(trees(), packed=True, pad_id=0)
    wanted = gradients_of(policy("llama", place.device), batch)[1]
    again = gradients_of(policy("llama", place.device, gradient_checkpointing=True), batch)[1]
    yield Found("gradient checkpointing", largest(again, wanted), 1e-6)
    if not place.on_gpu:
        yield Skipped("offloaded activations", "needs CUDA")
        return
    away = gradients_of(policy("llama", place.device, offload_activations=True), batch)[1]
    yield Found("offloaded activations", largest(away, wanted), 1e-6)
    both = gradients_of(policy("llama", place.device, gradient_checkpointing=True, offload_activations=True), batch)[1]
    yield Found("both", largest(both, wanted), 1e-6)
