"""Puts one stage together from its recipe: records, base, roles, renderer. Knows no algorithm by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fairlead.algorithms.stage import Stage
from fairlead.config import Recipe
from fairlead.data.filters import apply_filters, refuse_unlearnable, responses, turn_texts
from fairlead.data.records import RecordType, has_heldout, load_records, prompt_key, split_records, statement
from fairlead.data.render import Renderer
from fairlead.data.sources import Counts
from fairlead.errors import ConfigError
from fairlead.models.adapters import StartAdapter
from fairlead.models.forms import RewardWeights
from fairlead.models.load import (
    Base,
    add_tokens,
    load_base,
    load_tokenizer,
    pick_device,
    prepare,
    resolve_folder,
    tokenizer_for,
)
from fairlead.models.precision import autocast_of, training_notes
from fairlead.models.roles import Models
from fairlead.planning.show import announce
from fairlead.rollout.rewards import ModelSource, shared_reward, sources
from fairlead.training.budget import TokenBudget
from fairlead.types import Algorithm, Prompt, Ranks, Record, Text

TOKENIZER_TEXTS = 200_000
"""Texts a tokenizer from scratch is trained on, at most."""


@dataclass(frozen=True, slots=True)
class Given:
    """Objects handed in through Python instead of paths; none where the recipe says where to look."""

    model: Any = None
    tokenizer: Any = None
    data: Iterable[Mapping[str, Any]] | None = None
    eval_data: Iterable[Mapping[str, Any]] | None = None
    objects: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """By the name of the algorithm's setting: a reward function, say."""


def assemble(
    recipe: Recipe,
    algorithm: Algorithm[Any],
    given: Given,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
    ranks: Ranks | None = None,
) -> tuple[Stage, tuple[str, ...]]:
    """The stage and notes a person should read. Records are loaded before the model: their mistakes cost no wait.
    ``say`` is told the memory plan before the weights are loaded."""
    record = algorithm.record(recipe.settings)
    if recipe.data.packing == "wrapped" and record is not Text:
        raise ConfigError(
            f"data.packing=wrapped cuts rows anywhere, which {algorithm.name} cannot take: it is for plain text",
            hint="data.packing=best-fit",
        )
    records, held_out, counts = load_data(recipe, record, given)
    tokenizer, template = _tokenizer(recipe, given, texts_of(records))
    renderer = renderer_for(recipe, tokenizer, template)
    if record is not Prompt:
        refuse_unlearnable(renderer, records)
    device = pick_device(recipe.model.device)
    lines, tokens = announce(recipe, algorithm, build_models, given=given.model, tokenizer=tokenizer)
    for line in lines:
        say(line)
    if given.model is None:
        base = load_base(recipe.model, tokenizer, template, seed=recipe.seed, device=device)
    else:
        section = recipe.model
        base = prepare(
            given.model,
            tokenizer,
            template,
            device,
            added=section.add_tokens,
            seed=recipe.seed,
            way=section.attention,
            kernel=section.kernels,
        )
    models = build_models(recipe, algorithm, base, device)
    limit = getattr(base.model.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.max_length > limit:
        raise ConfigError(
            f"data.max_length={recipe.data.max_length}, but the model's positions end at {limit}",
            hint=f"set data.max_length={limit} or less",
        )
    rows = {split: _rows(count) for split, count in counts.items()}
    ranks = ranks or Ranks()
    budget = TokenBudget(min(ranks.gather(_begun_with(folder) or tokens)))
    ranks.alike(models.trainable)
    if recipe.train.shard == "full":
        _shard(recipe, models, ranks)
    stage = Stage(recipe, models, renderer, records, held_out, folder, budget, given.objects, rows, ranks=ranks)
    read = (statement(count, record) for count in counts.values())
    return stage, (*read, *base.notes, *training_notes(recipe.model, base.model.dtype), *models.notes)


def _shard(recipe: Recipe, models: Models, ranks: Ranks) -> None:
    from fairlead.training.sharding import shard

    optim = recipe.optim
    if optim.name not in ("adamw", "adam", "sgd", "lion") or optim.state_dtype != "float32":
        raise ConfigError(
            f"train.shard=full with optim.name={optim.name} and state_dtype={optim.state_dtype}, whose states are not "
            "sharded",
            hint="adamw, adam, sgd or lion with float32 states",
        )
    shard(models, ranks)


def _begun_with(folder: Path) -> int | None:
    """The tokens of a forward pass that an unfinished run in this folder began with: it goes on with them."""
    path = folder / "manifest.json"
    return json.loads(path.read_text("utf-8")).get("micro_batch_tokens") if path.is_file() else None


def build_models(recipe: Recipe, algorithm: Algorithm[Any], base: Base, device: torch.device) -> Models:
    """The roles of a run on its base; of a base on the meta device too, for its plan on ``device``."""
    settings, section = recipe.settings, recipe.model
    roles = tuple(algorithm.roles(settings))
    reference = algorithm.reference(settings)
    copied = "reference" in roles and reference != "first"
    if section.roles == "shared" and copied and not (section.adapter or section.num_layers_unfrozen):
        raise ConfigError(
            "model.roles=shared, but a policy whose weights are all trained leaves no base to share with its reference",
            hint="set model.adapter=lora, or model.num_layers_unfrozen, or model.roles=auto",
        )
    if section.offload_activations and device.type == "cpu":
        raise ConfigError(
            "model.offload_activations moves activations from a GPU to the CPU, and this run is on the CPU",
            hint="model.gradient_checkpointing=true saves their memory on any device",
        )
    reward, why = shared_reward(getattr(settings, "reward", None), section)
    models = Models(
        base,
        roles,
        adapter=section.adapter,
        num_layers_unfrozen=section.num_layers_unfrozen,
        reward=reward,
        separate=section.roles == "separate",
        reference=reference,
        reward_heads=getattr(settings, "reward_heads", None),
        compared=algorithm.compares,
        gradient_checkpointing=section.gradient_checkpointing,
        offload_activations=section.offload_activations,
        seed=recipe.seed,
        autocast=autocast_of(section, device),
        **_value_form(settings, reward, why),
    )
    if why:
        models.notes = (*models.notes, f"reward: a model of its own, since {why}")
    return models


def _value_form(settings: Any, reward: StartAdapter | None, why: str) -> dict[str, Any]:
    """How the settings of a value say where it reads."""
    value = getattr(settings, "value", None)
    if value is None:
        return {}
    weights = None
    if value.start == "reward" and reward is None:
        weights = _reward_weights(settings.reward) if value.trunk == "model" else None
        if weights is None:
            raise ConfigError(
                "the value is to start as the reward, which does not stand on the policy's base"
                + (f": {why}" if why else ""),
                hint="give a reward trained with model.adapter on the same base, or one of all weights and trunk: "
                "model, or start: policy",
            )
    trunk = value.trunk if value.trunk != "policy" else "shared" if value.trunk_gradient else "detached"
    return {
        "value_trunk": trunk,
        "num_value_layers": value.num_layers or 1,
        "value_start": value.start,
        "value_weights": weights,
    }


def _reward_weights(given: Any) -> RewardWeights | None:
    """Of the first reward that is a model saved whole."""
    for source in (each for each in sources(given) if isinstance(each, ModelSource)):
        for path in source.paths:
            folder = resolve_folder(path)
            if folder is not None and not (folder / "adapter_config.json").is_file():
                return RewardWeights(folder, 0.25 if source.use == "probability" else 1.0)
    return None


def renderer_for(recipe: Recipe, tokenizer: Any, template: str | None) -> Renderer:
    """What renders the records of a stage. ``template`` is the one its base was trained with, when known."""
    new_tokens = getattr(recipe.settings, "max_new_tokens", None)
    max_prompt = recipe.data.max_prompt_length
    if max_prompt is None and new_tokens is not None:
        max_prompt = recipe.data.max_length - new_tokens
        if max_prompt < 1:
            raise ConfigError(
                f"data.max_length={recipe.data.max_length} leaves no room for a prompt and {new_tokens} new tokens",
                hint="raise data.max_length or lower max_new_tokens",
            )
    return Renderer(
        tokenizer,
        template=(template or "auto") if recipe.data.template == "auto" else recipe.data.template,
        max_length=recipe.data.max_length,
        max_prompt_length=max_prompt,
        loss_on=recipe.data.loss_on,
    )


def load_data(recipe: Recipe, record: RecordType, given: Given) -> tuple[list[Any], list[Any], dict[str, Counts]]:
    """Training and held-out records, and what became of the rows of each, where they are rows of their own."""
    data = recipe.data
    source = data.path if given.data is None else given.data
    if source is None:
        raise ConfigError("no data: data.path is not given", hint="for example data.path=pairs.jsonl")
    form: dict[str, Any] = {"format": data.format, "columns": data.columns}
    records, counts = load_records(source, record, limit=data.limit, weights=data.weights, **form)
    records = apply_filters(records, data.filter, counts)
    held_out: list[Any] = []
    eval_counts: Counts | None = None
    eval_source = data.eval_path if given.eval_data is None else given.eval_data
    if eval_source is not None:
        held_out, eval_counts = load_records(eval_source, record, heldout=True, **form)
    elif data.eval_fraction:
        records, held_out = split_records(records, data.eval_fraction, recipe.seed)
    elif given.data is None and data.path is not None:
        paths = [data.path] if isinstance(data.path, str) else data.path
        if prepared := [path for path in paths if has_heldout(path, record)]:
            held_out, eval_counts = load_records(prepared, record, heldout=True, **form)
    _refuse_leakage(records, held_out)
    return records, held_out, {"train": counts} | ({"eval": eval_counts} if eval_counts else {})


def _refuse_leakage(records: Sequence[Record], held_out: Sequence[Record]) -> None:
    trained = {prompt_key(record) for record in records}
    both = [record for record in held_out if prompt_key(record) in trained]
    if both:
        raise ConfigError(
            f"{len(both)} of {len(held_out)} held-out prompts are also in the training data, the first is "
            f"{prompt_key(both[0])[:80]!r}",
            hint="use data.eval_fraction, which splits by prompt, or remove them from data.eval_path",
        )


def _rows(counts: Counts) -> dict[str, Any]:
    return {"read": counts.read, "kept": counts.kept, "cut": 0, "dropped": dict(counts.dropped)}


def _tokenizer(recipe: Recipe, given: Given, texts: Iterator[str]) -> tuple[Any, str | None]:
    if given.model is None:
        return tokenizer_for(recipe.model, texts)
    tokenizer = given.tokenizer or (load_tokenizer(recipe.model.tokenizer) if recipe.model.tokenizer else None)
    if tokenizer is None:
        raise ConfigError("a loaded model was given without its tokenizer", hint="pass tokenizer=...")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    add_tokens(tokenizer, recipe.model)
    return tokenizer, None


def texts_of(records: Sequence[Record]) -> Iterator[str]:
    """What a tokenizer from scratch is trained on."""
    for record in islice(records, TOKENIZER_TEXTS):
        if not isinstance(record, Text):
            yield "\n\n".join(turn_texts(record.prompt))
        yield from responses(record)


def sample_prompts(stage: Stage, number: int) -> list[Prompt]:
    """The prompts of the sample generations: the first held-out ones that fit, else the first of the training data."""
    records = list(stage.eval_records) or list(stage.records)
    prompts = [
        Prompt(record.text[:60]) if isinstance(record, Text) else Prompt(record.prompt)
        for record in islice(records, 16 * number)
    ]
    if not prompts:
        return []
    fitting, _ = stage.renderer.prompts(prompts)
    return [prompt for prompt, _ in fitting[:number]]
