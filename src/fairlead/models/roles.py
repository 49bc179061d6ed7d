"""Policy, reference, reward and value as roles on one base: which adapter and which head a pass uses.

One model call is one forward of this module: trunk, gather at ``previous``, chunked head. It knows no algorithm.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fairlead.config import AdapterSection
from fairlead.errors import ModelError
from fairlead.models.adapters import activate, add_adapters
from fairlead.models.attention import Forest
from fairlead.models.heads import ScalarHead
from fairlead.models.load import Base
from fairlead.ops.logprobs import token_logprobs
from fairlead.types import Outputs, TokenBatch

ValueTrunk = Literal["shared", "detached", "adapter"]


class Models(nn.Module):
    """The roles of a run.

    Args:
        base: the loaded model.
        roles: of policy, reference, reward, value. The first of policy and reward is the one trained.
        adapter: LoRA settings; none trains all weights.
        value_trunk: ``shared``: the value head reads the policy's trunk and its loss reaches it; ``detached``: it does
            not reach it; ``adapter``: the value has an adapter of its own.
        compared: the roles' outputs are compared with one another, so dropout is off everywhere.
    """

    def __init__(
        self,
        base: Base,
        roles: Iterable[str],
        *,
        adapter: AdapterSection | None = None,
        value_trunk: ValueTrunk = "shared",
        compared: bool = True,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.roles = tuple(roles)
        self.tokenizer, self.forest = base.tokenizer, base.forest
        self._value_trunk, self._autocast, self._role = value_trunk, autocast, ""
        main = "reward" if "reward" in self.roles else "policy"
        if value_trunk == "adapter" and "value" in self.roles and adapter is None:
            raise ModelError("a value with an adapter of its own needs model.adapter", hint="set model.adapter.rank=16")
        self._adapter_of: dict[str, str | None] = {role: main for role in self.roles if role != "reference"}
        if value_trunk == "adapter" and "value" in self.roles:
            self._adapter_of["value"] = "value"
        self.network: Any = base.model
        self.reference: Any = None
        if "reference" in self.roles:
            if adapter is None:
                self.reference = copy.deepcopy(base.model).requires_grad_(False)
            self._adapter_of["reference"] = None
        hidden, device = base.model.get_input_embeddings().weight.shape[1], base.model.device
        wide = torch.promote_types(base.model.dtype, torch.float32)
        self.heads = nn.ModuleDict(
            {r: ScalarHead(_trunk_width(base.model, hidden), role=r, seed=seed, dtype=wide).to(device)
             for r in self.roles if r in ("value", "reward")}
        )  # fmt: skip
        self.is_peft = adapter is not None
        if adapter is not None:
            self.network.requires_grad_(False)
            names = sorted({name for name in self._adapter_of.values() if name is not None}, key=lambda n: n != main)
            state = torch.random.get_rng_state()
            torch.manual_seed(seed)
            self.network = add_adapters(base.model, adapter, names)
            torch.random.set_rng_state(state)
            for name, parameter in self.network.named_parameters():
                if ".lora_" in name:
                    parameter.requires_grad_(True)
                    parameter.data = parameter.data.to(wide)
        if "policy" not in self.roles and main == "reward":
            self.causal.get_output_embeddings().requires_grad_(
                self.causal.config.tie_word_embeddings and not self.is_peft
            )
        if compared:
            _switch_dropout_off(self)
        if gradient_checkpointing:
            _recompute_activations(self.causal)
        self.trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ModelError("no parameter is trainable", hint="check model.adapter")
        self.train()
        if self.reference is not None:
            self.reference.eval()

    # --- what there is ---

    @property
    def causal(self) -> Any:
        """The causal language model without peft's wrapper around it."""
        return self.network.get_base_model() if self.is_peft else self.network

    @property
    def value_shares_trunk(self) -> bool:
        """The value head reads the policy's trunk: one forward serves both."""
        return self._value_trunk != "adapter"

    @property
    def device(self) -> torch.device:
        return next(iter(self.trainable.values())).device

    def parameter_counts(self) -> dict[str, Any]:
        """Total and trainable parameters, heads counted in and named apart."""
        return {
            "total": sum(p.numel() for p in self.network.parameters())
            + sum(p.numel() for p in self.heads.parameters()),
            "trainable": sum(p.numel() for p in self.trainable.values()),
            "heads": {role: sum(p.numel() for p in head.parameters()) for role, head in self.heads.items()},
        }

    # --- switching ---

    @contextlib.contextmanager
    def use(self, role: str) -> Iterator[None]:
        """Run forward *and* backward inside: the adapter of ``role`` is active, all trainable parameters stay so."""
        if role not in self.roles:
            raise ModelError(f"this run has no role {role!r}; it has {', '.join(self.roles)}")
        before, self._role = self._role, role
        if self.is_peft:
            self._activate(self._adapter_of[role])
        try:
            yield
        finally:
            self._role = before
            if self.is_peft and before:
                self._activate(self._adapter_of[before])

    def _activate(self, name: str | None) -> None:
        activate(self.network, name)
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)

    def active_network(self) -> Any:
        """The causal language model of the role in use, adapter switched: what a sampler decodes with."""
        return self.reference if self._role == "reference" and self.reference is not None else self.causal

    # --- the one model call ---

    def forward(self, batch: TokenBatch, needs: frozenset[str], temperature: float = 1.0) -> Outputs:
        """Compute the fields ``needs`` names (logprobs, entropy, values, scores) for the role in use."""
        network = self.active_network()
        with torch.autocast(batch.input_ids.device.type, self._autocast or torch.bfloat16, self._autocast is not None):
            hidden = self._trunk(network, batch)
        outputs: dict[str, Tensor] = {}
        if needs & {"logprobs", "entropy", "values"}:
            rows, columns = batch.loss_mask.nonzero(as_tuple=True)
            before = hidden[rows, batch.previous[rows, columns]]
            if needs & {"logprobs", "entropy"}:
                head = network.get_output_embeddings()
                bias = None if head.bias is None else head.bias.to(before.dtype)
                logprobs, entropy = token_logprobs(
                    before,
                    head.weight.to(before.dtype),
                    batch.input_ids[rows, columns],
                    bias=bias,
                    temperature=temperature,
                    with_entropy="entropy" in needs,
                )
                outputs["logprobs"] = _spread(logprobs, batch, rows, columns)
                if "entropy" in needs:
                    outputs["entropy"] = _spread(entropy, batch, rows, columns)
            if "values" in needs:
                inputs = before.detach() if self._value_trunk == "detached" else before
                outputs["values"] = _spread(self.heads["value"](inputs), batch, rows, columns)
        if "scores" in needs:
            outputs["scores"] = self.heads["reward"](hidden.flatten(0, 1)[batch.sequence_ends])
        return Outputs(**outputs)

    def _trunk(self, network: Any, batch: TokenBatch) -> Tensor:
        """Last hidden states [B, T, H]."""
        if self.forest:
            given = {"attention_mask": _SEES_NOTHING.to(batch.input_ids.device), "forest": Forest.of(batch)}
        else:
            given = {"attention_mask": (batch.subtree_end > 0).long()}
        return network.get_decoder()(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **given
        ).last_hidden_state


_SEES_NOTHING = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
"""A 4-D mask is taken by transformers as it is; our attention reads the forest in its stead."""


def _spread(values: Tensor, batch: TokenBatch, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of the counted tokens, at their places in a [B, T] of zeros."""
    return values.new_zeros(batch.input_ids.shape).index_put((rows, columns), values)


def _trunk_width(model: Any, embedding: int) -> int:
    """Width of the last hidden states (OPT-350m's differs from its layers')."""
    head = model.get_output_embeddings()
    return int(head.weight.shape[1]) if head is not None else embedding


def _recompute_activations(model: Any) -> None:
    """Non-reentrant checkpointing, under the name transformers has for it since 5.20 or the older one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _switch_dropout_off(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "resid_pdrop", "attn_pdrop"):
            if isinstance(getattr(child, name, None), float):
                setattr(cast(Any, child), name, 0.0)
