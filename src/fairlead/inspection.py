"""What `fairlead inspect` does: finds the records and the tokenizer of a recipe or of data, measures and draws them;
plans the memory of a recipe's run, or of training a model. Loads no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fairlead.algorithms import find
from fairlead.assemble import Given, build_models, load_data, renderer_for, texts_of
from fairlead.config import Recipe, Section
from fairlead.config_file import shipped
from fairlead.config_resolve import flatten, load_recipe
from fairlead.data.filters import held_kind
from fairlead.data.formats import find_format
from fairlead.data.inspect.measure import KINDS, kind_of, measure
from fairlead.data.inspect.rows import draw
from fairlead.data.inspect.show import Inspection, Prepared
from fairlead.data.prepare import MANIFEST
from fairlead.data.render import Renderer
from fairlead.data.sources import read_rows
from fairlead.errors import ConfigError, ModelError
from fairlead.models.load import load_tokenizer, tokenizer_for
from fairlead.planning.plan import Plan, model_config, plan_run, shipped_shapes
from fairlead.runner import resolve

SCORES = ("chosen_score", "rejected_score")
"""Columns of a prepared data set that are shown as histograms."""
PREPARED = {
    "preference": "preference",
    "sft": "sft",
    "ranking": "ranking",
    "labelled": "labelled",
    "prompt": "prompts",
    "text": "pretrain",
}
"""Kind -> the name of its file in a prepared folder, the richest first."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was found: of a recipe both, of a model its plan, of data what is in them."""

    target: str
    plan: Plan | None
    data: Inspection | None

    def as_dict(self) -> dict[str, Any]:
        data = {"target": self.target} if self.data is None else self.data.as_dict()
        return {**data, "model": None if self.plan is None else self.plan.as_dict()}


def inspect(
    target: str,
    settings: Sequence[str] = (),
    *,
    kind: str | None = None,
    rows: int = 3,
    with_model: bool = True,
    with_data: bool = True,
) -> Inspected:
    """Plans the run of a recipe (a file or a shipped name) and measures its data; plans the training of a model (a
    folder, a run, a config.json, a hub id or a shipped shape); or measures data (a file, folder or hub id), and draws
    some records.

    With a recipe its own sections hold; with a model the settings are those of a recipe, `algorithm` among them (sft
    where it is not given); with data they name its columns, and model.path=... or tokenizer=... gives lengths in tokens
    and masks. ``kind`` is one of KINDS, else the recipe's, else the richest that the data hold. Raises ConfigError,
    DataError and ModelError as training would.
    """
    settings = [f"model.{text}" if text.startswith("tokenizer=") else text for text in settings]
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"no kind of record {kind!r}", hint=f"there are: {', '.join(KINDS)}")
    if _is_recipe(target):
        recipe, record = _of_recipe(target, settings)
        has_model = (recipe.model.path or recipe.model.scratch) is not None
        if not has_model and not with_data:
            raise ConfigError("no model: neither model.path nor model.scratch is given", hint="model.path=DIR")
        with_model = with_model and has_model
        with_data = with_data and (recipe.data.path is not None or not with_model)
        data, renderer = None, None
        if with_data:
            data, renderer = _data(target, recipe, record if kind is None else KINDS[kind], rows)
        tokenizer = None if renderer is None else renderer.tokenizer
        made = plan_run(recipe, find(recipe.algorithm), build_models, tokenizer=tokenizer) if with_model else None
        return Inspected(target, made, data)
    if with_model and kind is None and (model := _model(target)):
        recipe = resolve({"algorithm": "sft", "model": {"path": model}}, settings).recipe
        return Inspected(target, plan_run(recipe, find(recipe.algorithm), build_models), None)
    resolved = load_recipe(
        {"algorithm": "inspect", "data": {"path": target}}, settings, settings_of=lambda _: ("inspect", Section)
    )
    data, _ = _data(target, resolved.recipe, KINDS[kind or _richest(resolved.recipe)], rows)
    return Inspected(target, None, data)


def _data(target: str, recipe: Recipe, record: type[Any], rows: int) -> tuple[Inspection, Renderer | None]:
    records, held_out, counts = load_data(recipe, record, Given())
    renderer = _renderer(recipe, records)
    measures = measure(
        records,
        renderer,
        heldout=held_out,
        scores=_scores(recipe, kind_of(record)),
        tokenizer=recipe.model.tokenizer or recipe.model.path or ("trained on these records" if renderer else None),
    )
    drawings = draw(records, measures, renderer, rows)
    return Inspection(target, counts["train"], measures, drawings, _prepared(recipe)), renderer


def _model(target: str) -> str | None:
    """What model.path would be, where the target is a model; a name that may be a hub id is asked for."""
    path = Path(target)
    if path.name == "config.json" and path.is_file():
        return str(path.parent)
    if path.is_dir():
        places = [place / name for place in (path, path / "model") for name in ("config.json", "adapter_config.json")]
        return target if any(place.is_file() for place in places) else None
    if target in shipped_shapes():
        return target
    if path.exists() or target.count("/") != 1 or target.startswith((".", "/", "~")):
        return None
    try:
        model_config(target)
    except ModelError:
        return None  # then it is a data set, or the error about one says that there is neither
    return target


def _is_recipe(target: str) -> bool:
    if Path(target).exists() or Path(target).suffix in (".yaml", ".yml"):
        return Path(target).suffix in (".yaml", ".yml")
    return target in shipped() or target in shipped("pipeline")


def _of_recipe(target: str, settings: Sequence[str]) -> tuple[Recipe, type[Any]]:
    if not Path(target).exists() and target in shipped("pipeline"):
        raise ConfigError(f"{target} is a pipeline", hint="inspect a recipe of one stage, or the data of a stage")
    recipe = resolve(target, settings).recipe
    return recipe, find(recipe.algorithm).record(recipe.settings)


def _richest(recipe: Recipe) -> str:
    """The kind of record that the first file of a prepared folder, or else the first row, holds."""
    path = _first_path(recipe)
    if prepared := next((kind for kind in PREPARED if _prepared_file(path, kind)), None):
        return prepared
    if recipe.data.format != "auto":
        return kind_of(find_format(recipe.data.format).record)
    return kind_of(held_kind(str(path), columns=recipe.data.columns))


def _first_path(recipe: Recipe) -> Path:
    path = recipe.data.path or ""
    return Path(path if isinstance(path, str) else path[0])


def _prepared_file(folder: Path, kind: str) -> Path | None:
    found = [folder / f"{PREPARED[kind]}{suffix}" for suffix in (".jsonl", ".parquet")]
    return next((file for file in found if file.is_file()), None)


def _renderer(recipe: Recipe, records: Sequence[Any]) -> Renderer | None:
    model = recipe.model
    if model.path or model.scratch:
        return renderer_for(recipe, *tokenizer_for(model, texts_of(records)))
    return renderer_for(recipe, load_tokenizer(model.tokenizer), None) if model.tokenizer else None


def _scores(recipe: Recipe, kind: str) -> dict[str, list[float]]:
    """The scores that stand beside the pairs of a prepared folder, or of a file of its form."""
    path = _first_path(recipe)
    file = _prepared_file(path, kind) if path.is_dir() else path
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    if file is None or not file.is_file() or kind != "preference":
        return found
    for row in islice(read_rows(file), recipe.data.limit):
        if not row.data.keys() >= found.keys():
            break
        for name, values in found.items():
            if isinstance(score := row.data[name], int | float) and math.isfinite(score):
                values.append(score)
    return found


def _prepared(recipe: Recipe) -> Prepared | None:
    path = _first_path(recipe)
    if not (path / MANIFEST).is_file() or not any(_prepared_file(path, kind) for kind in PREPARED):
        return None
    manifest = json.loads((path / MANIFEST).read_bytes())
    counts = {key.replace(".", ", "): n for key, n in flatten(manifest["counts"]).items() if isinstance(n, int) and n}
    return Prepared({name: output["rows"] for name, output in manifest["outputs"].items()}, counts)
