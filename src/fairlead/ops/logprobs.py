"""Log-probabilities of tokens from hidden states, chunk by chunk, so that logits of all rows never exist at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits held at once: 16 MB in fp32."""
KEPT_ELEMENTS = 1 << 24
"""Probabilities kept for the backward pass, 64 MB in fp32; those of further rows are computed again."""
ON_GPU = 16
"""Times as many at once on a GPU, where a product of few rows leaves most of it idle; none are kept there."""

Support = tuple[Tensor, Tensor, Tensor]
"""What a token could be, where it was less than the vocabulary: the ids of one row after the other [M], how many of
them are each row's [N] (0: the whole vocabulary), and one id that it could not be [N] (-1: none)."""


class _Form(NamedTuple):
    """How logits come from hidden @ weight.T + bias."""

    scale: float
    cap: float | None
    temperature: float


class Readout(NamedTuple):
    """Hidden states [N, H] and the head that makes logits of them, as `token_logprobs` takes them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0
    cap: float | None = None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    support: Support | None = None,
    uniform: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy, with

        logits = cap * tanh(raw / cap)  or, without a cap, raw        (Gemma Team 2024, section 2)
        raw    = scale * (hidden @ weight.T + reduced @ up.T + bias)

    ``hidden`` [N, H], ``weight`` [V, H], ``targets`` [N], ``bias`` [V], ``low_rank`` = (reduced [N, r], up [V, r]) an
    adapter on the head -> logprobs [N], entropy [N] in nats (an empty tensor unless asked for). With ``support`` the
    softmax is over each row's own tokens; a target that is none of them has -inf. Computed in max(fp32, input dtype);
    differentiable in every float tensor; the backward pass recomputes the logits of all but the first rows, so memory
    is one chunk of at most CHUNK_ELEMENTS logits, two with a cap, and KEPT_ELEMENTS. ``uniform`` says that the loss
    will weigh all rows alike: gradients are then taken on the way forward, and nothing is computed twice or kept. Where
    it proves wrong they are right all the same.
    """
    reduced, up = low_rank or (None, None)
    form, allowed = _Form(scale, cap, temperature), _Allowed.of(support)
    return cast(Any, _TokenLogprobs).apply(
        hidden, weight, bias, reduced, up, targets, form, allowed, with_entropy, uniform, torch.is_grad_enabled()
    )


@torch.no_grad()
def logit_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    temperature: float = 1.0,
    support: Support | None = None,
) -> tuple[Tensor, Tensor]:
    """log sum_v p_v^2 and the mean logit over the vocabulary, or over each row's support, [N] each, of the logits of
    `token_logprobs`, chunk by chunk and without gradient."""
    reduced, up = low_rank or (None, None)
    form, allowed, kind = _Form(scale, cap, temperature), _Allowed.of(support), _wide(hidden.dtype)
    collision, mean = (hidden.new_empty(hidden.shape[0], dtype=kind) for _ in range(2))
    for part in _chunks(hidden.shape[0], weight):
        logits = _restrict(_logits(part, hidden, weight, bias, reduced, up, form), part, allowed)
        if allowed is None:
            mean[part] = logits.mean(1)
        else:
            outside = logits == -torch.inf
            mean[part] = logits.masked_fill(outside, 0.0).sum(1) / (~outside).sum(1)
        total = logits.logsumexp(1)
        collision[part] = logits.mul_(2).logsumexp(1) - 2 * total
    return collision, mean


@torch.no_grad()
def full_kl(policy: Readout, reference: Readout, *, temperature: float = 1.0, support: Support | None = None) -> Tensor:
    """sum_v p_v (log p_v - log q_v) in nats, of the whole distributions p of the policy and q of the reference at one
    temperature, over one support -> [N] in max(fp32, input dtype). Two chunks of logits exist at once, together of at
    most CHUNK_ELEMENTS; without gradient."""
    rows = policy.hidden.shape[0]
    allowed = _Allowed.of(support)
    kl = policy.hidden.new_empty(rows, dtype=_wide(policy.hidden.dtype))
    for part in _chunks(rows, policy.weight, 2):
        own, other = (_log_softmax(part, each, temperature, allowed) for each in (policy, reference))
        ratio = torch.sub(own, other, out=other)
        probs = own.exp_()
        kl[part] = ratio.mul_(probs).masked_fill_(probs == 0, 0.0).sum(1)
    return kl


def _log_softmax(part: slice, each: Readout, temperature: float, allowed: _Allowed | None) -> Tensor:
    reduced, up = each.low_rank or (None, None)
    form = _Form(each.scale, each.cap, temperature)
    logits = _restrict(_logits(part, each.hidden, each.weight, each.bias, reduced, up, form), part, allowed)
    return logits.sub_(logits.logsumexp(1, keepdim=True))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reduced: Tensor | None,
        up: Tensor | None,
        targets: Tensor,
        form: _Form,
        allowed: _Allowed | None,
        with_entropy: bool,
        uniform: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        """``learns``: a backward pass may follow, which what is needed of the inputs does not say."""
        rows, kind = hidden.shape[0], _wide(hidden.dtype)
        logprobs, log_total = hidden.new_empty(rows, dtype=kind), hidden.new_empty(rows, dtype=kind)
        entropy = hidden.new_empty(rows if with_entropy else 0, dtype=kind)
        # Gradients for a pull of 1 on each row, while the softmax is at hand: those of hidden alone serve any pull.
        inputs = (hidden, weight, bias, reduced, up)
        of_rows = not any(ctx.needs_input_grad[1:5])
        now = learns and ctx.needs_input_grad[0] and not with_entropy and (uniform or of_rows)
        made = _Gradients(inputs, ctx.needs_input_grad) if now else None
        able = learns and any(ctx.needs_input_grad) and not now and not with_entropy and form.cap is None
        keeps, kept = KEPT_ELEMENTS // weight.shape[0] if able else 0, list[tuple[Tensor, Tensor]]()
        for part in _chunks(rows, weight):
            logits = _logits(part, *inputs, form)
            bend = _bend(logits, form) if made is not None else None
            _restrict(logits, part, allowed)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            if with_entropy:
                total = logits.logsumexp(1)
                logits.sub_(total[:, None])
                entropy[part] = -(logits.exp() * logits).nan_to_num_(0.0).sum(1)
            else:
                peak = logits.amax(1, keepdim=True)
                mass = logits.sub_(peak).exp_().sum(1, keepdim=True)
                total = mass.log().add_(peak)[:, 0]
                if made is not None:
                    slope = logits.div_(-mass)
                    slope.scatter_add_(1, targets[part, None], torch.ones_like(peak))
                    made.add(part, _through(slope, form, bend))
                elif part.stop <= keeps:
                    kept.append((logits, mass))
            log_total[part] = total
            logprobs[part] = chosen - total
        ctx.form, ctx.allowed, ctx.with_entropy = form, allowed, with_entropy
        ctx.made, ctx.of_rows, ctx.kept = made, of_rows, kept
        ctx.save_for_backward(*inputs, targets, log_total, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = gradients
        hidden, weight, bias, reduced, up, targets, log_total, entropy = ctx.saved_tensors
        made: _Gradients | None = ctx.made
        if made is not None and (ctx.of_rows or _alike(grad_logprobs)):
            ctx.made = None  # it is written to
            return (*made.pulled(grad_logprobs, whole=not ctx.of_rows), *[None] * 6)
        inputs = (hidden, weight, bias, reduced, up)
        made = _Gradients(inputs, ctx.needs_input_grad)
        kept: list[tuple[Tensor, Tensor]] = ctx.kept
        for number, part in enumerate(_chunks(hidden.shape[0], weight)):
            # d logprob / d logits = onehot - p;   d entropy / d logits = -p (log p + entropy)
            pull, bend = grad_logprobs[part, None], None
            if number < len(kept):
                exponentials, mass = kept[number]
                slope = exponentials * (-pull / mass)
            else:
                logits = _logits(part, *inputs, ctx.form)
                bend = _bend(logits, ctx.form)
                _restrict(logits, part, ctx.allowed).sub_(log_total[part, None])
                if ctx.with_entropy:
                    probs = logits.exp()
                    mixed = logits.add_(entropy[part, None]).mul_(grad_entropy[part, None]).add_(pull)
                    slope = mixed.mul_(probs).nan_to_num_(0.0).neg_()
                else:
                    slope = logits.exp_().mul_(-pull)
            slope.scatter_add_(1, targets[part, None], pull.to(slope.dtype))
            made.add(part, _through(slope, ctx.form, bend))
        return (*made.found(), *[None] * 6)


def _alike(pull: Tensor) -> bool:
    """Whether all rows are pulled alike; without weights, as they were said to be."""
    return pull.device.type == "meta" or bool((pull == pull[:1]).all())


class _Gradients:
    """Of hidden, weight, bias, reduced and up, those that are wanted, from slopes in hidden @ weight.T: rows of hidden
    and reduced are written once; weight, bias and up are summed over chunks, in max(fp32, dtype)."""

    def __init__(self, inputs: tuple[Tensor | None, ...], wanted: Sequence[bool]) -> None:
        self._inputs = inputs
        self._made = [
            None
            if t is None or not wants
            else torch.empty_like(t)
            if place in (0, 3)
            else torch.zeros_like(t, dtype=_wide(t.dtype))
            for place, (t, wants) in enumerate(zip(inputs, wanted, strict=False))
        ]

    def add(self, part: slice, slope: Tensor) -> None:
        hidden, weight, _, reduced, up = self._inputs
        grad_hidden, grad_weight, grad_bias, grad_reduced, grad_up = self._made
        assert hidden is not None and weight is not None
        if grad_hidden is not None:
            torch.mm(slope.to(hidden.dtype), weight, out=grad_hidden[part])
        if grad_weight is not None:
            grad_weight.addmm_(slope.t(), hidden[part].to(slope.dtype))
        if grad_bias is not None:
            grad_bias += slope.sum(0)
        if grad_reduced is not None:
            torch.mm(slope.to(cast(Tensor, up).dtype), cast(Tensor, up), out=grad_reduced[part])
        if grad_up is not None:
            grad_up.addmm_(slope.t(), cast(Tensor, reduced)[part].to(slope.dtype))

    def pulled(self, pull: Tensor, *, whole: bool) -> tuple[Tensor | None, ...]:
        """Times the ``pull`` [N] of each row, or with ``whole`` of all of them, which is one number."""
        factor = pull[:1].sum() if whole else pull[:, None]
        return tuple(None if g is None else g.mul_(factor.to(g.dtype)) for g in self.found())

    def found(self) -> tuple[Tensor | None, ...]:
        return tuple(
            None if g is None else g.to(cast(Tensor, t).dtype) for g, t in zip(self._made, self._inputs, strict=True)
        )


class _Allowed(NamedTuple):
    """A support, and where each row's tokens stand in it."""

    rows: Tensor
    """[M] the row of each token kept."""
    kept: Tensor
    starts: list[int]
    """Of each row in ``kept``, and the end."""
    cut: Tensor | None
    """[N] bool; none where no row's is."""
    banned: Tensor

    @classmethod
    def of(cls, support: Support | None) -> _Allowed | None:
        if support is None:
            return None
        kept, counts, banned = support
        index = torch.arange(len(counts), device=counts.device)
        rows = torch.repeat_interleave(index, counts, output_size=len(kept))
        return cls(rows, kept, [0, *cast(Any, counts.cumsum(0)).tolist()], counts > 0 if len(kept) else None, banned)


def _restrict(logits: Tensor, part: slice, allowed: _Allowed | None) -> Tensor:
    """-inf, in place, at what the rows of ``part`` could not be."""
    if allowed is None:
        return logits
    if allowed.cut is not None:
        first, last = cast(tuple[int, int], (part.start, part.stop))
        span = slice(allowed.starts[first], allowed.starts[last])
        rows, kept = allowed.rows[span] - first, allowed.kept[span]
        values = logits[rows, kept]
        logits.masked_fill_(allowed.cut[part, None], -torch.inf)
        logits[rows, kept] = values
    banned = allowed.banned[part, None]
    column = banned.clamp(min=0)
    return logits.scatter_(1, column, logits.gather(1, column).masked_fill_(banned >= 0, -torch.inf))


def _bend(logits: Tensor, form: _Form) -> Tensor | None:
    """d (cap tanh(raw / cap)) / d raw = 1 - tanh^2, of logits divided by the temperature."""
    return None if form.cap is None else logits.mul(form.temperature / form.cap).square_().neg_().add_(1)


def _through(slope: Tensor, form: _Form, bend: Tensor | None) -> Tensor:
    """A slope in the logits as one in hidden @ weight.T, in place."""
    slope.div_(form.temperature)
    if bend is not None:
        slope.mul_(bend)
    return slope if form.scale == 1.0 else slope.mul_(form.scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(rows: int, weight: Tensor, heads: int = 1) -> list[slice]:
    """Rows whose logits, of so many heads, exist at once."""
    elements = CHUNK_ELEMENTS * (ON_GPU if weight.device.type == "cuda" else 1)
    size = max(1, elements // (heads * weight.shape[0]))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def _logits(
    part: slice,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reduced: Tensor | None,
    up: Tensor | None,
    form: _Form,
) -> Tensor:
    """Of some rows, divided by the temperature."""
    logits = torch.mm(hidden[part], weight.t()).to(_wide(hidden.dtype))
    if reduced is not None and up is not None:
        logits.addmm_(reduced[part].to(logits.dtype), up.to(logits.dtype).t())
    if bias is not None:
        logits += bias
    if form.scale != 1.0:
        logits.mul_(form.scale)
    if form.cap is not None:
        logits.div_(form.cap).tanh_().mul_(form.cap)
    return logits if form.temperature == 1.0 else logits.div_(form.temperature)
