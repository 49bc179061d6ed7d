"""Adapters on one base, several side by side, through peft: which modules get one, where it begins, how it is saved.
Decides what peft may not: what is trainable. Knows no roles."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairlead.config import AdapterSection
from fairlead.errors import ModelError
from fairlead.models.identity import weights_sha256

ATTENTION = re.compile("att(e)?n", re.IGNORECASE)
"""In the class or name of a module that holds the projections of an attention layer."""
LINEAR = ("Conv1D", "Linear8bitLt", "Linear4bit")
"""Classes that are linear layers besides torch's own: GPT-2's, and those of bitsandbytes."""
SCORE = "base_model.model.score.weight"
"""Where peft keeps the head of a sequence classifier, beside its adapter."""


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """A saved adapter that another begins as, or that is used frozen."""

    path: Path
    sha256: str
    settings: AdapterSection
    """Its targets are full names: what the file holds."""

    @classmethod
    def read(cls, folder: Path) -> StartAdapter:
        """Raises ModelError for an adapter of a kind that cannot be continued."""
        return cls(folder, weights_sha256(folder) or "", saved_settings(folder))


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter wanted on a base: new, starting at zero effect, or with the weights of a saved one."""

    settings: AdapterSection
    start: StartAdapter | None = None
    trained: bool = True


# --- which modules -------------------------------------------------------------------------------------------------


def targets(model: Any, section: AdapterSection) -> list[str]:
    """Full names of the linear layers to adapt. Raises ModelError when a target matches none, listing those there are.

    The output head is adapted only where it is named. ``attention``: linear layers below a module whose class or name
    says attention; ``mlp``: the others of the layers, which some families keep in no module of their own.
    """
    head = model.get_output_embeddings()
    everything = [name for name, module in model.named_modules() if is_linear(module)]
    linears = [name for name in everything if model.get_submodule(name) is not head]
    stem, number = decoder_layers(model)
    wanted = section.targets
    if wanted == "all-linear":
        found = linears
    elif wanted in ("attention", "mlp"):
        inner = [name for name in linears if name.startswith(f"{stem}.")]
        found = [name for name in inner if _in_attention(model, name) == (wanted == "attention")]
    elif isinstance(wanted, str):
        if not wanted.startswith("re:"):
            raise ModelError(
                f"model.adapter.targets={wanted!r} is none of all-linear, attention, mlp",
                hint=f"write a list of names, [{wanted}], or re: and a regular expression",
            )
        try:
            found = [name for name in everything if re.fullmatch(wanted[3:], name)]
        except re.error as error:
            raise ModelError(f"model.adapter.targets={wanted!r} is no regular expression: {error}") from error
    else:
        missing = [name for name in wanted if not any(_ends(full, name) for full in everything)]
        if missing:
            raise _no_target(f"no layer is named {', '.join(missing)}", linears)
        found = [full for full in everything if any(_ends(full, name) for name in wanted)]
    first, last = _range(section, number)
    if (first, last) != (0, number - 1):
        found = [name for name in found if first <= _layer(name, stem) <= last]
    also = train_also(model, section)
    found = [name for name in found if name not in also]
    if not found:
        raise _no_target(f"{wanted!r} matches no linear layer of layers {first} to {last}", linears)
    return found


def train_also(model: Any, section: AdapterSection) -> list[str]:
    """Full names of the modules that are trained whole beside the adapter; embeddings and head, where these are tied,
    together."""
    holders = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    missing = [name for name in section.train_also if not any(_ends(full, name) for full in holders)]
    if missing:
        names = sorted({name.rpartition(".")[2] for name in holders})
        raise ModelError(
            f"model.adapter.train_also: no module is named {', '.join(missing)}",
            hint=f"modules of this model: {', '.join(names)}",
        )
    found = [full for full in holders if any(_ends(full, name) for name in section.train_also)]
    tied = [name for name in holders if model.get_submodule(name) in _embeddings(model)]
    return list(dict.fromkeys([*found, *tied])) if _is_tied(model) and set(found) & set(tied) else found


def _embeddings(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _is_tied(model: Any) -> bool:
    given, head = _embeddings(model)
    return head is not None and head.weight is given.weight


def decoder_layers(model: Any) -> tuple[str, int]:
    """Full name of the list of the model's layers, and how many there are."""
    number = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return name, number
    raise ModelError(f"{type(model).__name__} keeps its {number} layers in no list of modules")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in LINEAR


def _in_attention(model: Any, name: str) -> bool:
    above = name.split(".")[:-1]
    return any(
        ATTENTION.search(part) or ATTENTION.search(type(model.get_submodule(".".join(above[: i + 1]))).__name__)
        for i, part in enumerate(above)
    )


def _range(section: AdapterSection, number: int) -> tuple[int, int]:
    first, last = section.layers or (number - (section.last or number), number - 1)
    if not 0 <= first <= last < number:
        asked = f"layers={list(section.layers)}" if section.layers else f"last={section.last}"
        raise ModelError(
            f"model.adapter.{asked}, but the model has {number} layers",
            hint=f"layers are counted from 0 to {number - 1}",
        )
    return first, last


def _layer(name: str, stem: str) -> int:
    """The number of the layer a module stands in; -1 for none."""
    inside = name.removeprefix(f"{stem}.").split(".")[0] if name.startswith(f"{stem}.") else ""
    return int(inside) if inside.isdigit() else -1


def _ends(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _no_target(what: str, linears: list[str]) -> ModelError:
    names = sorted({name.rpartition(".")[2] for name in linears})
    return ModelError(f"model.adapter.targets: {what}", hint=f"linear layers of this model: {', '.join(names)}")


# --- on the base ---------------------------------------------------------------------------------------------------


def add_adapters(model: Any, wanted: Mapping[str, Adapter], dtype: torch.dtype) -> Any:
    """The model in peft's wrapper with an adapter of each name, weights in ``dtype``, trainable where so wanted.

    Raises ModelError for a saved adapter whose matrices do not fit this base.
    """
    from peft import get_peft_model

    configs = {name: _config(model, adapter.settings) for name, adapter in wanted.items()}
    is_tied = _is_tied(model)
    first, *others = wanted
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # tied below: peft ties one alone
        wrapped = get_peft_model(model, configs[first], adapter_name=first, autocast_adapter_dtype=False)
        for name in others:
            wrapped.add_adapter(name, configs[name], autocast_adapter_dtype=False)
    wrapped.requires_grad_(False)
    for name, adapter in wanted.items():
        given, head = (getattr(module, "modules_to_save", {}) for module in _embeddings(model))
        if is_tied and name in head:
            head[name].weight = given[name].weight
        for parameter in adapter_parameters(wrapped, name).values():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(adapter.trained)
        if adapter.start is not None:
            _fill(wrapped, name, adapter.start)
    _compute_in(wrapped, model.dtype)
    return wrapped


def adapter_parameters(wrapped: Any, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, modules trained whole included, by their names in the wrapper."""
    return {
        full: parameter
        for full, parameter in wrapped.named_parameters()
        if (".lora_" in full or ".modules_to_save." in full) and f".{name}." in f"{full}."
    }


def activate(model: Any, name: str | None) -> None:
    """Make one adapter active, or none; gradients are the caller's affair, since peft changes requires_grad here."""
    tuner = model.base_model
    if name is None:
        tuner.disable_adapter_layers()
    else:
        tuner.enable_adapter_layers()
        tuner.set_adapter(name)


def _config(model: Any, section: AdapterSection) -> Any:
    from peft import LoraConfig

    wanted, also = targets(model, section), train_also(model, section)
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]  # peft divides by it, a fraction is fine
        lora_dropout=section.dropout,
        use_rslora=section.method == "rslora",
        use_dora=section.method == "dora",
        target_modules=wanted,
        modules_to_save=also or None,
        fan_in_fan_out=any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in wanted),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _compute_in(wrapped: Any, dtype: torch.dtype) -> None:
    """Modules trained whole, in fp32, stand between layers of another type: cast what enters and leaves them, as peft
    does for its matrices."""

    def enter(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        own = next(module.parameters()).dtype
        return tuple(t.to(own) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given)

    for name, module in wrapped.named_modules():
        if ".modules_to_save." in name and name.rpartition(".")[0].endswith(".modules_to_save"):
            if torch.promote_types(dtype, next(module.parameters()).dtype) == dtype:
                continue
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(lambda _, __, result: result.to(dtype))


# --- saved ---------------------------------------------------------------------------------------------------------


def saved_settings(folder: Path) -> AdapterSection:
    """The settings of an adapter saved by us or by peft, its targets as the file holds them."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    foreign = [
        key for key in ("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters") if config.get(key)
    ]
    foreign += ["bias"] if config.get("bias", "none") != "none" else []
    foreign += ["use_rslora with use_dora"] if config.get("use_rslora") and config.get("use_dora") else []
    if config.get("peft_type") != "LORA" or foreign:
        raise ModelError(
            f"{folder} is an adapter of a kind that is not continued: {', '.join(foreign) or config.get('peft_type')}",
            hint=f"merge it into its base first: fairlead merge {folder} --out DIR",
        )
    names = {
        key.split(".lora_")[0].removeprefix("base_model.model.") for key in saved_weights(folder) if ".lora_" in key
    }
    heads = {"score", "classifier"} if config.get("task_type") == "SEQ_CLS" else set[str]()
    return AdapterSection(
        method="dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=tuple(sorted(names)),
        train_also=tuple(name for name in config.get("modules_to_save") or () if name not in heads),
    )


def saved_weights(folder: Path) -> dict[str, Tensor]:
    from peft.utils.save_and_load import load_peft_weights

    try:
        return cast(dict[str, Tensor], load_peft_weights(str(folder), device="cpu"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no adapter that can be read: {error}") from error


def saved_score(folder: Path) -> Tensor:
    """The head [K, H] of a reward saved as an adapter. Raises ModelError where it lacks one."""
    found = saved_weights(folder).get(SCORE)
    if found is None:
        raise ModelError(f"{folder} lacks its score head", hint="give the run of a reward stage")
    return found


def save_adapter(wrapped: Any, name: str, folder: Path, *, score: Tensor | None = None) -> None:
    """One adapter as peft saves it, for a plain load over its base; with ``score`` [K, H], the head of a reward, for
    a sequence classifier of so many labels over it."""
    from safetensors.torch import save_file

    config = copy.copy(wrapped.peft_config[name])
    for key, value in vars(config).items():
        if isinstance(value, set):  # whose order is another in every process
            setattr(config, key, sorted(cast(set[str], value)))
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or wrapped.get_base_model().name_or_path or None
    weights = _state(wrapped, name)
    given, head = (getattr(module, "modules_to_save", {}) for module in _embeddings(wrapped.get_base_model()))
    config.ensure_weight_tying = name in given and name in head and given[name].weight is head[name].weight
    if score is not None:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [*(config.modules_to_save or ()), "score"]
        weights[SCORE] = score
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in weights.items()},
        folder / "adapter_model.safetensors",
    )
    config.save_pretrained(str(folder))


def _state(wrapped: Any, name: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)


def _fill(wrapped: Any, name: str, start: StartAdapter) -> None:
    own = _state(wrapped, name)
    saved = saved_weights(start.path)
    saved.pop(SCORE, None)
    shapes, wanted = ({key: tuple(value.shape) for key, value in each.items()} for each in (saved, own))
    if shapes != wanted:
        odd = sorted(key for key in shapes | wanted if shapes.get(key) != wanted.get(key))
        raise ModelError(
            f"{start.path} is an adapter of another base: of {len(odd)} tensors that do not fit, {odd[0]} is "
            f"{shapes.get(odd[0], 'missing')} there and {wanted.get(odd[0], 'missing')} here",
            hint="give the base it was trained on",
        )
    with torch.no_grad():
        for key, tensor in saved.items():
            own[key].copy_(tensor)
