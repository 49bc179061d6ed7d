"""The output head of a causal language model: hidden states to logits, and to log-probabilities of tokens.

Knows the forms in which families scale and cap their logits, and what peft may have put around the head; a model
whose own logits are of another form is refused when it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairlead.errors import ModelError
from fairlead.ops.logprobs import Readout, logit_statistics, token_logprobs
from fairlead.types import Support


@dataclass(frozen=True, slots=True)
class LogitForm:
    """logits = cap * tanh(raw / cap), raw = scale * (hidden @ weight.T + bias); without a cap, raw."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitForm:
        """What a configuration says: Cohere multiplies, Granite divides, Gemma caps."""
        text = config.get_text_config()
        scale = getattr(text, "logit_scale", None) or 1.0
        scale /= getattr(text, "logits_scaling", None) or 1.0
        return cls(float(scale), getattr(text, "final_logit_softcapping", None))


def last_logits(network: Any, hidden: Tensor, form: LogitForm | None = None) -> Tensor:
    """``hidden`` [R, H] -> the model's logits [R, V], in max(fp32, dtype). For a few rows: a sampler's."""
    form, head = form or LogitForm.of(network.config), network.get_output_embeddings()
    logits = head(hidden.to(head.weight.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if form.scale != 1.0:
        logits.mul_(form.scale)
    return logits if form.cap is None else logits.div_(form.cap).tanh_().mul_(form.cap)


def head_logprobs(
    network: Any,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    support: Support | None = None,
    uniform: bool = False,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the model's head as it stands: hidden [N, H], targets [N] -> log-probabilities [N] and
    entropies [N] (or an empty tensor). An adapter on the head is taken by its factors: no second [V, H] is made. Raises
    ModelError for an adapter that is not low-rank."""
    weight, form = _head(network, hidden)
    form |= {"temperature": temperature, "with_entropy": with_entropy, "support": tensors_of(support)}
    return token_logprobs(hidden, weight, targets, **form, uniform=uniform)


def head_statistics(
    network: Any, hidden: Tensor, *, temperature: float = 1.0, support: Support | None = None
) -> tuple[Tensor, Tensor]:
    """`logit_statistics` of the model's head as it stands: hidden [N, H] -> [N], [N]."""
    weight, form = _head(network, hidden)
    return logit_statistics(hidden, weight, **form, temperature=temperature, support=tensors_of(support))


def readout(network: Any, hidden: Tensor) -> Readout:
    """Hidden states [N, H] with the model's head as it stands, for `full_kl`."""
    weight, form = _head(network, hidden)
    return Readout(hidden, weight, **form)


def tensors_of(support: Support | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """As the operations take it."""
    return None if support is None else (support.kept, support.counts, support.banned)


def _head(network: Any, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The head's weight, and how logits come from it."""
    head, low_rank = network.get_output_embeddings(), None
    if hasattr(head, "modules_to_save"):  # peft's module trained in full
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    if hasattr(head, "lora_A"):
        low_rank = _factors(head, hidden)
        head = head.base_layer
    form = LogitForm.of(network.config)
    return head.weight.to(hidden.dtype), {
        "bias": None if head.bias is None else head.bias.to(hidden.dtype),
        "low_rank": low_rank,
        "scale": form.scale,
        "cap": form.cap,
    }


def _factors(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """The active adapters of peft's LoRA layer: (hidden through the first factor, scaled [N, r]; the second [V, r])."""
    names = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters or head.merged or not names:
        return None
    if any(name in head.lora_variant or head.lora_B[name].bias is not None for name in names):
        raise ModelError(
            "the adapter on the output head is no plain LoRA (DoRA, or a bias of its own)",
            hint="leave the head out of model.adapter.targets, or name it in model.adapter.train_also",
        )
    reduced: list[Tensor] = []
    for name in names:
        first = head.lora_A[name]
        reduced.append(first(head.lora_dropout[name](hidden.to(first.weight.dtype))) * head.scaling[name])
    return torch.cat(reduced, dim=1), torch.cat([head.lora_B[name].weight for name in names], dim=1)


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Raise ModelError where the model's own logits are not of a form known here. Two tokens go through the model; its
    last hidden states are replaced by larger ones, at which a cap shows."""
    head, dtype = model.get_output_embeddings(), model.dtype
    if head is None:
        raise ModelError(f"{model.config.model_type} has no output head", hint="give a causal language model")
    if model.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, head.weight.shape[1], generator=generator).to(head.weight.device, head.weight.dtype)
    hidden *= 40 / head(hidden).abs().max().clamp(min=1e-3)

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    handle, training = model.get_decoder().register_forward_hook(replace), model.training
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=hidden.device)
        own = model.eval()(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    finally:
        handle.remove()
        model.train(training)
    ours = last_logits(model, hidden[0])
    bound = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    if float((own - ours).abs().max()) > bound * float(own.abs().max()):
        raise ModelError(
            f"{model.config.model_type} makes its logits in a way that is not known here: they differ from "
            f"scale * hidden @ weight.T with a soft cap",
            hint="use a model of another family",
        )
