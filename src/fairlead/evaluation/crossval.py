"""Cross-validates a reward stage: each pair is scored once, by a model that saw none of its prompt, beside baselines on
the same folds. It knows the stage by its recipe and trains it as any other run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairlead.algorithms import find
from fairlead.assemble import Given
from fairlead.config import DataSection, Recipe
from fairlead.config_resolve import ResolvedRecipe
from fairlead.data.filters import apply_filters
from fairlead.data.records import load_records
from fairlead.data.splits import fold_of, keyed_hash, split_of
from fairlead.errors import ConfigError, RunError
from fairlead.evaluation.baselines import length_only, tf_idf
from fairlead.evaluation.metrics import (
    Estimate,
    Numbers,
    correctness,
    pair_accuracy,
    paired_difference,
    sign_flip_p_value,
)
from fairlead.evaluation.reward_quality import pair_margins
from fairlead.models.load import pick_device
from fairlead.rollout.rewards import open_model
from fairlead.runner import resolve, run_stage
from fairlead.tracking import RunDirectory
from fairlead.types import Preference

INNER_SHARE = 0.25
"""Share of the training prompts on which a baseline chooses its features."""


def cross_validate(
    recipe: ResolvedRecipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    folds: int = 5,
    out: Path | str,
    learning_curve: Sequence[float] | None = (),
    data: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """k-fold accuracy of a reward stage on the pairs of ``data.path`` (or of ``data``, rows in memory).

    Pairs whose prompts begin with the same user turn stand in one fold. The stage is trained once a fold, in
    ``out/fold-0`` ...; a finished fold is read back, an unfinished one continued. Returns, and writes to
    ``out/crossval.json``: ``accuracy`` (out of fold, each pair scored once), ``baselines`` on the same folds
    (``length_only``, ``tf_idf``), ``differences`` (accuracy - baseline, with the p-value of the sign-flip test),
    ``by_fold``, ``learning_curve`` (fold 0 with the given shares of its training prompts) and a ``verdict`` in words.
    Intervals are 95 % bootstrap intervals over prompts.

    Raises ConfigError for a stage that trains no reward model or too few prompts, RunError where ``out`` holds another
    cross-validation.
    """
    if not isinstance(recipe, ResolvedRecipe):
        resolved = resolve(recipe, overrides)
    else:
        resolved = resolve(recipe.as_dict(), overrides) if overrides else recipe
    settings, learning_curve = resolved.recipe, learning_curve or ()
    _refuse(settings, folds, learning_curve)
    source = settings.data.path if data is None else list(data)
    if source is None:
        raise ConfigError("no data: data.path is not given", hint="for example data.path=pairs.jsonl")
    given = settings.data
    pairs, counts = load_records(
        source, Preference, limit=given.limit, format=given.format, columns=given.columns, weights=given.weights
    )
    pairs = apply_filters(pairs, given.filter, counts)
    keys = [group_key(pair) for pair in pairs]
    placed = [fold_of(key, folds, settings.seed) for key in keys]
    if len(set(placed)) < folds:
        raise ConfigError(
            f"{len(set(keys))} prompts leave one of {folds} folds empty", hint="give more pairs, or fewer folds"
        )
    out = Path(out)
    _plan(out, {"recipe": resolved.as_dict(), "folds": folds, "data": _digest(pairs)})

    on_rows = _on_plain_rows(resolved)
    margins = {name: np.zeros(len(pairs)) for name in ("reward", "length_only", "tf_idf")}
    by_fold: list[dict[str, Any]] = []
    for fold in range(folds):
        held, rest = _sides(placed, fold)
        heldout, train = [pairs[i] for i in held], [pairs[i] for i in rest]
        inner = [
            split_of(keys[i], {"fit": 1 - INNER_SHARE, "choose": INNER_SHARE}, settings.seed) == "choose" for i in rest
        ]
        margins["reward"][held] = _trained_margins(on_rows, train, heldout, out / f"fold-{fold}")
        direction, margins["length_only"][held] = length_only(train, heldout)
        features, margins["tf_idf"][held] = tf_idf(train, heldout, inner)
        accuracies = {name: float(correctness(values[held]).mean()) for name, values in margins.items()}
        rules = {"length_only": direction, "tf_idf": features}
        by_fold.append({"fold": fold, "pairs": len(held), "accuracy": accuracies, "rules": rules})

    result = {
        "folds": folds,
        "seed": settings.seed,
        "pairs": len(pairs),
        "prompts": len(set(keys)),
        "data": counts.as_dict(),
        **compare(margins, keys, seed=settings.seed),
        "by_fold": by_fold,
        "learning_curve": [
            _curve_point(on_rows, share, pairs, keys, placed, margins["reward"], out) for share in learning_curve
        ],
    }
    RunDirectory(out).write_json("crossval.json", result)
    return result


def _on_plain_rows(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """The recipe for pairs that were read and filtered already."""
    plain = DataSection()
    settings = resolved.as_dict()
    settings["data"] |= {name: getattr(plain, name) for name in ("format", "columns", "weights", "limit")}
    settings["data"]["filter"] = plain.filter.model_dump()
    return resolve(settings)


def group_key(pair: Preference) -> str:
    """What pairs of two folds must not share: the first user turn of the prompt, or the prompt that is one text."""
    if isinstance(pair.prompt, str):
        return pair.prompt
    return next((turn["content"] for turn in pair.prompt if turn["role"] == "user"), pair.prompt[0]["content"])


def compare(margins: Mapping[str, Numbers], prompts: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Accuracy of ``reward`` and of the baselines beside it, the paired differences, and the verdict. [P] each."""
    right = {name: correctness(values) for name, values in margins.items()}
    estimates = {name: pair_accuracy(values, prompts, seed=seed) for name, values in margins.items()}
    ours, accuracy = right.pop("reward"), estimates.pop("reward")
    differences = {name: paired_difference(ours, theirs, prompts, seed=seed) for name, theirs in right.items()}
    p_values = {name: sign_flip_p_value(ours - theirs, prompts, seed=seed) for name, theirs in right.items()}
    return {
        "accuracy": accuracy.as_dict(),
        "baselines": {name: estimate.as_dict() for name, estimate in estimates.items()},
        "differences": {n: each.as_dict() | {"p_value": p_values[n]} for n, each in differences.items()},
        "verdict": verdict(accuracy, estimates, differences),
    }


def verdict(accuracy: Estimate, baselines: Mapping[str, Estimate], differences: Mapping[str, Estimate]) -> str:
    """One sentence: above which baselines the reward model is, and by how much. Above is where the whole interval of
    the difference is."""
    above, others = list[str](), list[str]()
    for name, by in differences.items():
        if by.low is not None and by.low > 0:
            above.append(f"above {name} {baselines[name].mean:.3f} by {_words(by)}")
        else:
            others.append(f"{name} {baselines[name].mean:.3f} (difference {_words(by)})")
    parts = [f"not reliably above {' or '.join(others)}"] if others else []
    parts += [" and ".join(above)] if above else []
    accurate = f"The reward model's accuracy of {_words(accuracy)} on {accuracy.n} held-out pairs"
    return f"{accurate} is {', but '.join(parts)}."


# --- one fold ------------------------------------------------------------------------------------------------------


def _trained_margins(
    resolved: ResolvedRecipe, train: Sequence[Preference], heldout: Sequence[Preference], folder: Path
) -> list[float]:
    """Margins of the held-out pairs under the stage trained in ``folder``, now or earlier."""
    recipe = resolved.recipe
    if not RunDirectory(folder).model.is_dir():
        # A best checkpoint chosen on the held-out fold would be flattered by it; the recipe's own held-out part serves.
        seen = None if recipe.train.save_best else [_row(pair) for pair in heldout]
        run_stage(resolved, Given(data=[_row(pair) for pair in train], eval_data=seen), folder=folder)
    return pair_margins(open_model(str(folder), device=pick_device(recipe.model.device)), heldout)


def _curve_point(
    resolved: ResolvedRecipe,
    share: float,
    pairs: Sequence[Preference],
    keys: Sequence[str],
    placed: Sequence[int],
    fold_margins: NDArray[np.float64],
    out: Path,
) -> dict[str, Any]:
    """Accuracy on fold 0 after training on a share of the other folds' prompts; a smaller share lies in a larger."""
    seed = resolved.recipe.seed
    held, rest = _sides(placed, 0)
    walk = sorted({keys[i] for i in rest}, key=lambda key: keyed_hash(seed, "share", key))
    chosen = set(walk[: math.ceil(share * len(walk))])
    train = [pairs[i] for i in rest if keys[i] in chosen]
    margins = fold_margins[held].tolist()
    if share < 1:
        margins = _trained_margins(resolved, train, [pairs[i] for i in held], out / f"share-{share:g}")
    accuracy = pair_accuracy(margins, [keys[i] for i in held], seed=seed)
    return {"share": share, "pairs": len(train), "prompts": len(chosen), "accuracy": accuracy.as_dict()}


def _sides(placed: Sequence[int], fold: int) -> tuple[list[int], list[int]]:
    """Indices of the pairs held out in ``fold``, and of the others."""
    held = [i for i, place in enumerate(placed) if place == fold]
    return held, [i for i, place in enumerate(placed) if place != fold]


# --- refusing and remembering --------------------------------------------------------------------------------------


def _refuse(recipe: Recipe, folds: int, learning_curve: Sequence[float]) -> None:
    algorithm = find(recipe.algorithm)
    if algorithm.record(recipe.settings) is not Preference or "reward" not in algorithm.roles(recipe.settings):
        raise ConfigError(
            f"algorithm={recipe.algorithm} trains no reward model on pairs", hint="cross-validate a reward recipe"
        )
    if folds < 2:
        raise ConfigError(f"folds must be at least 2, got {folds}")
    for share in learning_curve:
        if not 0 < share <= 1:
            raise ConfigError(f"a share of the learning curve must be above 0 and at most 1, got {share}")
    if recipe.train.save_best and not recipe.data.eval_fraction and recipe.data.eval_path is None:
        raise ConfigError(
            "train.save_best would choose the checkpoint on the held-out fold, whose accuracy would then be flattered",
            hint="set data.eval_fraction=0.1, or train.save_best=false",
        )


def _plan(out: Path, plan: Mapping[str, Any]) -> None:
    """Remembers what is cross-validated in ``out``; refuses another recipe, other data or another number of folds."""
    path = out / "plan.json"
    if path.is_file():
        before, now = json.loads(path.read_text("utf-8")), json.loads(json.dumps(plan))
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise RunError(
                f"{out} holds a cross-validation of another {', '.join(changed)}",
                hint=f"choose another folder, or remove {out}",
            )
    else:
        RunDirectory(out).write_json(path.name, plan)


def _digest(pairs: Sequence[Preference]) -> str:
    rows = json.dumps([_row(pair) for pair in pairs])
    return hashlib.sha256(rows.encode()).hexdigest()


def _row(pair: Preference) -> dict[str, Any]:
    """The pair as a row that is read back as the same pair."""
    prompt = pair.prompt if isinstance(pair.prompt, str) else list(pair.prompt)
    return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected, "margin": pair.margin}


def _words(estimate: Estimate) -> str:
    interval = "" if estimate.low is None else f" ({estimate.low:.3f} to {estimate.high:.3f})"
    return f"{estimate.mean:.3f}{interval}"
