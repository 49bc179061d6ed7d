"""Memory of one forward and backward pass, found by taking it on the meta device: every tensor that an operation
returns is followed while it lives, and no number is computed. So what a family, an adapter or checkpointing keeps for
the backward pass needs no formula of its own. Attention is taken as a fused one that holds no scores, on every device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fairlead.models.lm_head import head_logprobs, last_logits
from fairlead.models.roles import Models
from fairlead.types import Pass, TokenBatch


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes. Their sum is the most that lives at once, gradients aside."""

    kept: int
    """Alive after the trunk's forward pass: activations kept for the backward pass."""
    head: int
    """More than that while log-probabilities are computed: a chunk of logits and its neighbours."""
    temporaries: int
    """More than both at the worst moment of the backward pass."""


def training_peaks(models: Models, each: Pass, batch: TokenBatch) -> Peaks:
    """Of one pass over ``batch``, a batch on the CPU, with ``models`` on the meta device. Every token counts."""
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in models.trainable.values()]
    try:
        with models.use(each.role), torch.device("meta"), _Fused() as fused, _Live(models) as live:
            network = models.active_network()
            hidden = models._trunk(network, _without_numbers(models, batch))
            kept = live.now
            live.peak = kept
            loss = _heads(models, network, hidden, each)
            head = live.peak
            fused.backward(loss)
    finally:
        for hook in hooks:
            hook.remove()
    return Peaks(kept, head - kept, live.peak - head)


def _without_numbers(models: Models, batch: TokenBatch) -> TokenBatch:
    """The batch on the meta device, but for what a forest is read from."""
    read = {"previous": batch.previous, "subtree_end": batch.subtree_end}
    if not models.forest or models._way == "eager":  # then masks are written out, and nothing is read
        read = {}
    return replace(batch.to(torch.device("meta")), **read)


def decoding_peak(models: Models, rows: int, length: int) -> int:
    """Bytes at the worst moment of reading ``rows`` prompts of ``length`` tokens, cache aside."""
    with torch.no_grad(), models.use("policy"), torch.device("meta"), _Fused(), _Live(models) as live:
        network = models.active_network()
        ids = torch.zeros(rows, length, dtype=torch.long)
        seen = torch.ones(rows, 1, length, length, dtype=torch.bool) if models.forest else torch.ones_like(ids)
        hidden = network.get_decoder()(
            input_ids=ids, position_ids=torch.zeros_like(ids), attention_mask=seen, use_cache=False
        ).last_hidden_state
        last_logits(network, hidden[:, -1]).softmax(-1)
    return live.peak


def _heads(models: Models, network: Any, hidden: Tensor, each: Pass) -> Tensor:
    flat, summands = hidden.flatten(0, 1), list[Tensor]()
    if each.needs & {"logprobs", "entropy"}:
        targets = torch.zeros(flat.shape[0], dtype=torch.long)
        logprobs, entropy = head_logprobs(network, flat, targets, with_entropy="entropy" in each.needs)
        summands += [logprobs.sum(), entropy.sum()]
    if "values" in each.needs:
        summands.append(models.heads["value"](flat).sum())
    if "scores" in each.needs:
        summands.append(models.heads["reward"](flat[:1]).sum())
    return torch.stack([summand.float() for summand in summands]).sum()


def _drop_gradient(parameter: Tensor) -> None:
    """Gradients are counted exactly elsewhere."""
    parameter.grad = None


class _Fused(TorchFunctionMode):
    """Takes scaled-dot-product attention as one fused operation; on the meta device torch would spell it out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        if kwargs.get("enable_gqa"):
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()`` would put this mode aside, and recomputed layers would be spelled out."""
        from torch.autograd.graph import _engine_run_backward

        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


class _Live(TorchDispatchMode):
    """Follows the storage of every tensor that an operation returns, those of the models aside."""

    def __init__(self, models: Models) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: dict[int, Any] = {}
        self._own = list(_storages([*models.parameters(), *models.buffers()]))  # held, so that no id is used again
        self._known.update((id(storage), storage) for storage in self._own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._follow, result)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tensors: Iterable[Tensor]) -> Iterable[Any]:
    return (tensor.untyped_storage() for tensor in tensors)
