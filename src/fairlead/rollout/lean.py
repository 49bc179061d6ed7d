"""One token a row through layers of Llama's shape: what the family's own code computes, in half as many calls, since
with few rows it is calls that cost. A layer is taken where its code is, byte for byte, one known here (Llama, Mistral,
Qwen 2 and 3, Gemma); the others run as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairlead.models.attention import NAME, decode
from fairlead.models.kernels import is_gated_mlp, takes_rotary, turned
from fairlead.rollout.packed import Product, is_packable, product, replaced, weights_of

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


@contextmanager
def lean(network: Any) -> Iterator[None]:
    """Inside, such layers decode by `LeanLayer`. Before `packed`, which takes the linear layers that are left."""
    implementation = network.config._attn_implementation
    with replaced({m: LeanLayer(m) for m in network.modules() if is_lean(m, implementation)}, network):
        yield


def is_lean(layer: Any, implementation: str) -> bool:
    """Whether a module is a decoder layer that `LeanLayer` computes. ``implementation``: of the model's attention."""
    if implementation != NAME or "forward" in vars(layer) or not all(hasattr(layer, part) for part in PARTS):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    return (
        _code(type(layer)) == _layer_code()
        and _code(type(attention)) in _windows()
        and takes_rotary(type(attention))
        and is_gated_mlp(mlp)
        and all(is_packable(getattr(attention, name)) for name in PROJECTIONS)
        and all(is_packable(getattr(mlp, name)) for name in GATED)
    )


class LeanLayer:
    """The forward of such a layer, while it decodes; prompts go through its own."""

    def __init__(self, layer: Any) -> None:
        self._plain, self._layer, self._attention = layer.forward, layer, layer.self_attn
        self._window = _windows()[_code(type(self._attention))](self._attention)
        self._products: tuple[Product, ...] | None = None

    def __call__(self, hidden_states: Tensor, **given: Any) -> Tensor:
        if hidden_states.shape[1] > 1 or given.get("forest") is not None:
            return self._plain(hidden_states, **given)
        if self._products is None:
            self._products = self._packed(len(hidden_states))
        joint, out, gate_up, down = self._products
        states = hidden_states[:, 0]
        states = out(self._attend(joint(self._layer.input_layernorm(states)), **given)).add_(states)
        gate, up = gate_up(self._layer.post_attention_layernorm(states)).chunk(2, -1)
        return down(self._layer.mlp.act_fn(gate).mul_(up)).add_(states)[:, None]

    def _attend(
        self,
        states: Tensor,
        attention_mask: Tensor,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> Tensor:
        """Queries, keys and values side by side -> what the heads found, [R, heads * D] both."""
        attention, width = self._attention, self._attention.head_dim
        sizes = [attention.q_proj.out_features // width, *[attention.k_proj.out_features // width] * 2]
        heads = states.view(len(states), -1, 1, width)
        query, key, value = heads.split(sizes, 1)
        turning = heads[:, : -sizes[2]]
        if hasattr(attention, "q_norm"):
            turning = torch.cat((attention.q_norm(query), attention.k_norm(key)), 1)
        cos, sin = (each[:, None] for each in position_embeddings)
        query, key = turned(turning, cos, sin).split(sizes[:2], 1)
        keys, values = past_key_values.update(key, value, attention.layer_idx)
        found = decode(query, keys, values, attention_mask, attention.scaling, self._window, None)
        return found.reshape(len(states), -1)

    def _packed(self, rows: int) -> tuple[Product, ...]:
        attention, mlp = self._attention, self._layer.mlp
        return (
            _joined([attention.q_proj, attention.k_proj, attention.v_proj], rows),
            _joined([attention.o_proj], rows),
            _joined([mlp.gate_proj, mlp.up_proj], rows),
            _joined([mlp.down_proj], rows),
        )


def _joined(linears: list[nn.Module], rows: int) -> Product:
    """Layers that read the same states, as one whose outputs stand side by side."""
    found = [weights_of(linear) for linear in linears]
    biases = [bias for _, bias in found if bias is not None]
    weight = torch.cat([weight for weight, _ in found]) if len(found) > 1 else found[0][0]
    return product(weight, torch.cat(biases) if biases else None, rows)


def _code(kind: type[nn.Module]) -> tuple[bytes, tuple[str, ...]]:
    code = inspect.unwrap(kind.forward).__code__
    return code.co_code, code.co_names


@functools.cache
def _layer_code() -> Any:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return _code(LlamaDecoderLayer)


@functools.cache
def _windows() -> dict[Any, Callable[[Any], int | None]]:
    """By the code of an attention module: where it has its sliding window."""
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mistral.modeling_mistral import MistralAttention
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    return {
        _code(LlamaAttention): lambda _: None,
        _code(MistralAttention): lambda module: getattr(module.config, "sliding_window", None),
        _code(Qwen2Attention): lambda module: module.sliding_window,
        _code(Qwen3Attention): lambda module: module.sliding_window,
    }
