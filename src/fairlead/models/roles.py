"""Policy, reference, reward and value as roles on one base: which adapter and which head a pass uses.

One model call is one forward of this module: trunk, gather at ``previous``, chunked head. It knows no algorithm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fairlead.config import AdapterSection
from fairlead.errors import ModelError
from fairlead.models import forms
from fairlead.models.adapters import StartAdapter, activate, adapter_parameters, saved_score
from fairlead.models.attention import Forest
from fairlead.models.forms import Forms, ValueTrunk
from fairlead.models.heads import RewardHeads, ScalarHead, trunk_width
from fairlead.models.last_layer import last_mlp_at, read_places
from fairlead.models.lm_head import head_logprobs, head_statistics, readout, tensors_of
from fairlead.models.load import Base, read_meta
from fairlead.models.offload import offloaded
from fairlead.ops.logprobs import Readout, full_kl
from fairlead.types import Outputs, ReferenceUse, TokenBatch


class Models(nn.Module):
    """The roles of a run.

    Args:
        base: the loaded model, and the adapter to continue where it was saved as one.
        roles: of policy, reference, reward, value. The policy is the one trained, or the reward where there is none.
        adapter, num_layers_unfrozen, value_trunk, num_value_layers, value_start, value_weights, reward, separate,
            reference:
            see `Forms`; with ``reward`` its role is added to the others.
        reward_heads: those of a reward that has several and is trained; a saved one brings its own.
        compared: the roles' outputs are compared with one another, so dropout is off everywhere.

    Raises:
        ModelError: for forms that do not go together, and where nothing would be trained.
    """

    def __init__(
        self,
        base: Base,
        roles: Iterable[str],
        *,
        adapter: AdapterSection | None = None,
        num_layers_unfrozen: int | None = None,
        value_trunk: ValueTrunk = "shared",
        num_value_layers: int = 1,
        value_start: Literal["policy", "reward"] = "policy",
        value_weights: forms.RewardWeights | None = None,
        reward: StartAdapter | None = None,
        separate: bool = False,
        reference: ReferenceUse = "live",
        reward_heads: RewardHeads | None = None,
        compared: bool = True,
        gradient_checkpointing: bool = False,
        offload_activations: bool = False,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        roles = tuple(roles)
        form = Forms(
            adapter,
            num_layers_unfrozen,
            value_trunk,
            num_value_layers,
            value_start,
            value_weights,
            reward,
            separate,
            reference,
        )
        form.refuse(roles)
        self.main = "policy" if "policy" in roles else "reward"
        """The role that is trained and saved."""
        self.roles = roles if reward is None else (*roles, "reward")
        self.tokenizer, self.forest, self.origin = base.tokenizer, base.forest, base.origin
        self.quantize, self._offload = base.quantize, offload_activations
        self.whole: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        """Inside, all weights are here: where they are sharded over ranks, for all but forwards with a gradient."""
        self.embedding_noise = 0.0
        """NEFTune's alpha: noise on the embeddings while training."""
        self.shared_reward = reward
        self._value_trunk, self._autocast, self._role, self._way = value_trunk, autocast, "", base.way
        wide = torch.promote_types(base.model.dtype, torch.float32)
        self.heads, self.reward_heads = _heads(base.model, self.roles, form, reward_heads, wide, seed)
        made = forms.build(base, roles, self.main, form, dtype=wide, seed=seed)
        self.network, self.reference, self.value = made.main, made.reference, made.value
        if made.value_score is not None:
            cast(ScalarHead, self.heads["value"]).start_as(made.value_score)
        self.is_peft = bool(made.adapters)
        self.notes = forms.describe(made, base, form, roles)
        """What each role is, for the manifest."""
        self._of = {role: self._place(role, made) for role in self.roles}
        if compared:
            _switch_dropout_off(self)
        self._recomputes = gradient_checkpointing
        if gradient_checkpointing:
            for network in {id(network): network for network, _ in self._of.values()}.values():
                _recompute_activations(network)
        self._is_own_reference = "reference" in roles and not (self.is_peft or self.reference)
        self.exchanged()
        if roles and not self.trainable:
            raise ModelError("no parameter is trainable", hint="check model.adapter, and what the given model froze")
        self.moving = self._moving() if "reference" in roles and reference == "moving" else {}
        """What of the reference follows the policy, by name: its weight, and the policy's."""
        self.train()

    def _moving(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        place, adapter = self._of["reference"]
        network = self.network if adapter is not None else self.reference or place
        there = dict(network.named_parameters())
        return {
            name: (there[name.replace(f".{self.main}.", ".reference.") if self.is_peft else name], own)
            for name, own in self.network.named_parameters()
            if own.requires_grad
        }

    @torch.no_grad()
    def move_reference(self, mix: float) -> None:
        """reference <- (1 - mix) reference + mix policy."""
        for theirs, own in self.moving.values():
            theirs.lerp_(own.to(theirs.dtype), mix)

    def state(self) -> dict[str, nn.Parameter]:
        """All that changes in a run, by name: what is trained, and what follows it."""
        return self.trainable | {f"reference: {name}": theirs for name, (theirs, _) in self.moving.items()}

    def _place(self, role: str, made: forms.Networks) -> tuple[Any, str | None]:
        """The causal language model of a role, and its adapter on it."""
        own = {"reference": made.reference, "value": made.value}.get(role)
        if own is not None:
            return forms.causal(own), None
        shared = None if role == "reference" else self.main if made.adapters else None
        return forms.causal(made.main), role if role in made.adapters else shared

    # --- what there is ---

    @property
    def causal(self) -> Any:
        """The causal language model without peft's wrapper around it."""
        return forms.causal(self.network)

    @property
    def value_shares_trunk(self) -> bool:
        """The value head reads the policy's trunk: one forward serves both."""
        return self._value_trunk in ("shared", "detached")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def full_precision(self) -> bool:
        """A forward gives the same however its rows are laid out, up to rounding in fp32."""
        return self._autocast is None and self.quantize is None and self.causal.dtype in (torch.float32, torch.float64)

    def parameter_counts(self) -> dict[str, Any]:
        """Total and trainable parameters, heads counted in and named apart."""
        networks = [self.heads, self.network, *([] if self.value is None else [self.value])]
        return {
            "total": sum({id(p): n for network in networks for p, n in _counts(network)}.values()),
            "trainable": sum(p.numel() for p in self.trainable.values()),
            "heads": {role: sum(p.numel() for p in head.parameters()) for role, head in self.heads.items()},
        }

    def reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the reference computes with, by name: the base's weights, and those of its adapter where it has one."""
        network, adapter = self._of["reference"]
        names = adapter_parameters(self.network, adapter) if adapter is not None else {}
        for name, tensor in network.state_dict().items():
            if not (".lora_" in name or ".modules_to_save." in name):
                yield name, tensor
        yield from names.items()

    # --- switching ---

    @contextlib.contextmanager
    def use(self, role: str) -> Iterator[None]:
        """Run forward *and* backward inside: the adapter of ``role`` is active, all trainable parameters stay so."""
        if role not in self.roles:
            raise ModelError(f"this run has no role {role!r}; it has {', '.join(self.roles)}")
        if role == "reference" and self._is_own_reference and self._start != self._writes():
            raise ModelError("the policy has been trained and is no longer its own reference: Algorithm.reference")
        before, self._role = self._role, role
        self._activate(role)
        try:
            yield
        finally:
            self._role = before
            if before:
                self._activate(before)

    def exchanged(self) -> None:
        """Told when parameters were built, or exchanged for others with the same weights."""
        self.trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        self._trained = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        self._start = self._writes()

    def _writes(self) -> int:
        """Grows whenever a trained weight is written to."""
        return sum(parameter._version for parameter in self.trainable.values())

    def _activate(self, role: str) -> None:
        network, adapter = self._of[role]
        if self.is_peft and network is self.causal:
            activate(self.network, adapter)
            for parameter, is_trained in self._trained:
                parameter.requires_grad_(is_trained)

    def active_network(self) -> Any:
        """The causal language model of the role in use, adapter switched: what a sampler decodes with."""
        return self._of[self._role][0] if self._role else self.causal

    # --- the one model call ---

    def forward(
        self, batch: TokenBatch, needs: frozenset[str], temperature: float = 1.0, *, uniform: bool = False
    ) -> Outputs:
        """Compute the fields ``needs`` names, of those of `Outputs`, for the role in use. ``uniform``: see `Pass`."""
        network = self.active_network()
        kept = offloaded(self.parameters()) if self._offload else contextlib.nullcontext()
        read = read_places(batch, tokens=bool(needs - {"scores"}), ends="scores" in needs)
        rows, columns = batch.loss_mask.nonzero(as_tuple=True)  # asked before the trunk, for which a GPU would wait
        with kept, self.autocast():
            hidden = self._trunk(network, batch, read)
        outputs: dict[str, Tensor] = {}
        if needs - {"scores"}:
            before = hidden[rows, batch.previous[rows, columns]]
            if needs & {"logprobs", "entropy"}:
                targets, with_entropy = batch.input_ids[rows, columns], "entropy" in needs
                logprobs, entropy = head_logprobs(
                    network,
                    before,
                    targets,
                    temperature=temperature,
                    with_entropy=with_entropy,
                    support=batch.support,
                    uniform=uniform,
                )
                outputs["logprobs"] = _spread(logprobs, batch, rows, columns)
                if with_entropy:
                    outputs["entropy"] = _spread(entropy, batch, rows, columns)
            if needs & {"collision", "mean_logit"}:
                found = head_statistics(network, before.detach(), temperature=temperature, support=batch.support)
                for name, values in zip(("collision", "mean_logit"), found, strict=True):
                    outputs[name] = _spread(values, batch, rows, columns)
            if "values" in needs:
                inputs = before.detach() if self._value_trunk == "detached" else before
                outputs["values"] = _spread(self.heads["value"](inputs), batch, rows, columns)
        if "scores" in needs:
            scores = self.heads["reward"](hidden.flatten(0, 1)[batch.sequence_ends])
            if self.reward_heads is not None:
                outputs["head_scores"], scores = scores, self.reward_heads.combined(scores)
            outputs["scores"] = scores
        return Outputs(**outputs)

    @torch.no_grad()
    def divergence(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        """KL(policy || reference) of the whole distributions that the counted tokens were drawn from, over their
        support where they have one -> [B, T] in nats, zero off the mask."""
        rows, columns = batch.loss_mask.nonzero(as_tuple=True)
        read, found = read_places(batch, tokens=True, ends=False), list[Readout]()
        for role in ("policy", "reference"):
            with self.use(role):
                network = self.active_network()
                with self.autocast():
                    hidden = self._trunk(network, batch, read)
                found.append(readout(network, hidden[rows, batch.previous[rows, columns]]))
        kl = full_kl(*found, temperature=temperature, support=tensors_of(batch.support))
        return _spread(kl, batch, rows, columns)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the trunk's layers multiply in the type that they are trained in."""
        return contextlib.nullcontext() if self._autocast is None else torch.autocast(self.device.type, self._autocast)

    def _trunk(self, network: Any, batch: TokenBatch, read: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, H]; of ``read``, places in the flattened [B, T], where no others matter."""
        if self.forest:
            given = {"attention_mask": _SEES_NOTHING.to(batch.input_ids.device), "forest": Forest.of(batch, self._way)}
        else:
            given = {"attention_mask": (batch.subtree_end > 0).long()}
        if self.training and self.embedding_noise:
            given["inputs_embeds"] = self._noisy(network.get_input_embeddings()(batch.input_ids), batch)
        else:
            given["input_ids"] = batch.input_ids
        trimmed = contextlib.nullcontext()
        if read is not None and not self._recomputes:  # what is recomputed is so later, when this is over
            trimmed = last_mlp_at(network, read, batch.input_ids.numel())
        with trimmed:
            return network.get_decoder()(position_ids=batch.position_ids, use_cache=False, **given).last_hidden_state

    def _noisy(self, embedded: Tensor, batch: TokenBatch) -> Tensor:
        """Uniform noise within alpha / sqrt(tokens of the sequence x width) on the embeddings [B, T, H]."""
        owner = batch.sequence_ids.clamp(min=0)
        lengths = torch.bincount(batch.sequence_ids[batch.sequence_ids >= 0], minlength=batch.num_sequences)
        size = self.embedding_noise / (lengths[owner] * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size[..., None].to(embedded.dtype)


_SEES_NOTHING = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
"""A 4-D mask is taken by transformers as it is; our attention reads the forest in its stead."""


def _spread(values: Tensor, batch: TokenBatch, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of the counted tokens, at their places in a [B, T] of zeros."""
    return values.new_zeros(batch.input_ids.shape).index_put((rows, columns), values)


def _heads(
    model: Any, roles: Iterable[str], form: Forms, several: RewardHeads | None, dtype: torch.dtype, seed: int
) -> tuple[nn.ModuleDict, RewardHeads | None]:
    """The heads by role, those of a shared reward as they were saved, and frozen; and ``several`` of this reward."""
    width, score = trunk_width(model), None
    if form.reward is not None:
        score = saved_score(form.reward.path)
        several = RewardHeads.read(read_meta(form.reward.path), len(score), form.reward.path)
    outputs = {"value": 1, "reward": 1 if several is None else len(several.names)}
    heads = {
        role: ScalarHead(width, role=role, seed=seed, dtype=dtype, outputs=outputs[role]).to(model.device)
        for role in roles
        if role in outputs
    }
    if score is not None:
        heads["reward"].start_as(score)
        heads["reward"].requires_grad_(False)
        if form.value_start == "reward" and form.value_weights is None:
            heads["value"].start_as(score if several is None else several.mean(score.T)[None])
    return nn.ModuleDict(heads), several


def _counts(network: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Each parameter and how many numbers it stands for: of 4 bits two share a byte."""
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            packed = type(parameter).__name__ == "Params4bit"
            yield (
                parameter,
                cast(Any, module).in_features * cast(Any, module).out_features if packed else parameter.numel(),
            )


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
