"""The model card: README.md beside the weights, made of what a run directory and a merge say about themselves. Knows
their files; computes nothing, and names no path of the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

README = "README.md"
_ASIDE = ("algorithm", "run", "model", "data", "tracking", "seed", "threads")
_SETTINGS = (
    "optim.name",
    "optim.learning_rate",
    "optim.schedule",
    "train.epochs",
    "train.steps",
    "train.batch_size",
    "data.template",
    "data.max_length",
)
"""Settings of every method that matter; of the method's own section, all."""


def write_card(folder: Path, run: Path | None, *, merged: Mapping[str, Any] | None = None) -> None:
    """README.md in ``folder``, from recipe.yaml, manifest.json, summary.json and evaluation/metrics.json of ``run`` as
    far as they are there, and the merge.json of a merge."""
    recipe, manifest = _read(run, "recipe.yaml"), _read(run, "manifest.json")
    evaluation, summary = _read(run, "evaluation/metrics.json"), _read(run, "summary.json")
    base = _base(folder, recipe, merged)
    sets = list(_data(recipe, manifest))
    title = run.resolve().name if run is not None else folder.name.removeprefix(".").removesuffix(".partial")
    parts = [
        _front_matter(folder, recipe, base),
        f"# {title}\n",
        _introduction(recipe, base),
        _section("Data", [line for line, _ in sets]),
        _section("Method", _method(recipe, manifest)),
        _section("Figures", _figures(evaluation, summary)),
        _section("Merge", _merge(merged)),
        _section("Licence", _licence(base, [licence for _, licence in sets])),
        _section("Made with", _versions({**manifest, **(merged or {})})),
    ]
    (folder / README).write_text("\n".join(part for part in parts if part), "utf-8")


def _read(run: Path | None, name: str) -> dict[str, Any]:
    """A file of the run; nothing where it is missing."""
    path = None if run is None else run / name
    if path is None or not path.is_file():
        return {}
    text = path.read_text("utf-8")
    found: Any = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _public(path: str) -> str:
    """A hub id as it is; of a path the last part that says something."""
    names = [name for name in Path(path).parts if name not in ("/", ".", "..")]
    is_path = path.startswith((".", "/", "~")) or Path(path).exists() or len(names) != 2
    if not is_path:
        return path
    return names[-2] if len(names) > 1 and names[-1] == "model" else names[-1]


def _base(folder: Path, recipe: Mapping[str, Any], merged: Mapping[str, Any] | None) -> str | None:
    """What was trained on, or merged into."""
    if merged is not None and merged["adapters"]:
        return merged["base"]["path"]
    adapter = _read(folder, "adapter_config.json")
    return adapter.get("base_model_name_or_path") or (recipe.get("model") or {}).get("path")


def _front_matter(folder: Path, recipe: Mapping[str, Any], base: str | None) -> str:
    config = _read(folder, "config.json")
    is_adapter = (folder / "adapter_config.json").is_file()
    scores = _read(folder, "adapter_config.json").get("task_type") == "SEQ_CLS" or any(
        name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()
    )
    fields: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["fairlead", *([recipe["algorithm"]] if recipe else [])],
    }
    if base is not None and _public(base) == base:
        fields["base_model"] = base
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _introduction(recipe: Mapping[str, Any], base: str | None) -> str:
    method = f"Trained by {recipe['algorithm']}" if recipe else "A model"
    origin = "from random weights" if base is None and recipe else f"from {_public(base)}" if base else ""
    return f"{method} {origin}".rstrip() + ".\n"


def _data(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterable[tuple[str, str | None]]:
    """A line for each source of the recipe, with the licence that its prepared folder states."""
    paths = (recipe.get("data") or {}).get("path") or []
    inputs = manifest.get("inputs") or {}
    for path in [paths] if isinstance(paths, str) else paths:
        prepared = _read(Path(path), "manifest.json")
        found = next((i["sha256"] for i in inputs.values() if i["path"] == path), None)
        facts = [
            prepared.get("kind"),
            prepared.get("source"),
            f"licence: {prepared['licence']}" if prepared.get("licence") else "licence not stated",
            "research only" if prepared.get("research_only") else None,
            f"sha256 {found}" if found else None,
        ]
        yield f"{_public(path)}: {', '.join(fact for fact in facts if fact)}", prepared.get("licence")
    for split, rows in (manifest.get("data") or {}).items():
        dropped = sum(rows["dropped"].values())
        yield f"{split}: {rows['read']:,} records read, {dropped:,} dropped, {rows['cut']:,} cut", None


def _method(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    if not recipe:
        return []
    model = recipe.get("model") or {}
    how = "all weights"
    if model.get("adapter"):
        how = f"adapters ({_listed(model['adapter'])})"
    if model.get("quantize"):
        how += f" on a quantised base ({_listed(model['quantize'])})"
    lines = [f"{recipe['algorithm']}, {how}, seed {recipe.get('seed', 0)}"]
    if counts := manifest.get("parameters"):
        lines.append(f"{counts['trainable']:,} of {counts['total']:,} parameters trained")
    settings: dict[str, Any] = {}
    for key in _SETTINGS:
        section, _, name = key.partition(".")
        settings[key] = (recipe.get(section) or {}).get(name)
    if settings["train.steps"]:
        del settings["train.epochs"]  # which has no effect
    own = next((name for name in recipe if name not in (*_ASIDE, "optim", "train")), None)
    settings |= {f"{own}.{name}": value for name, value in (recipe.get(own or "") or {}).items()}
    lines += [f"`{key}: {_value(value)}`" for key, value in settings.items() if value not in (None, {}, [])]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _public(value) if "/" in value else value
    return json.dumps(value)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items() if value not in (None, [], {}))


def _figures(evaluation: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Evaluated figures with their intervals; without an evaluation, the last held-out ones of a finished training."""
    trained: Mapping[str, Any] = summary.get("metrics") or {} if summary.get("status") == "finished" else {}
    metrics = evaluation.get("metrics") or {name: m for name, m in trained.items() if name.startswith("eval/")}
    known = {name: metric for name, metric in metrics.items() if metric and metric.get("mean") is not None}
    rows: list[str] = []
    for name, metric in known.items():
        has_interval = metric.get("low") is not None
        interval = f"{metric['low']:.3g} to {metric['high']:.3g}" if has_interval else ""
        rows.append(f"| {name} | {metric['mean']:.3g} | {interval} | {metric['n'] if has_interval else ''} |")
    return ["| metric | mean | 95 % interval | n |", "|---|---|---|---|", *rows] if rows else []


def _merge(merged: Mapping[str, Any] | None) -> list[str]:
    if merged is None or not merged["adapters"]:
        return []
    check = merged["verification"]
    lines = [
        f"{len(merged['adapters'])} adapter{'s' * (len(merged['adapters']) > 1)} merged, written in {merged['dtype']}",
        f"{check['number']:,} {check['quantity']} of the merged model and of its adapters: largest difference "
        f"{check['largest']:.2g}, mean {check['mean']:.2g}, bound {check['bound']:g}",
    ]
    if merged["quantised"]:
        base = "as the adapters were trained on it" if merged["into"] == "quantised" else "unquantised"
        lines.append(f"the base had been quantised ({_listed(merged['quantised'])}); these are its weights {base}")
    for other in ("original", "quantised"):
        if gap := check.get(f"against_{other}"):
            lines.append(
                f"against the adapters on the {other} base: largest {gap['largest']:.2g}, mean {gap['mean']:.2g}"
            )
    return lines


def _licence(base: str | None, licences: list[str | None]) -> list[str]:
    stated = sorted({licence for licence in licences if licence})
    return [
        *([f"the licence of {_public(base)} applies to what is made of it"] if base else []),
        *([f"the data are under: {'; '.join(stated)}"] if stated else []),
    ]


def _versions(manifest: Mapping[str, Any]) -> list[str]:
    found = manifest.get("versions") or {}
    return [", ".join(f"{name} {number}" for name, number in found.items())] if found else []


def _section(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    is_table = lines[0].startswith("|")
    return f"## {title}\n\n" + "".join(f"{'' if is_table else '- '}{line}\n" for line in lines)
