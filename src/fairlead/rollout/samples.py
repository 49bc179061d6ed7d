"""Sampled responses as rows of a file, the same whether one process samples, scores and selects or each has a command
of its own.

A row holds a prompt as records have it (``tools`` and ``columns`` beside it where it has some), one ``response``, the
number of the ``sample``, whether it ``finished`` by itself, and its ``length`` in tokens. What scores it adds
``score``, of several rewards ``scores`` by name, or the reason why it was ``discarded``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fairlead.data.render import Renderer
from fairlead.data.sources import clip, read_rows
from fairlead.errors import DataError, TrainingError
from fairlead.ops.sampling import permutation, stream_key
from fairlead.types import Prompt, Reward, Rollout, Scores

Row = dict[str, Any]
T = TypeVar("T")

# --- prompts -------------------------------------------------------------------------------------------------------


def round_prompts(prompts: Sequence[T], size: int, number: int, seed: int) -> list[T]:
    """The ``size`` prompts of a round: the next ones of an endless walk, each epoch of it in its own keyed order."""
    chosen, at = list[T](), number * size
    while len(chosen) < size:
        epoch, position = divmod(at, len(prompts))
        order = permutation(stream_key(seed, "prompts", epoch), len(prompts))
        part = order[position : position + size - len(chosen)]
        chosen += [prompts[i] for i in part]
        at += len(part)
    return chosen


def prompt_rows(prompts: Sequence[Prompt]) -> list[Row]:
    """Prompts as a file of prompts holds them, their columns beside them."""
    return [{**prompt.columns, **_prompt(prompt)} for prompt in prompts]


def _prompt(prompt: Prompt) -> Row:
    text = prompt.prompt if isinstance(prompt.prompt, str) else list(prompt.prompt)
    return {"prompt": text} | ({"tools": list(prompt.tools)} if prompt.tools else {})


# --- samples -------------------------------------------------------------------------------------------------------


def sample_rows(rollouts: Sequence[Rollout], num_samples: int, renderer: Renderer) -> list[Row]:
    """Rollouts, those of one prompt side by side, as rows. In a template that puts nothing before a response, the white
    space it begins with belongs to it."""

    def space(rollout: Rollout) -> str:
        text = renderer.tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)
        return text[: len(text) - len(text.lstrip())] if renderer.template == "plain" else ""

    return [
        {
            **_prompt(rollout.prompt),
            **({"columns": dict(rollout.prompt.columns)} if rollout.prompt.columns else {}),
            "response": space(rollout) + rollout.text,
            "sample": i % num_samples,
            "finished": rollout.finished,
            "length": len(rollout.response_ids),
        }
        for i, rollout in enumerate(rollouts)
    ]


def is_sample(row: Mapping[str, Any]) -> bool:
    return {"prompt", "response", "sample", "finished"} <= row.keys()


def read_samples(path: str | Path) -> list[Row]:
    """The rows of a file of samples. Raises DataError, naming file and line, for a row that is none."""
    found: list[Row] = []
    for row in read_rows(path):
        data, kinds = row.data, {"response": str, "sample": int, "finished": bool}
        if not is_sample(data):
            raise DataError(f"{row.place}: no sample: it has {', '.join(data)}", "`fairlead generate` writes samples")
        for name, kind in kinds.items():
            if not isinstance(data[name], kind):
                raise DataError(f"{row.place}: {name} must be {kind.__name__}, got {clip(data[name])}")
        if not isinstance(data["prompt"], str | list):
            raise DataError(f"{row.place}: prompt must be a text or a list of turns, got {clip(data['prompt'])}")
        found.append(dict(data))
    return found


def numbers_of(rows: Sequence[Row]) -> list[int]:
    """How many samples each prompt has, in the order of the rows."""
    numbers: list[int] = []
    for i, row in enumerate(rows):
        before = rows[i - 1] if i else {}
        if i and row["prompt"] == before["prompt"] and row["sample"] > before["sample"]:
            numbers[-1] += 1
        else:
            numbers.append(1)
    return numbers


def rollouts_of(rows: Sequence[Row], renderer: Renderer) -> list[Rollout]:
    """The rows as rollouts that a reward reads, their texts stripped as a sampler's are and tokenised by ``renderer``;
    no sampler's numbers."""
    prompts = [
        Prompt(
            row["prompt"] if isinstance(row["prompt"], str) else tuple(row["prompt"]),
            row.get("columns") or {},
            tuple(row.get("tools") or ()),
        )
        for row in rows
    ]
    texts = [row["response"].strip() for row in rows]
    ids = renderer.response_ids(list(zip(prompts, texts, strict=True)))
    return [
        Rollout(prompt, (), own if row["finished"] else own[:-1], (), row["finished"], text)
        for prompt, row, own, text in zip(prompts, rows, ids, texts, strict=True)
    ]


# --- scores --------------------------------------------------------------------------------------------------------


def score_kept(reward: Reward, rollouts: Sequence[Rollout], reasons: Sequence[str | None]) -> Scores:
    """Scores of what was not discarded; of what was, nan. Raises TrainingError where nothing is left."""
    left = [i for i, reason in enumerate(reasons) if reason is None]
    if not left:
        raise TrainingError(
            f"all {len(rollouts)} responses of the round were discarded: {dict(Counter(reasons))}, the first of "
            f"them {[rollout.text[:200] for rollout in rollouts[:1]]}",
            hint="look at what discards them, and at a sample of the policy",
        )
    scores = reward([rollouts[i] for i in left])
    if len(left) == len(rollouts):
        return scores

    def spread(values: Sequence[float]) -> tuple[float, ...]:
        whole = [math.nan] * len(rollouts)
        for i, value in zip(left, values, strict=True):
            whole[i] = value
        return tuple(whole)

    return Scores(spread(scores.values), parts={name: spread(values) for name, values in scores.parts.items()})


def scored_rows(
    rows: Sequence[Row], rollouts: Sequence[Rollout], scores: Scores, reasons: Sequence[str | None]
) -> Iterator[Row]:
    """The rows with what became of them: the response as it was judged, its score, or why it was discarded."""
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        cleaned = {"response": rollout.text, "finished": rollout.finished, "length": len(rollout.response_ids)}
        judged = row | cleaned if rollout.text != row["response"].strip() else dict(row)
        judged["score"] = None if reasons[i] else scores.values[i]
        if reasons[i]:
            judged["discarded"] = reasons[i]
        elif scores.parts:
            judged["scores"] = {name: values[i] for name, values in scores.parts.items()}
        yield judged


def shares_of(reasons: Sequence[str | None]) -> dict[str, float]:
    """Of all responses, those discarded, and by which reason."""
    counts = Counter(reason for reason in reasons if reason is not None)
    if not counts:
        return {}
    shares = {f"discarded/{reason}": number / len(reasons) for reason, number in sorted(counts.items())}
    return {"discarded": sum(counts.values()) / len(reasons), **shares}
