"""Attention over rows of runs: what the kernels are told to see, and losses and gradients against separate rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.gpu.checks import Found, Place, Skipped
from benchmarks.gpu.little import gradients_of, largest, policy, relative, trees
from torch import Tensor

from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.models import attention
from fairlead.models.attention import Forest, forest_attention
from fairlead.models.gpu_attention import BLOCK, block_mask

WAYS = [
    ("llama", "sdpa", torch.float32),
    ("llama", "sdpa", torch.float64),
    ("llama", "flex", torch.float32),
    ("llama", "flex", torch.bfloat16),
    ("llama", "flash", torch.bfloat16),
    ("llama", "auto", torch.bfloat16),
    ("mistral", "sdpa", torch.float32),
    ("mistral", "flex", torch.float32),
    ("mistral", "flash", torch.bfloat16),
    ("gemma2", "sdpa", torch.float32),
    ("gemma2", "flex", torch.float32),
    ("gemma2", "flash", torch.bfloat16),
]
"""bfloat16: fp32 weights under autocast, as all weights are trained."""
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-7}
"""Norm of a gradient's error, of any tensor. These families' norms compute in fp32 in every type."""
TIMES = 2.0
"""As many times the error of separate rows in bf16, with the mask written out, may that of a fused kernel be."""


def masks(place: Place) -> Iterator[Found | Skipped]:
    """The block mask of flex attention: pairs that differ from the definition, listed and full blocks taken at their
    word."""
    for shared in (True, False):
        batch = token_batch(trees(shared), packed=True, pad_id=0).to(torch.device(place.device))
        for window in (None, 20, 280):
            wanted = Forest.of(batch).dense(window)[0, 0]
            made = block_mask(batch.subtree_end, batch.position_ids, window)
            got = seen_by(made, wanted.shape[0], torch.device(place.device))
            row = "shared prompts" if shared else "separate prompts"
            yield Found(f"{row}, window {window}", float((got != wanted).sum()), 0.0)


def seen_by(mask: Any, width: int, device: torch.device) -> Tensor:
    """[T, T] bool: what a kernel lets through."""
    blocks = -(-width // BLOCK)
    index = torch.arange(width, device=device)
    pairs = mask.mask_mod(torch.tensor(0, device=device), torch.tensor(0, device=device), index[:, None], index[None])

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        found = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
        for q in range(blocks):
            found[q, indices[0, 0, q, : int(counts[0, 0, q])].long()] = True
        return found.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:width, :width]

    some = listed(mask.kv_num_blocks, mask.kv_indices)
    return listed(mask.full_kv_num_blocks, mask.full_kv_indices) | (some & pairs)


def forest(place: Place) -> Iterator[Found | Skipped]:
    """Losses and gradients of rows in which runs share prompts, and of packed rows, against rows of their own in fp32
    with the mask written out."""
    for family in dict.fromkeys(family for family, _, _ in WAYS):
        separate = token_batch(trees(shared=False), packed=False, pad_id=0)
        exact = gradients_of(policy(family, place.device, way="eager"), separate)
        half = None
        for _, way, dtype in (each for each in WAYS if each[0] == family):
            name = f"{family}, {way}, {str(dtype).removeprefix('torch.')}"
            if reason := why_not(place, way, dtype):
                yield Skipped(name, reason)
                continue
            autocast = torch.bfloat16 if dtype == torch.bfloat16 else None
            weights = torch.float64 if dtype == torch.float64 else torch.float32
            wanted = exact
            if weights == torch.float64:
                wanted = gradients_of(policy(family, place.device, dtype=weights, way="eager"), separate)
            if autocast and half is None:
                half = gradients_of(policy(family, place.device, way="eager", autocast=autocast), separate)
            for shared in (True, False):
                row = token_batch(trees(shared), packed=True, pad_id=0)
                got = gradients_of(policy(family, place.device, dtype=weights, way=way, autocast=autocast), row)
                case = f"{name}, {'shared prompts' if shared else 'packed'}"
                yield from compared(case, got, wanted, half if autocast else None, BOUNDS.get(dtype, 0.0))


Gradients = tuple[float, dict[str, Tensor]]


def compared(
    case: str, got: Gradients, wanted: Gradients, half: Gradients | None, bound: float
) -> Iterator[Found | Skipped]:
    """``half``: the yardstick where the products are in bf16."""
    if half is None:
        yield Found(f"{case}: loss", relative(got[0], wanted[0]), bound)
        yield Found(f"{case}: gradients", largest(got[1], wanted[1]), bound)
        return
    error, usual = largest(got[1], wanted[1]), largest(half[1], wanted[1])
    note = f"gradients are off by {error:.1e}, those of separate rows by {usual:.1e}"
    yield Found(f"{case}: error of gradients, in that of separate rows", error / usual, TIMES, note)


def why_not(place: Place, way: str, dtype: torch.dtype) -> str:
    if way in ("flex", "flash") and not place.on_gpu:
        return "needs CUDA"
    if way == "flash" and not attention.has_flash():
        return "flash-attn is not installed"
    if dtype == torch.bfloat16 and not place.on_gpu:
        return "needs CUDA"
    return ""


def compiling(place: Place) -> Iterator[Found | Skipped]:
    """How often flex attention is compiled for rows of ever other lengths: once for a length, and once for all, with
    and without gradients. Above torch's limit of 8 it would hold every score."""
    if not place.on_gpu:
        yield Skipped("flex", "needs CUDA")
        return
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    counters.clear()
    device = torch.device(place.device)
    for number in range(6):
        kept = [Tree(tree.prompt[number:], tree.responses) for tree in trees()]
        batch = token_batch(kept, packed=True, pad_id=0).to(device)
        width = batch.input_ids.shape[1]
        for with_gradient in (True, False):
            states = [
                torch.randn(1, heads, width, 32, device=device, dtype=torch.bfloat16, requires_grad=with_gradient)
                for heads in (4, 2, 2)
            ]
            out, _ = forest_attention(torch.nn.Module(), *states, attention_mask=None, forest=Forest.of(batch, "flex"))
            if with_gradient:
                out.sum().backward()
    found = int(counters["stats"]["unique_graphs"])
    yield Found("flex, 6 lengths, with and without gradients", found, 4.0)
