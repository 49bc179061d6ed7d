"""Log-probabilities of tokens from hidden states, chunk by chunk, so that logits of all rows never exist at once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits held at once: 16 MB in fp32."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature + bias / temperature) at the targets, and the entropy.

    ``hidden`` [N, H], ``weight`` [V, H], ``targets`` [N], ``bias`` [V] -> logprobs [N], entropy [N] in nats (an empty
    tensor unless asked for). Computed in max(fp32, input dtype); differentiable in hidden, weight and bias; the
    backward pass recomputes the logits, so memory is one chunk of at most CHUNK_ELEMENTS logits.
    """
    return cast(Any, _TokenLogprobs).apply(hidden, weight, bias, targets, temperature, with_entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, kind = hidden.shape[0], _wide(hidden.dtype)
        logprobs, log_total = hidden.new_empty(rows, dtype=kind), hidden.new_empty(rows, dtype=kind)
        entropy = hidden.new_empty(rows if with_entropy else 0, dtype=kind)
        for part in _chunks(rows, weight.shape[0]):
            logits = _logits(hidden[part], weight, bias, temperature)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            if with_entropy:
                total = logits.logsumexp(1)
                logits.sub_(total[:, None])
                entropy[part] = -(logits.exp() * logits).nan_to_num_(0.0).sum(1)
            else:
                peak = logits.amax(1, keepdim=True)
                total = logits.sub_(peak).exp_().sum(1).log_().add_(peak[:, 0])
            log_total[part] = total
            logprobs[part] = chosen - total
        ctx.save_for_backward(hidden, weight, bias, targets, log_total, entropy)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = gradients
        hidden, weight, bias, targets, log_total, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if wants_bias else None
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            # d logprob / d logits = onehot - p;   d entropy / d logits = -p (log p + entropy)
            logits = _logits(hidden[part], weight, bias, ctx.temperature).sub_(log_total[part, None])
            scale = grad_logprobs[part, None]
            if ctx.with_entropy:
                probs = logits.exp()
                pull = logits.add_(entropy[part, None]).mul_(grad_entropy[part, None]).add_(scale)
                slope = pull.mul_(probs).nan_to_num_(0.0).neg_()
            else:
                slope = logits.exp_().mul_(-scale)
            slope.scatter_add_(1, targets[part, None], scale.to(slope.dtype))
            slope.div_(ctx.temperature)
            narrow = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), hidden[part].to(slope.dtype))
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.mm(hidden, weight.t()).to(_wide(hidden.dtype))
    if bias is not None:
        logits += bias
    return logits if temperature == 1.0 else logits.div_(temperature)
