"""Where the weights of each role are: shared with the policy, a frozen or trained copy of a part, or a copy of the
whole. Built once; knows neither batches nor which role is in use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fairlead.config import AdapterSection
from fairlead.errors import ConfigError, ModelError
from fairlead.models.adapters import Adapter, StartAdapter, add_adapters, decoder_layers, targets, train_also
from fairlead.models.heads import RewardHeads
from fairlead.models.load import Base, load_tokenizer, read_meta
from fairlead.models.pretrained import read_model
from fairlead.types import ReferenceUse

ValueTrunk = Literal["shared", "detached", "adapter", "layers", "model"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """A reward saved with all its weights."""

    folder: Path
    slope: float = 1.0
    """Of what is made of its score, at a score of zero: 1/4 for the probability sigmoid(score)."""


@dataclass(frozen=True, slots=True)
class Forms:
    """How the roles of a run share weights.

    The reference is a frozen copy where all weights are trained, or ``separate``; what is never trained is not copied
    unless ``separate``, and nothing where the reference is asked first alone. Else it is the adapter the policy started
    from, frozen, or the base with adapters off; one that moves is an adapter of its own that begins as the policy's.
    """

    adapter: AdapterSection | None = None
    """Settings of the adapters; none trains all weights."""
    num_layers_unfrozen: int | None = None
    """Without ``adapter``, only so many of the last layers are trained."""
    value_trunk: ValueTrunk = "shared"
    """shared: the value head reads the policy's trunk and its loss reaches it; detached: it does not reach it; adapter:
    the value has an adapter of its own; layers: its last ``num_value_layers`` are its own, those below the policy's;
    model: it is a model of its own."""
    num_value_layers: int = 1
    value_start: Literal["policy", "reward"] = "policy"
    """The value's adapter and head begin as the policy's and at zero, or as those of ``reward``."""
    value_weights: RewardWeights | None = None
    """With value_trunk: model and value_start: reward, what the value's trunk and head begin as."""
    reward: StartAdapter | None = None
    """A saved adapter with its head, frozen: the role ``reward`` beside the others."""
    separate: bool = False
    """The reference is a whole copy, even where an adapter could be switched off instead."""
    reference: ReferenceUse = "live"

    def refuse(self, roles: Iterable[str]) -> None:
        """Raises ModelError for forms that do not go together."""
        is_full, roles = self.adapter is None, tuple(roles)
        if "value" in roles and is_full and self.value_trunk == "adapter":
            raise ModelError("a value with an adapter of its own needs model.adapter", hint="set model.adapter.rank=16")
        if "value" in roles and not is_full and self.value_trunk == "layers":
            raise ModelError(
                "a value with layers of its own needs a policy whose weights are trained, not an adapter",
                hint="give the value an adapter of its own, or leave model.adapter out",
            )
        if self.reward is not None and is_full and roles:
            raise ModelError("a reward's adapter cannot stand on a base that is trained")
        if self.value_start == "reward" and self.value_weights is None:
            if self.reward is None or self.value_trunk not in ("adapter", "model"):
                raise ModelError("a value that begins as the reward needs a shared reward and an adapter of its own")
        elif self.value_start == "reward" and self.value_trunk != "model":
            raise ModelError("a value that begins as a reward with weights of its own needs a model of its own")


@dataclass(slots=True)
class Networks:
    """What was built. An adapter's name stands for its role on the network; none for the base with adapters off."""

    main: Any
    reference: Any
    """A network of its own, or none."""
    value: Any
    """The same."""
    adapters: dict[str, Adapter]
    """Those on ``main``, by name."""
    value_score: Tensor | None = None
    """The head [1, H] that the value's begins as, where it begins as a reward with weights of its own."""


def build(base: Base, roles: tuple[str, ...], main: str, forms: Forms, *, dtype: torch.dtype, seed: int) -> Networks:
    """The networks of a run; ``main`` is the role that is trained. Adapters get weights in ``dtype``."""
    model = base.model
    own = None if forms.adapter is None else Adapter(forms.adapter, _continued(base, forms.adapter))
    judge = None if forms.reward is None else Adapter(forms.reward.settings, forms.reward, trained=False)
    adapters = {name: each for name, each in ((main, own), ("reward", judge)) if each is not None}
    if not adapters:
        _choose_trained(model, forms.num_layers_unfrozen, has_logprobs="policy" in roles)
    reference = value = score = None
    frozen = None if own is None or own.start is None else replace(own, trained=False)
    if "reference" in roles and (forms.separate or (own is None and forms.reference != "first")):
        fixed = () if forms.separate else [p for p in model.parameters() if not p.requires_grad]
        reference = _copy(model, shared=fixed).requires_grad_(False)
        if frozen is not None:
            reference = add_adapters(reference, {"reference": frozen}, dtype)
    elif "reference" in roles and frozen is not None:
        adapters["reference"] = frozen
    elif "reference" in roles and forms.adapter is not None and forms.reference == "moving":
        adapters["reference"] = Adapter(forms.adapter, trained=False)
    if "value" in roles and forms.value_trunk in ("adapter", "layers", "model"):
        start = replace(judge, trained=True) if judge is not None and forms.value_start == "reward" else own
        if forms.value_trunk == "adapter":
            assert start is not None
            adapters["value"] = start
        else:
            value = _value_network(model, forms.num_value_layers if forms.value_trunk == "layers" else None)
            score = None if forms.value_weights is None else _begin_as(value, forms.value_weights, base)
            value = value if start is None else _seeded(seed, lambda: add_adapters(value, {"value": start}, dtype))
    if adapters:
        model = _seeded(seed, lambda: add_adapters(base.model, adapters, dtype))
    return Networks(model, reference, value, adapters, score)


def describe(networks: Networks, base: Base, forms: Forms, roles: Iterable[str]) -> tuple[str, ...]:
    """What each role is, for the manifest."""
    name = base.model.name_or_path or base.model.config.model_type
    found: list[str] = []
    start = base.start if forms.adapter is not None else None
    if start is not None:
        found.append(f"policy: continues the adapter {start.path} on its base {name}; nothing is merged")
    if "reference" in roles:
        if networks.reference is None and forms.adapter is None:
            form = "log-probabilities of the model as it was loaded, taken before the first step"
        elif networks.reference is None:
            form = f"{name} with adapters off" if start is None else _frozen_words(start, base)
        elif forms.adapter is not None:
            form = f"a copy of {name}" if start is None else f"a copy of {name} with {_frozen_words(start, base)}"
        elif forms.num_layers_unfrozen and not forms.separate:
            form = f"a frozen copy of the last {forms.num_layers_unfrozen} layers over the shared trunk"
        else:
            form = "a frozen copy of all weights"
        found.append(f"reference: {form}" + ("; it follows the policy" if forms.reference == "moving" else ""))
    if forms.value_weights is not None:
        found.append(f"value: a model of its own that begins as the reward {forms.value_weights.folder}")
    if forms.reward is not None:
        found.append(f"reward: on the policy's base, {_frozen_words(forms.reward, base)}")
    return tuple(found)


def causal(network: Any) -> Any:
    """The causal language model without peft's wrapper around it."""
    # Only the wrapper has this method; its class would take seconds to import where no adapter is.
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _frozen_words(saved: StartAdapter, base: Base) -> str:
    then = read_meta(saved.path).get("base", {}).get("quantize")
    now = base.quantize and base.quantize.model_dump()
    words = f"the frozen adapter {saved.path}, sha256 {saved.sha256}"
    if then == now:
        return words
    before, after = (f"in {form['bits']} bits" if form else "unquantised" for form in (then, now))
    return f"{words}, trained on the base {before} and used on it {after}"


def _continued(base: Base, wanted: AdapterSection) -> StartAdapter | None:
    """The adapter the base was saved with. Raises ConfigError where the recipe asks for one of another form."""
    if base.start is None:
        return None
    saved, ours = (_facts(base.model, section) for section in (base.start.settings, wanted))
    differ = [f"{key} {saved[key]} there, {ours[key]} here" for key in saved if saved[key] != ours[key]]
    if differ:
        raise ConfigError(
            f"{base.start.path} is an adapter, which model.adapter would continue in another form: {'; '.join(differ)}",
            hint="write the saved adapter's settings, or merge it first: fairlead merge RUN --out DIR, "
            "and start from DIR",
        )
    return base.start


def _facts(model: Any, section: AdapterSection) -> Mapping[str, Any]:
    """What must be equal for one adapter to go on as another."""
    facts = {"method": section.method, "rank": section.rank, "alpha": section.alpha}
    for key, names in (("targets", targets(model, section)), ("train_also", train_also(model, section))):
        facts[key] = _Names(names)
    return facts


class _Names(frozenset[str]):
    """Full names, shown by their last parts and number."""

    def __str__(self) -> str:
        return f"{len(self)} modules ({', '.join(sorted({name.rpartition('.')[2] for name in self}))})"


def _choose_trained(model: Any, number: int | None, *, has_logprobs: bool) -> None:
    """All weights, or those of the last layers alone; never a head that nothing reads."""
    if number is not None:
        model.requires_grad_(False)
        for parameter in _last_layers(model, number, "model.num_layers_unfrozen"):
            parameter.requires_grad_(True)
    elif not has_logprobs and not model.config.tie_word_embeddings:
        model.get_output_embeddings().requires_grad_(False)


def _last_layers(model: Any, number: int, setting: str) -> list[nn.Parameter]:
    stem, total = decoder_layers(model)
    if number > total:
        raise ModelError(f"{setting}={number}, but the model has {total} layers", hint=f"{total} or fewer")
    return list(model.get_submodule(stem)[total - number :].parameters())


def _value_network(model: Any, number: int | None) -> Any:
    """A copy whose last layers are its own, or all of it; the output head, which a value has not, is never copied."""
    if number is None:
        head = model.get_output_embeddings()
        return _copy(model, shared=() if model.config.tie_word_embeddings else head.parameters())
    ours = {id(p) for p in _last_layers(model, number, "ppo.value.num_layers")}
    made = _copy(model, shared=[p for p in model.parameters() if id(p) not in ours])
    for parameter in _last_layers(made, number, ""):
        parameter.requires_grad_(True)
    return made


@torch.no_grad()
def _begin_as(network: Any, start: RewardWeights, base: Base) -> Tensor | None:
    """Give ``network`` the trunk of a saved reward; returns the reward's head [1, H] times its slope, of several their
    mean. None on the meta device, where a run is planned. Raises ModelError for a reward of another form or another
    tokenizer."""
    folder = start.folder
    if base.model.device.type == "meta":
        return None
    if load_tokenizer(str(folder)).get_vocab() != base.tokenizer.get_vocab():
        raise ModelError(
            f"the value cannot begin as the reward {folder}: their tokenizers differ",
            hint="start: policy, or a reward trained from the policy's model",
        )
    reward = read_model(str(folder), network.dtype, base.model.device, kind="sequence classifier")
    try:
        network.base_model.load_state_dict(reward.base_model.state_dict())
    except RuntimeError as error:
        raise ModelError(
            f"the value cannot begin as the reward {folder}, a model of another form: {str(error).splitlines()[-1]}",
            hint="start: policy, or a reward trained from the policy's model",
        ) from error
    score = reward.score.weight
    heads = RewardHeads.read(read_meta(folder), len(score), folder)
    return start.slope * (score if heads is None else heads.mean(score.T)[None])


def _copy(model: Any, *, shared: Iterable[nn.Parameter]) -> Any:
    """A deep copy that holds the ``shared`` parameters themselves."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in shared})


def _seeded(seed: int, make: Callable[[], T]) -> T:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return make()
    finally:
        torch.random.set_rng_state(state)
