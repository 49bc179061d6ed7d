"""Samples responses of a finished run, or of any causal language model, to prompts, and writes each as a row; with a
reward, the best of several to each prompt. Trains nothing."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from fairlead.assemble import renderer_for
from fairlead.config import Recipe
from fairlead.data.records import load_records
from fairlead.data.render import Renderer
from fairlead.data.sources import write_jsonl
from fairlead.errors import ConfigError, ModelError
from fairlead.evaluation.asked import Settings, asked, require_jsonl
from fairlead.evaluation.evaluate import finished_run
from fairlead.models.identity import weights_sha256
from fairlead.models.load import load_base, pick_device, read_meta, resolve_folder, tokenizer_for
from fairlead.models.precision import autocast_of
from fairlead.models.roles import Models
from fairlead.rollout.engines import open_sampler
from fairlead.rollout.rewards import open_reward
from fairlead.rollout.rewards.settings import RewardSource
from fairlead.rollout.samples import prompt_rows, round_prompts, sample_rows, scored_rows
from fairlead.rollout.select import best
from fairlead.rollout.settings import DrawSettings
from fairlead.rollout.store import RolloutStore
from fairlead.runner import resolve
from fairlead.types import Prompt, Rollout

OTHERS = (
    "seed",
    "threads",
    *(f"data.{name}" for name in ("format", "columns", "limit", "template", "max_length", "max_prompt_length")),
    *(f"model.{name}" for name in ("device", "dtype", "tokenizer", "quantize", "adapter", "attention", "kernels")),
)
"""Settings of a recipe that mean something here."""
SAY_EVERY = 10.0
"""Seconds between words on how far it is."""


class GenerateSettings(DrawSettings):
    rollout_size: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """Prompts of one round of an online algorithm, or all, in its order; null: all, in their own order."""
    round: int = Field(default=0, ge=0)
    """Which of its rounds: what prompts it takes, and what it draws."""
    reward: RewardSource | None = None
    """With best_of: what says which is the best, as `reward` of the online algorithms."""
    best_of: int | None = Field(default=None, ge=1)
    """So many responses to each prompt are sampled, and the best is written, with the mean score of all."""

    @model_validator(mode="after")
    def _best_by_something(self) -> GenerateSettings:
        if (self.best_of is None) != (self.reward is None):
            raise ValueError("best_of and reward go together: the best of so many by that reward")
        if self.best_of is not None and self.num_samples > 1:
            raise ValueError(f"best_of={self.best_of} writes one response a prompt, and num_samples={self.num_samples}")
        return self


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def generate(
    model: str | Path,
    prompts: str | Path,
    settings: Settings = (),
    *,
    out: str | Path,
    prompts_out: str | Path | None = None,
    say: Callable[[str], None] = _say,
) -> dict[str, Any]:
    """Sample responses of ``model`` (a run, a folder or a hub id) to ``prompts`` (a file, a prepared folder or a hub
    id) and write them to ``out``, a row each (`fairlead.rollout.samples`), and the prompts to ``prompts_out``.

    ``settings`` are those of `GenerateSettings` and `OTHERS`, by their dotted keys. A text depends on the seed, the
    round, the place of its prompt and the number of the sample alone. ``out`` appears whole or not at all; until then
    finished chunks of prompts lie beside it, from which the same command continues. Returns what became of the prompts
    and, with a reward, the mean scores of ``best`` and ``all``. Raises a FairleadError that says what to do.
    """
    out = Path(out)
    require_jsonl(out)
    if out.exists():
        raise ConfigError(f"{out} exists already", hint="choose another --out, or remove it")
    recipe = _recipe(str(model), settings)
    own: GenerateSettings = recipe.settings
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    form: dict[str, Any] = {"format": recipe.data.format, "columns": recipe.data.columns}
    records, counts = load_records(str(prompts), Prompt, limit=recipe.data.limit, **form)
    number = own.best_of or own.num_samples
    rollouts, renderer, dropped = _sampled(recipe, records, number, out, say)
    gc.collect()  # modules form cycles: the policy would stay beside the reward
    rows, scores = sample_rows(rollouts, number, renderer), {}
    if own.reward is not None:
        found = open_reward(own.reward, renderer, device=pick_device(recipe.model.device))(rollouts)
        rows = list(scored_rows(rows, rollouts, found, [None] * len(rollouts)))
        by_prompt = torch.tensor(found.values, dtype=torch.float64).view(-1, number)
        means = [mean for mean in by_prompt.mean(1).tolist() for _ in range(number)]
        kept = best(by_prompt, 1).flatten().tolist()
        rows = [{**row, "mean_score": mean} for row, mean, is_kept in zip(rows, means, kept, strict=True) if is_kept]
        scores = {"scores": {"best": float(by_prompt.max(1).values.mean()), "all": float(by_prompt.mean())}}
    if prompts_out is not None:
        write_jsonl(prompts_out, prompt_rows([rollout.prompt for rollout in rollouts[::number]]))
    write_jsonl(out, rows)
    for chunks in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(chunks, ignore_errors=True)
    return {
        "model": str(model),
        "prompts": str(prompts),
        "out": str(out),
        "read": counts.read,
        "sampled": len(rollouts) // number,
        "dropped": {**counts.dropped, **dropped},
        "rows": len(rows),
        "length": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
        "finished": sum(rollout.finished for rollout in rollouts) / len(rollouts),
        **scores,
    }


def describe(result: Mapping[str, Any]) -> str:
    """What was done, in a line."""
    dropped = "; ".join(f"{number:,} {reason}" for reason, number in result["dropped"].items())
    scores = result.get("scores")
    told = f"; score {scores['best']:.3g}, of all samples {scores['all']:.3g}" if scores else ""
    return (
        f"{result['rows']:,} responses to {result['sampled']:,} of {result['read']:,} prompts; dropped: "
        f"{dropped or 'none'}; {result['length']:.1f} tokens, {result['finished']:.0%} ended by themselves{told}"
    )


def _recipe(model: str, settings: Settings) -> Recipe:
    """The settings over what the run was trained with."""
    start: dict[str, Any] = {"model": {"path": model}}
    if (Path(model) / "recipe.yaml").is_file():
        trained = resolve(finished_run(model).recipe).recipe
        data, section = trained.data.model_dump(mode="json"), trained.model.model_dump(mode="json")
        start["data"] = {name: data[name] for name in ("max_length", "max_prompt_length")}
        kept = ("dtype", "quantize", "adapter") if section["quantize"] else ("dtype",)  # what cannot be merged
        start["model"] |= {name: section[name] for name in kept}
    return asked("generate", settings, GenerateSettings, OTHERS, start)


def _sampled(
    recipe: Recipe, records: list[Prompt], number: int, out: Path, say: Callable[[str], None]
) -> tuple[list[Rollout], Renderer, dict[str, int]]:
    """The responses, ``number`` to each prompt that fits, what rendered them, and what was dropped by reason."""
    own, place = recipe.settings, str(recipe.model.path)
    if read_meta(resolve_folder(place)).get("role", "policy") != "policy":
        raise ModelError(f"{place} was trained as a reward and writes no text", hint="give a policy")
    tokenizer, template = tokenizer_for(recipe.model, ())
    renderer = renderer_for(recipe, tokenizer, template)
    fitting, lengths = renderer.prompts(records)
    prompts = [prompt for prompt, _ in fitting]
    if own.rollout_size is not None:
        size = len(prompts) if own.rollout_size == "all" else own.rollout_size
        if size > len(prompts):
            say(f"there are {len(prompts)} prompts for rounds of {size}: each round takes all of them")
        size = min(size, len(prompts))
        prompts = round_prompts(prompts, size, own.round, recipe.seed)
    device = pick_device(recipe.model.device)
    base = load_base(recipe.model, tokenizer, template, seed=0, device=device)
    limit = getattr(base.model.config, "max_position_embeddings", None)
    if limit is not None and renderer.max_prompt_length + own.max_new_tokens > limit:
        raise ConfigError(
            f"prompts of {renderer.max_prompt_length} tokens and {own.max_new_tokens} new ones are more than the "
            f"model's {limit} positions",
            hint=f"max_new_tokens={own.max_new_tokens} leaves data.max_prompt_length={limit - own.max_new_tokens}",
        )
    models = Models(base, ("policy",), adapter=recipe.model.adapter, autocast=autocast_of(recipe.model, device))
    rollouts = RolloutStore(out.parent / f".{out.name}.{_identity(recipe, prompts)}").sample(
        open_sampler(own.engine, models, renderer, rows=own.rollout_rows),
        own.round,
        prompts,
        sampling=own.sampling,
        num_samples=number,
        seed=recipe.seed,
        rows=own.rollout_rows,
        after_chunk=_Progress(number * len(prompts), say),
    )
    return rollouts, renderer, dict(lengths.dropped)


class _Progress:
    """Says now and then how many of the samples there are."""

    def __init__(self, wanted: int, say: Callable[[str], None]) -> None:
        self._wanted, self._say, self._last = wanted, say, time.monotonic()

    def __call__(self, number: int) -> None:
        if time.monotonic() - self._last > SAY_EVERY:
            self._say(f"{number:,} of {self._wanted:,} samples")
            self._last = time.monotonic()


def _identity(recipe: Recipe, prompts: Sequence[Prompt]) -> str:
    """Of all that the samples depend on, so that no chunk is taken for that of other settings."""
    folder = resolve_folder(str(recipe.model.path))
    content = {
        "weights": None if folder is None else weights_sha256(folder),
        "model": recipe.model.model_dump(mode="json", exclude={"path"} if folder else set()),
        "settings": recipe.settings.model_dump(mode="json", exclude={"reward"}),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
        "prompts": prompt_rows(prompts),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
