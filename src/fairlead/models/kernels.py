"""Faster norms, rotary embeddings and gated MLPs for the modules of one model; transformers' classes stay as they are.

A kernel replaces what a module computes, never what it holds: weights, adapters and saved files know nothing of it. It
is put where it was found to compute the same, and nowhere else. On CPUs the kernels are ours, on GPUs liger's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairlead.errors import ConfigError

Rotary = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Kernels:
    """``norm(x, weight, eps, offset)``: x / rms(x) * (offset + weight). ``gated(gate, up, act)``: act(gate) * up, act
    is silu or gelu_tanh. ``rotary(q, k, cos, sin)`` as transformers' `apply_rotary_pos_emb`."""

    norm: Callable[[Tensor, Tensor, float, float], Tensor]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    rotary: Rotary
    takes_half: bool
    """Computes half precision as the plain modules do; else those serve it."""


ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}


def install(model: Any, wanted: str, device: torch.device) -> None:
    """Give a model the kernels that `model.kernels` names. Raises ConfigError for liger where it cannot run."""
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    if wanted == "liger" and (device.type != "cuda" or not has_liger):
        reason = "it is not installed" if device.type == "cuda" else f"it runs on GPUs, not on {device}"
        raise ConfigError(f"model.kernels=liger: {reason}", hint="pip install liger-kernel, or model.kernels=auto")
    if wanted == "none" or (device.type == "cuda" and not has_liger):
        return
    patch(model, _liger() if device.type == "cuda" else OURS)


def patch(model: nn.Module, kernels: Kernels) -> None:
    """Put kernels in the place of the forward functions of those modules that compute the same."""
    for module in model.modules():
        if "forward" in vars(module):  # wrapped by somebody else, accelerate's hooks say
            continue
        offset = _norm_offset(type(module))
        if offset is not None:
            _bind(module, functools.partial(_norm_forward, kernels, offset))
        elif is_gated_mlp(module):
            _bind(module, functools.partial(_mlp_forward, kernels))
        elif takes_rotary(type(module)):
            module.forward = types.MethodType(_with_rotary(type(module), kernels), module)


def _bind(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """A method, not a closure over the module: a copy of the module gets one of its own."""
    module.forward = types.MethodType(forward, module)


def _plain(module: nn.Module, states: Tensor) -> Tensor:
    return cast(Any, type(module)).forward(module, states)


# --- root mean square norms ---


@functools.cache
def _norm_offset(kind: type[nn.Module]) -> float | None:
    """0 for x / rms(x) * weight, 1 for Gemma's x / rms(x) * (1 + weight); none for what is neither, found by trying."""
    if not kind.__name__.endswith("RMSNorm"):
        return None
    with contextlib.suppress(TypeError, AttributeError), torch.no_grad(), torch.device("cpu"):
        probe = cast(Any, kind)(8)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(4, 8, generator=generator)
        probe.weight.copy_(torch.randn(8, generator=generator))
        for offset in (0.0, 1.0):
            if torch.allclose(probe(states), _norm(states, probe.weight, _eps(probe), offset), atol=1e-6):
                return offset
    return None


def _eps(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _norm_forward(kernels: Kernels, offset: float, module: Any, states: Tensor) -> Tensor:
    weight = module.weight
    if states.dtype != weight.dtype or not (kernels.takes_half or states.dtype.itemsize >= 4):
        return _plain(module, states)
    return kernels.norm(states, weight, _eps(module), offset)


class _Norm(torch.autograd.Function):
    """Keeps its input and one number a row; the plain module keeps four tensors of the input's size."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        out, inverse = _normed(states, weight, eps, offset)
        ctx.save_for_backward(states, weight, inverse)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, inverse = ctx.saved_tensors
        (gradient,) = gradients
        normed = states * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * normed).sum(tuple(range(states.dim() - 1)))
        # d x/rms(x): what is left of the gradient at right angles to the normed states, over the rms
        pull = gradient * (weight + ctx.offset if ctx.offset else weight)
        along = torch.linalg.vecdot(pull, normed).unsqueeze(-1).div_(states.shape[-1])
        return pull.addcmul_(normed, along, value=-1).mul_(inverse), grad_weight, None, None


def _normed(states: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    inverse = norms.square_().div_(states.shape[-1]).add_(eps).rsqrt_()
    return (states * inverse).mul_(weight + offset if offset else weight), inverse


def _norm(states: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    if not torch.is_grad_enabled():  # decoding is so many small calls that an autograd function is felt
        return _normed(states, weight, eps, offset)[0]
    return cast(Any, _Norm).apply(states, weight, eps, offset)


# --- gated MLPs ---


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module's forward is, byte for byte, down(act(gate(x)) * up(x)), with an activation known here."""
    if type(getattr(module, "act_fn", None)).__name__ not in ACTIVATIONS:
        return False
    code, known = type(module).forward.__code__, _mlp_code()
    return (code.co_code, code.co_names) == (known.co_code, known.co_names)


@functools.cache
def _mlp_code() -> types.CodeType:
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP.forward.__code__


def _mlp_forward(kernels: Kernels, module: Any, states: Tensor) -> Tensor:
    gate, up = module.gate_proj(states), module.up_proj(states)  # called as modules: they may carry adapters
    if not kernels.takes_half and gate.dtype.itemsize < 4:
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(kernels.gated(gate, up, ACTIVATIONS[type(module.act_fn).__name__]))


class _Gated(torch.autograd.Function):
    """Keeps gate and up, and computes the activation again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _activate(gate, act).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        pull = gradient * up
        if ctx.act == "silu":
            torch.ops.aten.silu_backward.grad_input(pull, gate, grad_input=pull)
        else:
            torch.ops.aten.gelu_backward.grad_input(pull, gate, approximate="tanh", grad_input=pull)
        return pull, _activate(gate, ctx.act).mul_(gradient), None


def _activate(gate: Tensor, act: str) -> Tensor:
    return F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")


# --- rotary embeddings ---

ROTARY = "apply_rotary_pos_emb"


@functools.cache
def takes_rotary(kind: type[nn.Module]) -> bool:
    """Whether a class's forward calls its file's rotary function, and that computes what ours does, found by trying."""
    function = getattr(sys.modules[kind.__module__], ROTARY, None)
    code = getattr(kind.forward, "__code__", None)
    if function is None or code is None or ROTARY not in code.co_names:
        return False
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, *shape, generator=generator) for shape in ((2, 3, 8), (1, 3, 8), (3, 8), (3, 8))]
    try:
        pairs = zip(function(*given), _rotary(*given), strict=True)
        return all(torch.allclose(theirs, ours, atol=1e-6) for theirs, ours in pairs)
    except (TypeError, RuntimeError):
        return False


@functools.cache
def _with_rotary(kind: type[nn.Module], kernels: Kernels) -> types.FunctionType:
    """The forward of a class with another rotary function: a copy that reads the name from globals of its own, so that
    no other model's attention changes."""
    plain, forward = getattr(sys.modules[kind.__module__], ROTARY), cast(types.FunctionType, kind.forward)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        known = q.dtype == k.dtype == cos.dtype and q.shape[-1] == cos.shape[-1]  # not where a part of a head rotates
        known = known and (kernels.takes_half or q.dtype.itemsize >= 4)
        return (kernels.rotary if known else plain)(q, k, cos, sin)

    names = {**forward.__globals__, ROTARY: rotary}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


class _Rotary(torch.autograd.Function):
    """The first half a and the second b of each head become a cos - b sin and b cos + a sin. Keeps no states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (a, b), (cos_a, cos_b), (sin_a, sin_b) = (t.chunk(2, -1) for t in (gradients[0], cos, sin))
        out = torch.empty_like(gradients[0])
        first, second = out.chunk(2, -1)
        torch.mul(a, cos_a, out=first).addcmul_(b, sin_b)
        torch.mul(b, cos_b, out=second).addcmul_(a, sin_a, value=-1)
        return out, None, None


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    out = states * cos
    out[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return out


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` [B, heads, T, D], ``k`` [B, key heads, T, D], ``cos``, ``sin`` [B, T, D]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if not torch.is_grad_enabled():
        return turned(q, cos, sin), turned(k, cos, sin)
    return cast(Any, _Rotary).apply(q, cos, sin), cast(Any, _Rotary).apply(k, cos, sin)


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if not torch.is_grad_enabled():
        return _activate(gate, act).mul_(up)
    return cast(Any, _Gated).apply(gate, up, act)


OURS = Kernels(_norm, _gated, _rotary, takes_half=False)


@functools.cache
def _liger() -> Kernels:
    """Liger's operations, without its patches, which change the classes of every model in the process."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers.rope import liger_rotary_pos_emb  # pyright: ignore[reportMissingImports]

    def norm(states: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        return LigerRMSNormFunction.apply(states, weight, eps, offset, "gemma" if offset else "llama", False)

    def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
        return (LigerSiLUMulFunction if act == "silu" else LigerGELUMulFunction).apply(gate, up)

    return Kernels(norm, gated, liger_rotary_pos_emb, takes_half=True)
