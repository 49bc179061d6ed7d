"""Linear layers for a few rows: their weights, adapters added in, copied into a layout that a product with few rows
reads fast, for as long as decoding lasts. On CPUs and in fp32, without autocast; elsewhere, and for layers of another
kind, nothing changes.

Prompts, of many tokens a row, go the usual way. The copies take as much memory as the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]

MOST_ROWS = 256
"""Above, the usual product is as fast."""
MOST_BYTES = 1 << 31
"""Of weights: a larger network is left as it is."""
LARGE, LARGE_FOR_FEW, FEW = 1 << 23, 1 << 19, 16
"""Numbers of a weight from which the layout of oneDNN is faster than a transposed one: of any, and of FEW rows."""


@contextmanager
def packed(network: Any) -> Iterator[None]:
    """Inside, the network's linear layers serve few rows from copies of their weights, made when first needed. Weights
    must not change meanwhile."""
    with replaced({module: _FewRows(module) for module in network.modules() if is_packable(module)}, network):
        yield


@contextmanager
def replaced(forwards: dict[Any, Any], network: Any) -> Iterator[None]:
    """Inside, modules of a network that is not too large to be copied have other forward functions."""
    if sum(p.numel() * p.element_size() for p in network.parameters()) > MOST_BYTES:
        forwards = {}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


class _FewRows:
    """The forward of a layer, while it is packed."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._plain = module, module.forward
        self._kept: Product | None = None

    def __call__(self, states: Tensor) -> Tensor:
        rows = states.numel() // states.shape[-1]
        if rows > MOST_ROWS or (states.dim() > 2 and states.shape[-2] > 1):  # prompts
            return self._plain(states)
        if self._kept is None:
            self._kept = product(*weights_of(self._module), rows)
        return self._kept(states)


def is_packable(module: Any) -> bool:
    if "forward" in vars(module):
        return False
    layer = module.base_layer if hasattr(module, "lora_A") else module
    if type(layer) is not nn.Linear and type(layer).__name__ != "Conv1D":
        return False
    if layer is not module and (
        type(module).__name__ != "Linear" or module.merged or module.lora_variant or any(module.lora_bias.values())
    ):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def weights_of(module: Any) -> tuple[Tensor, Tensor | None]:
    """[outputs, inputs] with the active adapters added in, and the bias."""
    layer = module.base_layer if hasattr(module, "lora_A") else module
    weight = layer.weight
    if layer is not module and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    return weight.t() if type(layer).__name__ == "Conv1D" else weight, layer.bias


def product(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """states [..., inputs] -> states @ weight.T + bias; ``rows`` is how many there are at first."""
    if weight.numel() >= (LARGE if rows > FEW else LARGE_FOR_FEW) and _has_onednn():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return lambda states: torch.ops.mkldnn._linear_pointwise(states, reordered, bias, "none", [], "")
    transposed = weight.t().contiguous()
    if bias is None:
        return lambda states: torch.matmul(states, transposed)
    return lambda states: torch.matmul(states, transposed).add_(bias)


@functools.cache
def _has_onednn() -> bool:
    """Whether this build of torch has the operations, which are not public, found by trying."""
    try:
        reordered = torch.ops.mkldnn._reorder_linear_weight(torch.ones(4, 4), None)
        product = torch.ops.mkldnn._linear_pointwise(torch.ones(1, 4), reordered, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool((product == 4.0).all())
