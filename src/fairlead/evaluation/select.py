"""Selects of scored samples what is learned from, as a round of training does, and writes it as demonstrations or as
pairs. What is discarded on the way is kept in a file of its own, with its reason."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.online_dpo import Way, pair
from fairlead.config import Recipe
from fairlead.data.render import Tree
from fairlead.data.sources import write_jsonl
from fairlead.errors import ConfigError, DataError
from fairlead.evaluation.asked import Settings, asked, require_jsonl
from fairlead.models.load import pick_device
from fairlead.ops.sampling import stream_key
from fairlead.rollout.experience import measure_tokens
from fairlead.rollout.rewards.returned import TELLING
from fairlead.rollout.samples import Row, numbers_of, read_samples, rollouts_of, shares_of
from fairlead.rollout.screen import open_judge
from fairlead.rollout.select import SelectSettings, select
from fairlead.rollout.teacher import open_policy

OTHERS = ("seed", "model.device")
LENGTH = 2**20
"""Tokens a text may have: nothing is cut here."""


class SelectFileSettings(SelectSettings):
    pairs: Way | None = None
    """Two of each prompt's samples as a pair, in place of demonstrations: the best and the worst, the best two, the
    best and any other, or any two. A tie makes none."""
    round: int = Field(default=0, ge=0)
    """Of an online algorithm: what pairs are drawn where they are drawn."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Taken off the score of a response that was cut at its limit."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Samples are ranked by score - kl_coef (log policy - log reference), of their texts; above 0 it needs both."""
    policy: str | None = None
    """With kl_coef: what sampled, a run, a folder or a hub id."""
    reference: str | None = None
    """With kl_coef: what it should stay close to; a run, a folder or a hub id."""
    temperature: float = Field(default=1.0, gt=0)
    """With kl_coef: that of the sampling."""

    @model_validator(mode="after")
    def _goes_together(self) -> SelectFileSettings:
        given = [self.policy is not None, self.reference is not None]
        if given != [self.kl_coef > 0] * 2:
            raise ValueError(
                f"kl_coef={self.kl_coef:g} is a price of log policy - log reference: give all three or none"
            )
        if self.pairs is not None and (self.collect == "top" or self.keep is not None):
            raise ValueError(f"pairs={self.pairs} takes two samples of each prompt: no keep, no collect=top")
        return self


def select_file(scored: str | Path, settings: Settings = (), *, out: str | Path) -> dict[str, Any]:
    """Rank the samples of a file that `fairlead score` wrote, and write those that are kept to ``out``, whole or not at
    all, and those discarded to ``OUT.discarded.jsonl`` where there are any.

    ``settings`` are those of `SelectFileSettings`; texts are cleaned before they are scored, so `clean` is none here. A
    sample that was discarded, then or by `discard` now, has no rank. Returns the numbers of prompts, samples and those
    selected, the share of prompts that have none left, and mean scores: of the selected, and of the first of each
    prompt, which is what the model does without selection. Raises TrainingError where too many prompts have none left,
    DataError for rows without a score and for scores that are all the same.
    """
    require_jsonl(out)
    recipe = asked("select", settings, SelectFileSettings, OTHERS)
    own: SelectFileSettings = recipe.settings
    if own.clean:
        raise ConfigError("clean changes texts, and these are scored", hint="give clean to fairlead score")
    rows = read_samples(scored)
    if missing := [i for i, row in enumerate(rows, start=1) if "score" not in row]:
        raise DataError(f"{scored}: row {missing[0]} has no score", hint="score the samples first: fairlead score")
    judge, numbers = open_judge(own.discard), numbers_of(rows)
    reasons = [row.get("discarded") or judge(i, row["response"]) for i, row in enumerate(rows)]
    scores = torch.tensor(
        [torch.nan if reason else row["score"] for row, reason in zip(rows, reasons, strict=True)], dtype=torch.float64
    )
    keys = scores - own.missing_eos_penalty * torch.tensor([not row["finished"] for row in rows])
    if own.policy is not None and own.reference is not None:
        policy, reference = (_logprobs(name, rows, recipe) for name in ("policy", "reference"))
        keys = keys - own.kl_coef * (policy - reference)
    keep, empty = select(keys, numbers, own, shares_of(reasons))
    known = ~keys.isnan()
    firsts = scores[torch.tensor([0, *accumulate(numbers[:-1])])]
    if own.pairs is None:
        _require_difference(keys[known], int(keep.sum()), str(scored))
        kept = [row for row, is_kept in zip(rows, keep.tolist(), strict=True) if is_kept]
    else:
        kept, keep = _pairs(rows, keys, numbers, own.pairs, (recipe.seed, "pairs", own.round))
    write_jsonl(out, kept)
    _write_discarded(Path(out), [{**row, "discarded": why} for row, why in zip(rows, reasons, strict=True) if why])
    return {
        "scored": str(scored),
        "out": str(out),
        "prompts": len(numbers),
        "samples": len(rows),
        "selected": int(keep.sum()),
        **({} if own.pairs is None else {"pairs": len(kept)}),
        "prompts_without": empty,
        "discarded": dict(Counter(reason for reason in reasons if reason)),
        "scores": {
            "selected": float(scores[keep].mean()),
            "first": float(firsts[~firsts.isnan()].mean()) if bool((~firsts.isnan()).any()) else None,
            "all": float(scores[known].mean()),
        },
    }


def describe(result: dict[str, Any]) -> str:
    """What was done, in a line."""
    discarded = "; ".join(f"{number:,} {reason}" for reason, number in result["discarded"].items())
    scores = result["scores"]
    pairs = f", as {result['pairs']:,} pairs" if "pairs" in result else ""
    return (
        f"{result['selected']:,} of {result['samples']:,} samples of {result['prompts']:,} prompts selected{pairs}, "
        f"{result['prompts_without']:.0%} of the prompts have none; discarded: {discarded or 'none'}; mean score "
        f"{scores['selected']:.3g} of the selected, {scores['all']:.3g} of all"
    )


def _pairs(
    rows: Sequence[Row], keys: Tensor, numbers: Sequence[int], way: Way, key: tuple[int | str, ...]
) -> tuple[list[Row], Tensor]:
    """A pair of each prompt that has one, as rows, and which samples are in them [S] bool. Raises DataError where there
    is none."""
    made, keep = list[Row](), torch.zeros(len(rows), dtype=torch.bool)
    for prompt, (start, of_prompt) in enumerate(zip(accumulate(numbers, initial=0), keys.split(numbers), strict=False)):
        if found := pair(of_prompt, way, stream_key(*key, prompt)):
            sides = [rows[start + side] for side in found]
            keep[[start + side for side in found]] = True
            shared = {name: sides[0][name] for name in ("prompt", "tools", "columns") if name in sides[0]}
            texts = {name: side["response"] for name, side in zip(("chosen", "rejected"), sides, strict=True)}
            scores = {f"score_{name}": side["score"] for name, side in zip(texts, sides, strict=True)}
            made.append({**shared, **texts, **scores, "finished": [side["finished"] for side in sides]})
    if not made:
        raise DataError("no prompt has two samples of different scores", hint="a reward that tells the responses apart")
    return made, keep


def _logprobs(name: str, rows: Sequence[Row], recipe: Recipe) -> Tensor:
    """Log-probabilities of the responses [S] under the model that the setting ``name`` names, alone in memory."""
    own, place = recipe.settings, getattr(recipe.settings, name)
    models, renderer = open_policy(place, name, max_length=LENGTH, device=pick_device(recipe.model.device))
    rollouts = rollouts_of(rows, renderer)
    prompts = renderer.prompt_ids([rollout.prompt for rollout in rollouts])
    trees = [Tree(ids, (rollout.response_ids,)) for ids, rollout in zip(prompts, rollouts, strict=True)]
    form: dict[str, Any] = {"temperature": own.temperature, "budget": recipe.train.tokens_or_default}
    measured = measure_tokens(models, trees, others=(), **form)["behaviour_logprobs"]
    del models
    gc.collect()  # modules form cycles: the policy would stay beside the reference
    return torch.stack([row.double().sum() for row in measured])


def _require_difference(scores: torch.Tensor, kept: int, place: str) -> None:
    if kept < len(scores) and len(scores) >= TELLING and bool((scores == scores[0]).all()):
        raise DataError(
            f"{place}: all {len(scores)} scores are {float(scores[0]):g}, so the first samples would be selected",
            hint="a reward that tells the responses apart",
        )


def _write_discarded(out: Path, rows: list[dict[str, Any]]) -> None:
    path = out.with_suffix(".discarded.jsonl")
    if rows:
        write_jsonl(path, rows)
    else:
        path.unlink(missing_ok=True)
