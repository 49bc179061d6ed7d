"""Scores sampled responses with any reward, after cleaning and discarding them: what a round does between sampling and
selection, with the reward alone in memory. A row is kept whatever becomes of it, with its score or the reason why it
has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from fairlead.data.render import Renderer
from fairlead.data.sources import read_rows, write_jsonl
from fairlead.errors import DataError
from fairlead.evaluation.asked import Settings, asked, require_jsonl
from fairlead.models.load import load_tokenizer, pick_device, read_meta, train_tokenizer
from fairlead.rollout.rewards import model_paths, open_reward
from fairlead.rollout.rewards.settings import Given
from fairlead.rollout.samples import (
    is_sample,
    numbers_of,
    read_samples,
    rollouts_of,
    score_kept,
    scored_rows,
    shares_of,
)
from fairlead.rollout.screen import ScreenSettings, open_screen, share_empty

OTHERS = ("data.template", "model.tokenizer", "model.device")
LENGTH = 2**20
"""Tokens a rendered text may have: nothing is cut here, a reward model cuts what it reads."""


def are_samples(path: str | Path) -> bool:
    """Whether a file's first row is a sample."""
    try:
        return Path(path).is_file() and is_sample(next(read_rows(path)).data)
    except DataError:  # whoever reads it as something else says what is wrong
        return False


def score_samples(
    reward: Given, samples: str | Path, settings: Settings = (), *, out: str | Path | None = None
) -> dict[str, Any]:
    """Score the rows of a file that `fairlead generate` wrote with ``reward``, a source as the online algorithms take
    it, and write them to ``out``, whole or not at all.

    ``settings`` are those of `ScreenSettings`, and `model.tokenizer` (a run, folder or hub id) with `data.template`:
    how a prompt reads as text to a reward that is a function; those of a trained reward when not given, else plain
    text. Returns what was read and discarded, and what the scores were; without ``out`` also the ``rows``. Raises
    TrainingError for a reward or a rule that fails, with the sample, and where nothing is left.
    """
    require_jsonl(out)
    recipe = asked("score", settings, ScreenSettings, OTHERS)
    own: ScreenSettings = recipe.settings
    rows = read_samples(samples)
    renderer = _renderer(reward, recipe.model.tokenizer, recipe.data.template)
    rollouts, reasons = rollouts_of(rows, renderer), list[str | None]([None] * len(rows))
    if (screen := open_screen(renderer, own.clean, own.discard)) is not None:
        rollouts, reasons = screen(rollouts)
    known = torch.tensor([reason is None for reason in reasons])
    share_empty(known, numbers_of(rows), own, shares_of(reasons))
    scores = score_kept(open_reward(reward, renderer, device=pick_device(recipe.model.device)), rollouts, reasons)
    scored = list(scored_rows(rows, rollouts, scores, reasons))
    values = [row["score"] for row in scored if row["score"] is not None]
    notes = Counter(f"discarded: {reason}" for reason in reasons if reason is not None)
    if alike := _alike(scored):
        notes["prompts whose responses all score alike"] = alike
    if out is not None:
        write_jsonl(out, scored)
    return {
        "reward": str(reward),
        "data": str(samples),
        "out": None if out is None else str(out),
        "read": len(rows),
        "kept": len(rows),
        "dropped": {},
        "notes": dict(notes),
        "formats": {"samples": len(rows)},
        "scores": {
            "mean": sum(values) / len(values),
            "lowest": min(values),
            "highest": max(values),
            "n": len(values),
        },
        **({"rows": scored} if out is None else {}),
    }


def _renderer(reward: Given, tokenizer: str | None, template: str) -> Renderer:
    place = tokenizer or next(iter(model_paths(reward)), None)
    if place is None:  # a function of texts: how many tokens they have, nobody asks
        return Renderer(train_tokenizer((), 260, LENGTH), template="plain", max_length=LENGTH)
    folder = Path(place) / "model"
    known = read_meta(folder if folder.is_dir() else Path(place)).get("template", "auto")
    return Renderer(load_tokenizer(place), template=known if template == "auto" else template, max_length=LENGTH)


def _alike(rows: Sequence[dict[str, Any]]) -> int:
    """Prompts with several scored responses, all of one score."""
    ends = list(accumulate(numbers_of(rows)))
    groups = [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    scores = [[row["score"] for row in group if row["score"] is not None] for group in groups]
    return sum(len(each) > 1 and min(each) == max(each) for each in scores)
