"""Reads run directories and sets their evaluations side by side. What is missing or torn is noted, never guessed;
knows neither algorithms nor pages."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fairlead.config_file import parse_yaml
from fairlead.errors import ConfigError, RunError

Row = dict[str, Any]
"""One JSON object of a file."""

_LARGEST = 1e100


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval over `n` prompts or pairs; `low` and `high` are None where there is none."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory. `metrics` has one row a step, ascending; `estimates` are the evaluation's metrics, and
    `reward_quality` its curves and bins where it is a reward model's, `best` those of its best of n responses by name;
    `missing` and `damage` name files."""

    name: str
    path: Path
    recipe: Row
    manifest: Row
    summary: Row
    metrics: list[Row]
    samples: list[Row]
    watched: list[Row]
    alarms: list[Row]
    evaluation: Row
    estimates: dict[str, Estimate]
    reward_quality: Row
    best: dict[str, dict[str, Estimate]]
    responses: list[Row]
    missing: tuple[str, ...]
    damage: tuple[str, ...]

    @property
    def created(self) -> str:
        return str(self.manifest.get("created") or "")

    @property
    def algorithm(self) -> str:
        return str(self.manifest.get("algorithm") or self.recipe.get("algorithm") or "unknown")

    @property
    def notes(self) -> list[Any]:
        found = self.manifest.get("notes")
        return found if isinstance(found, list) else []

    @property
    def end(self) -> Row:
        """Status, steps, tokens and seconds: from the summary, else from the last logged step."""
        last = self.metrics[-1] if self.metrics else {}
        return {
            "status": str(self.summary.get("status") or ("unfinished" if self.metrics else "not started")),
            "steps": self.summary.get("steps", last.get("step")),
            "tokens": self.summary.get("tokens", last.get("tokens")),
            "seconds": self.summary.get("seconds", last.get("seconds")),
        }

    def points(self, *names: str) -> list[tuple[float, ...]]:
        """(step, value, value ...) of the steps at which all `names` were finite."""
        rows = ([finite(row.get(name)) for name in ("step", *names)] for row in self.metrics)
        return [tuple(v for v in row if v is not None) for row in rows if None not in row]


@dataclass(frozen=True, slots=True)
class Change:
    """One prompt: a typical response before and after, and each score's mean over the draws on both sides."""

    prompt: str
    before: Row
    after: Row
    scores: dict[str, tuple[float, float]]
    draws: tuple[int, int]
    change: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`run` against `reference`, prompt by prompt, the largest gain in `metric` first."""

    run: str
    reference: str
    metric: str | None
    changes: list[Change]
    mean: Estimate | None
    num_unmatched: int

    def count(self, holds: Callable[[float], bool]) -> int:
        return sum(c.change is not None and holds(c.change) for c in self.changes)

    def excerpt(self, share: int) -> list[tuple[str, list[Change]]]:
        """Under a title each: the largest gains, those around the median, the largest losses; `share` of each."""
        if self.metric is None:
            return [("Prompts", self.changes[: 3 * share])]
        if len(self.changes) <= 3 * share:
            return [("From the largest gain to the largest loss", self.changes)]
        middle = (len(self.changes) - share) // 2
        groups = [
            ("Largest gains", [c for c in self.changes[:share] if (c.change or 0.0) > 0]),
            ("Around the median", self.changes[middle : middle + share]),
            ("Largest losses", [c for c in self.changes[-share:] if (c.change or 0.0) < 0]),
        ]
        return [(title, group) for title, group in groups if group]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs in the order given, each once, under distinct names; a pipeline's folder stands for its runs in order of
    creation.

    Raises RunError where a path holds no run.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        found = _expand(path)
        if not found:
            raise _not_a_run(path)
        for run in found:
            runs.setdefault(run.path.resolve(), run)
    if not runs:
        raise RunError("no run directory was given", hint="name at least one folder under runs/")
    return _distinct(list(runs.values()))


def read_run(path: Path) -> Run:
    """One run directory, whatever of it is there."""
    missing: list[str] = []
    damage: list[str] = []

    def text(file: str, *, is_rare: bool = False) -> str | None:
        try:
            return (path / file).read_bytes().decode("utf-8-sig", errors="replace")
        except FileNotFoundError:
            if not is_rare:
                missing.append(file)
        except OSError as error:
            damage.append(f"{file} cannot be read ({error.strerror})")
        return None

    def mapping(file: str, parse: Callable[[str], object], *, is_rare: bool = False) -> Row:
        if (content := text(file, is_rare=is_rare)) is None:
            return {}
        try:
            value = parse(content)
        except (ValueError, RecursionError, ConfigError):
            value = None
        if isinstance(value, dict):
            return value
        damage.append(f"{file} is not readable")
        return {}

    def rows(file: str, *, is_rare: bool = False) -> list[Row]:
        # Not splitlines: U+0085 and U+2028 may stand inside a string.
        lines = [_object(line) for line in (text(file, is_rare=is_rare) or "").split("\n") if line.strip()]
        good = [line for line in lines if line is not None]
        if len(good) < len(lines):
            damage.append(f"{file}: lines that are not readable: {len(lines) - len(good)}")
        return good

    evaluation = mapping("evaluation/metrics.json", json.loads)
    best = {
        file.stem: mapping(f"evaluation/{file.name}", json.loads) for file in path.glob("evaluation/best_of_*.json")
    }
    return Run(
        name=path.resolve().name,
        path=path,
        recipe=mapping("recipe.yaml", partial(parse_yaml, place="recipe.yaml")),
        manifest=mapping("manifest.json", json.loads),
        summary=mapping("summary.json", json.loads),
        metrics=_by_step(rows("metrics.jsonl")),
        samples=rows("samples.jsonl"),
        watched=rows("eval_prompts.jsonl", is_rare=True),
        alarms=rows("alarms.jsonl"),
        evaluation=evaluation,
        estimates=parse_estimates(evaluation.get("metrics")),
        reward_quality=mapping("evaluation/reward_quality.json", json.loads, is_rare=True),
        best={name: parse_estimates(found.get("metrics")) for name, found in sorted(best.items())},
        responses=rows("evaluation/responses.jsonl"),
        missing=tuple(missing),
        damage=tuple(damage),
    )


def compare(before: Run, after: Run) -> Comparison:
    """The prompts both runs answered. A prompt's change is the difference of two means over draws, in `gold` where
    both runs have it, else in `score`, else in the first score they share; the interval is mean +- 1.96 standard
    errors over prompts."""
    old, new = _by_prompt(before.responses), _by_prompt(after.responses)
    names = [n for n in score_names(before.responses) if n in score_names(after.responses)]
    metric = next((n for n in ("gold", "score", *names) if n in names), None)
    changes: list[Change] = []
    for prompt in (p for p in old if p in new):
        scores: dict[str, tuple[float, float]] = {}
        for name in names:
            was, now = mean_score(old[prompt], name), mean_score(new[prompt], name)
            if was is not None and now is not None:
                scores[name] = (was, now)
        if metric is None or metric in scores:
            changes.append(
                Change(
                    prompt=prompt,
                    before=_typical(old[prompt], metric),
                    after=_typical(new[prompt], metric),
                    scores=scores,
                    draws=(len(old[prompt]), len(new[prompt])),
                    change=None if metric is None else scores[metric][1] - scores[metric][0],
                )
            )
    changes.sort(key=lambda c: -(c.change or 0.0))
    return Comparison(
        run=after.name,
        reference=before.name,
        metric=metric,
        changes=changes,
        mean=_mean([c.change for c in changes if c.change is not None]),
        num_unmatched=len(old.keys() | new.keys()) - len(changes),
    )


def mean_score(draws: Iterable[Row], name: str) -> float | None:
    """Mean of one score over the draws that have it."""
    values = [v for draw in draws if (v := finite(as_mapping(draw.get("scores")).get(name))) is not None]
    return fmean(values) if values else None


def parse_estimates(metrics: object) -> dict[str, Estimate]:
    """`{name: {mean, low, high, n}}`; an entry without a finite mean is left out."""
    estimates: dict[str, Estimate] = {}
    for name, value in as_mapping(metrics).items():
        fields = {key: finite(as_mapping(value).get(key)) for key in ("mean", "low", "high", "n")}
        if (mean := fields["mean"]) is not None:
            n = fields["n"]
            estimates[str(name)] = Estimate(mean, fields["low"], fields["high"], None if n is None else int(n))
    return estimates


def finite(value: object) -> float | None:
    """The number, or None for what is not a finite one (or so large that a sum of squares would not be)."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= _LARGEST else None


def as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def as_text(prompt: object) -> str:
    """A prompt as text; turns of a conversation stand under their role."""
    if isinstance(prompt, list):
        turns = (as_mapping(turn) for turn in prompt)
        return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    return "" if prompt is None else str(prompt)


def _is_run(path: Path) -> bool:
    return (path / "manifest.json").is_file() or (path / "recipe.yaml").is_file()


def _expand(path: Path) -> list[Run]:
    try:
        is_pipeline = "models" in (_object((path / "summary.json").read_text(encoding="utf-8")) or {})
    except (OSError, ValueError):
        is_pipeline = False
    if is_pipeline:
        children = (child for child in sorted(path.iterdir()) if child.is_dir())
        runs = [run for child in children for run in _expand(child)]
        if runs:
            return sorted(runs, key=lambda run: run.created or "~")  # "~" is behind every date
    return [read_run(path)] if _is_run(path) else []


def _not_a_run(path: Path) -> RunError:
    if not path.is_dir():
        return RunError(f"no such run directory: {path}", hint="give a folder written by `fairlead train`")
    inside = [child.name for child in sorted(path.iterdir()) if child.is_dir() and _is_run(child)]
    hint = (
        f"it holds runs; give them one by one: {', '.join(inside[:8])}"
        if inside
        else "a run directory holds manifest.json and recipe.yaml; give one written by `fairlead train`"
    )
    return RunError(f"not a run directory: {path}", hint=hint)


def _distinct(runs: list[Run]) -> list[Run]:
    def more(run: Run, name: str) -> Run:
        return replace(run, name=name) if names[run.name] > 1 else run

    names = Counter(run.name for run in runs)
    runs = [more(run, "/".join(run.path.resolve().parts[-2:])) for run in runs]
    names = Counter(run.name for run in runs)
    return [more(run, str(run.path)) for run in runs]


def _object(line: str) -> Row | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _by_step(rows: list[Row]) -> list[Row]:
    """Lines of one step become one row: held-out metrics may stand on a line of their own, and a resumed run may
    have logged a step twice (the later line counts)."""
    steps: dict[float, Row] = {}
    for row in rows:
        step = finite(row.get("step"))
        if step is not None:
            steps[step] = {**steps.get(step, {}), **row}
    return [steps[step] for step in sorted(steps)]


def _by_prompt(responses: list[Row]) -> dict[str, list[Row]]:
    prompts: dict[str, list[Row]] = {}
    for row in responses:
        prompts.setdefault(as_text(row.get("prompt")), []).append(row)
    return prompts


def score_names(responses: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in responses for name in as_mapping(row.get("scores"))))


def _typical(draws: list[Row], metric: str | None) -> Row:
    """The draw whose score lies closest to the mean over draws; the first one without scores."""
    mean = None if metric is None else mean_score(draws, metric)
    if metric is None or mean is None:
        return draws[0]

    def distance(draw: Row) -> float:
        score = finite(as_mapping(draw.get("scores")).get(metric))
        return math.inf if score is None else abs(score - mean)

    return min(draws, key=distance)


def _mean(values: list[float]) -> Estimate | None:
    if len(values) < 2:
        return Estimate(values[0], n=1) if values else None
    mean, error = fmean(values), 1.96 * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - error, mean + error, len(values))
