"""How many operations a pass takes and how many bytes a decoded token reads, and the nominal limits of devices.

Imports no torch: every figure can be computed by hand, and the tests do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD, LORA, FULL = "forward", "lora", "full"
"""Modes: no gradients; frozen weights under adapters; all weights trained."""
PASSES = {FORWARD: 1, LORA: 2, FULL: 3}
"""Products with a weight, for each one of the forward pass: LoRA's backward pass has the one that carries the gradient
on, not the one that makes the weight's own."""

NOMINAL = {
    "H200": (989.4, 4.8),
    "H100 PCIe": (756.0, 2.0),
    "H100 NVL": (835.5, 3.9),
    "H100": (989.4, 3.35),
    "A100-SXM4-80GB": (312.0, 2.039),
    "A100 80GB PCIe": (312.0, 1.935),
    "A100": (312.0, 1.555),
    "L40S": (362.05, 0.864),
    "RTX 4090": (165.2, 1.008),
}
"""Part of the device's name -> dense bf16 TFLOP/s with fp32 sums, and TB/s of memory, by the maker's data sheet. The
first that fits counts."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def layer_weights(self) -> int:
        """Of all layers, those that take part in products; norms are left out."""
        key_value = 2 * self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * self.hidden_size + key_value)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def parameters(self) -> int:
        """All of the causal language model."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.layer_weights + norms + self.head_weights * (1 if self.tied else 2)


def operations(shape: Shape, *, tokens: int, counted: int, pairs: int, mode: str) -> float:
    """Floating-point operations that a pass over a model needs.

        passes * (2 N tokens + 2 N_head counted) + (1 forward, 3 training) * 4 layers hidden pairs

    with ``passes`` 1 forward, 2 LoRA, 3 full: 2N, 4N and 6N a token. ``N`` are the weights of the layers, ``N_head``
    those of the output head, which is asked for the ``counted`` tokens alone. Attention has two products forward and
    four backward for every one of the ``pairs`` of a token and a token it sees (itself included; a window is not taken
    off). Recomputation, embeddings, norms and the adapters' own products are not counted.
    """
    products = PASSES[mode] * 2 * (shape.layer_weights * tokens + shape.head_weights * counted)
    attention = (1 if mode == FORWARD else 3) * 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
    return float(products + attention)


def key_value_bytes(shape: Shape, itemsize: int) -> int:
    """Of one token in the cache, all layers together."""
    return 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim * itemsize


def decode_bytes(*, weights: int, key_value: int, prompts: Sequence[int], responses: Sequence[int]) -> int:
    """Bytes that decoding a batch has to read after the first token of each response, which the prompt's pass gives.

    Every further step reads the ``weights`` once, as often as the longest response needs, and for each row still going
    the keys and values (``key_value`` bytes a token) of all tokens before it. ``prompts``, ``responses``: tokens of
    each row.
    """
    steps = max(responses) - 1
    seen = sum(
        (length - 1) * prompt + length * (length - 1) // 2 for prompt, length in zip(prompts, responses, strict=True)
    )
    return steps * weights + key_value * seen


def causal_pairs(length: int) -> int:
    """Pairs of a token and one it sees in a plain row."""
    return length * (length + 1) // 2


def nominal(device: str) -> tuple[float, float] | None:
    """(FLOP/s in bf16, bytes a second) of a device by its name; none for one that is not listed."""
    for part, (tera_operations, tera_bytes) in NOMINAL.items():
        if part in device:
            return tera_operations * 1e12, tera_bytes * 1e12
    return None
