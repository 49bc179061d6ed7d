"""The plan of a run: its models built on the meta device from a configuration, their tree, and what memory they take at
the worst moment. Reads no weights and no data; the roles are built by the caller's function, the one training uses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairlead.config import ModelSection, Recipe
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.errors import ModelError
from fairlead.models.adapters import saved_settings
from fairlead.models.load import Base, base_origin, build, pick_device, prepare, read_meta, resolve_folder, start_of
from fairlead.models.precision import dtype_of
from fairlead.models.pretrained import read_config
from fairlead.models.quantize import prepare_quantised
from fairlead.models.roles import Models
from fairlead.planning import memory, trace
from fairlead.planning.memory import Part
from fairlead.planning.trace import Peaks
from fairlead.planning.tree import Node, tree
from fairlead.rollout.rewards import classifier_dtype, model_paths
from fairlead.types import Algorithm, TokenBatch

META = torch.device("meta")
LARGEST_PASS = 65536
"""Tokens of one forward pass beyond which nothing becomes faster."""
FILLED = 0.8
"""The share of free memory that is planned for."""
SAMPLE_TOKENS = 64
"""New tokens of a sample where the algorithm samples nothing itself."""


@dataclass(frozen=True, slots=True)
class Step:
    """The largest micro-batch and its working memory in bytes."""

    rows: int
    tokens: int
    peaks: Peaks
    copies: int
    """Weights in another type, held by autocast from forward to backward."""

    @property
    def bytes(self) -> int:
        return self.peaks.kept + self.peaks.head + self.peaks.temporaries + self.copies


@dataclass(frozen=True, slots=True)
class Decoding:
    """Rows decoded together, to their full length."""

    rows: int
    length: int
    cache: int
    prompts: int
    """Working memory while the prompts are read."""

    @property
    def bytes(self) -> int:
        return self.cache + self.prompts


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything in bytes, unless it is a count."""

    algorithm: str
    architecture: str
    layers: int
    dtype: str
    device: str
    modules: Node
    parts: tuple[Part, ...]
    parameters: int
    """Adapters and heads counted; a frozen copy and other models aside."""
    trainable: int
    buffers: int
    others: Mapping[str, int]
    """Weights of models beside these, a reward run's say."""
    rollouts: int
    """Experience of a round in main memory."""
    checkpointing: bool
    step: Step | None
    decoding: Decoding | None
    untraced: str | None
    """Why the working memory is not known."""
    free: int
    size: int
    micro_batch_tokens: int
    """Those of the recipe, or what was found to fit."""

    @property
    def held(self) -> int:
        """Through the whole run, on the device."""
        sums = memory.total(self.parts)
        rollouts = self.rollouts if self.device == "cpu" else 0
        return sums["weights"] + sums["optimizer"] + self.buffers + sum(self.others.values()) + rollouts

    @property
    def worst(self) -> int:
        """At the worst moment: a step with its gradients, or decoding."""
        step = memory.total(self.parts)["gradients"] + (self.step.bytes if self.step else 0)
        return self.held + max(step, self.decoding.bytes if self.decoding else 0)

    @property
    def share(self) -> float:
        return self.trainable / self.parameters

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for a program to read."""
        return {**asdict(self), "held": self.held, "worst": self.worst, "fits": self.worst <= self.free}


BuildModels = Callable[[Recipe, Algorithm[Any], Base, torch.device], Models]


def plan_run(
    recipe: Recipe,
    algorithm: Algorithm[Any],
    build_models: BuildModels,
    *,
    given: Any = None,
    tokenizer: Any = None,
) -> Plan:
    """The plan of a recipe. ``given`` is a model handed in through Python; ``tokenizer``, where there is one already,
    says how far the embeddings grow. Raises ModelError and ConfigError as training would."""
    device = pick_device(recipe.model.device)
    if recipe.train.micro_batch_tokens == "auto":
        known = {"given": given, "tokenizer": tokenizer}
        recipe = with_budget(recipe, fitting_tokens(recipe, algorithm, build_models, **known))
    base = meta_base(recipe.model, device, given=given, tokenizer=tokenizer)
    with META:
        models = build_models(recipe, algorithm, base, device)
    parts = tuple(memory.parts(models, recipe.optim))
    roles = nn.ModuleDict(dict(sorted(models.named_children(), key=lambda child: child[0] != "network")))
    modules = tree(roles, models.trainable.values(), memory.parameter_sizes(models), "models")
    buffers = sum(buffer.nbytes for buffer in models.buffers())
    step, decoding, untraced = None, None, None
    try:
        decoding = _decoding(recipe, models) if "policy" in models.roles else None
        step = _step(recipe, algorithm, models)
    except RuntimeError as error:
        untraced = f"{base.model.config.model_type} cannot be followed without weights: {error}".splitlines()[0]
    free, size = memory.available(device)
    return Plan(
        algorithm=algorithm.name,
        architecture=base.model.config.model_type,
        layers=base.model.config.num_hidden_layers,
        dtype=str(base.model.dtype).removeprefix("torch."),
        device=device.type,
        modules=modules,
        parts=parts,
        parameters=sum(part.parameters for part in parts if part.role != "reference"),
        trainable=sum(part.trainable for part in parts),
        buffers=buffers,
        others=_others(recipe, models, device),
        rollouts=_rollouts(recipe),
        checkpointing=recipe.model.gradient_checkpointing,
        step=step,
        decoding=decoding,
        untraced=untraced,
        free=free,
        size=size,
        micro_batch_tokens=recipe.train.tokens_or_default,
    )


def fitting_tokens(recipe: Recipe, algorithm: Algorithm[Any], build_models: BuildModels, **known: Any) -> int:
    """Tokens of the largest forward pass that leaves a fifth of the free memory free, on the line through the plans of
    two sizes; at least one row, at most LARGEST_PASS."""
    row = min(recipe.data.max_length, LARGEST_PASS)
    one, two = (plan_run(with_budget(recipe, size), algorithm, build_models, **known) for size in (row, 2 * row))
    if one.step is None or two.step is None:
        return recipe.train.tokens_or_default
    rows = (one.step.tokens, two.step.tokens)
    slope = (two.step.bytes - one.step.bytes) / max(1, rows[1] - rows[0])
    fixed = one.held + memory.total(one.parts)["gradients"] + one.step.bytes - slope * rows[0]
    fits = (FILLED * one.free - fixed) / slope if slope > 0 else LARGEST_PASS
    return max(row, min(LARGEST_PASS, int(fits)) // row * row)


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_tokens": tokens})})


# --- models without weights ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Stands for a tokenizer of which the size alone is known."""

    size: int
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int = 1

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return []


def meta_base(section: ModelSection, device: torch.device, *, given: Any = None, tokenizer: Any = None) -> Base:
    """The base that training on ``device`` would load, its parameters without storage."""
    start = None if given is not None or section.path in shipped_shapes() else start_of(section)
    with META:
        if given is None and section.scratch is not None:
            tokenizer = tokenizer or _Vocabulary(section.scratch.vocab_size)
            model = build(section.scratch, tokenizer, 0, dtype_of(section, device))
        elif given is not None:
            model = _from_config(copy.deepcopy(given.config), given.dtype)
        else:
            model = _from_config(model_config(section.path or ""), dtype_of(section, device))
    if section.quantize is not None:
        memory.mark_quantised(model, section.quantize)
        prepare_quantised(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows and section.add_tokens:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base = prepare(
        model,
        tokenizer or _Vocabulary(rows),
        None,
        META,
        way="eager" if section.attention == "eager" else "auto",
        kernel=section.kernels if device.type == "cpu" else "none",
    )
    return replace(base, start=start)


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ModelError(f"{config.model_type} is no causal language model: {error}") from error


def shipped_shapes() -> dict[str, Path]:
    """Configurations that come with the package, by name."""
    folder = Path(str(resources.files("fairlead.planning"))) / "shapes"
    return {path.name: path for path in sorted(folder.iterdir())}


def model_config(path: str) -> Any:
    """transformers' configuration of a folder, a run, an adapter (its base's), a hub id or a shipped shape."""
    if path in shipped_shapes():
        return read_config(str(shipped_shapes()[path]))
    return read_config(base_origin(path))


# --- working memory ------------------------------------------------------------------------------------------------


def _step(recipe: Recipe, algorithm: Algorithm[Any], models: Models) -> Step:
    batch = _batch(recipe, models)
    autocast = getattr(models, "_autocast", None)
    copies = 0
    if autocast is not None:
        kinds = [module for module in models.network.modules() if type(module).__name__ in ("Linear", "Conv1D")]
        copies = sum(m.weight.numel() * autocast.itemsize for m in kinds if m.weight.dtype == torch.float32)
        models.to(autocast)
    peaks = max(
        (trace.training_peaks(models, each, batch) for each in algorithm.passes(recipe.settings)),
        key=lambda found: found.kept + found.head + found.temporaries,
    )
    return Step(batch.input_ids.shape[0], batch.input_ids.numel(), peaks, copies)


def _batch(recipe: Recipe, models: Models) -> TokenBatch:
    """As full as the budget allows: texts of max_length, side by side where rows are packed."""
    budget = recipe.train.tokens_or_default
    length = min(recipe.data.max_length, budget, _positions(models))
    packed = recipe.data.packing != "none" and models.forest
    return token_batch([Tree((), ((0,) * length,))] * max(1, budget // length), packed=packed, pad_id=0)


def _positions(models: Models) -> int:
    return getattr(models.causal.config, "max_position_embeddings", None) or 2**31


def _decoding(recipe: Recipe, models: Models) -> Decoding:
    settings = recipe.settings
    rows = getattr(settings, "rollout_rows", recipe.train.num_samples)
    prompts = -(-rows // getattr(settings, "num_samples", 1))
    new = getattr(settings, "max_new_tokens", SAMPLE_TOKENS)
    longest = recipe.data.max_prompt_length or recipe.data.max_length - getattr(settings, "max_new_tokens", 1)
    prompt = max(1, min(longest, _positions(models) - new))
    cache = memory.cache_bytes(models.causal.config, rows=rows, length=prompt + new, dtype=models.causal.dtype)
    return Decoding(rows, prompt + new, cache, trace.decoding_peak(models, prompts, prompt) if rows else 0)


def _rollouts(recipe: Recipe) -> int:
    """Experience of one round: ids of 8 bytes for each token, and for each new token seven numbers in fp32 (log-probs
    of sampler, policy and reference, entropy, values, advantages, returns)."""
    size, new = getattr(recipe.settings, "rollout_size", 0), getattr(recipe.settings, "max_new_tokens", 0)
    prompt = recipe.data.max_prompt_length or recipe.data.max_length - new
    size = (recipe.data.limit or 0) if size == "all" else size
    return size * (8 * prompt + getattr(recipe.settings, "num_samples", 1) * (8 + 7 * 4) * new)


def _others(recipe: Recipe, models: Models, device: torch.device) -> dict[str, int]:
    """Weights of the reward models, and of a teacher, that are loaded beside the roles."""
    given = {"reward": getattr(recipe.settings, "reward", None), **getattr(recipe.settings, "watch", {})}
    shared = models.shared_reward and models.shared_reward.path
    places = {
        name: [path for path in model_paths(source) if shared is None or resolve_folder(path) != shared]
        for name, source in given.items()
    }
    found = {name: sum(_reward_bytes(path, device) for path in paths) for name, paths in places.items() if paths}
    if (teacher := getattr(recipe.settings, "teacher", None)) is not None:
        found["teacher"] = _bytes(meta_base(ModelSection(path=teacher), device).model)
    return found


def _reward_bytes(place: str, device: torch.device) -> int:
    """An adapter is loaded on a base of its own, a classifier as it was saved, on CPUs in fp32."""
    from transformers import AutoModelForSequenceClassification

    folder = resolve_folder(place)
    if folder is not None and (folder / "adapter_config.json").is_file():
        quantize = read_meta(folder).get("base", {}).get("quantize")
        base = meta_base(ModelSection(path=place, adapter=saved_settings(folder), quantize=quantize), device)
        with META:
            model: nn.Module = Models(base, (), reward=base.start)
    else:
        config = model_config(place)
        with META:
            model = AutoModelForSequenceClassification.from_config(config, dtype=classifier_dtype(config, device))
    return _bytes(model)


def _bytes(model: nn.Module) -> int:
    return sum(size for _, size in memory.parameter_sizes(model).values())
