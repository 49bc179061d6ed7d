"""Scores every answer of a data file with a reward model and writes the rows out again, all or the best. Changes no row
but by its scores; trains nothing."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fairlead.config import Section
from fairlead.data.answers import Answers, read_answers
from fairlead.data.formats import Format
from fairlead.data.sources import Counts, Row, write_jsonl
from fairlead.errors import ConfigError, DataError
from fairlead.evaluation.asked import asked, require_jsonl
from fairlead.evaluation.evaluate import finished_run
from fairlead.evaluation.score_samples import are_samples, score_samples
from fairlead.models.load import pick_device
from fairlead.rollout.rewards import ModelReward, open_model

SETTINGS = ("data.format", "data.columns", "data.limit", "model.device")
CHUNK = 256
"""Rows scored at a time."""
SAY_EVERY = 10.0
"""Seconds between words on how far it is."""
GIVEN = "given_"
"""Before the name of a column of the data's own that a score takes the place of."""

Scored = tuple[dict[str, Any], float | None]
"""A row with its scores, and its score where it has one alone."""


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(slots=True)
class _Tally:
    """What became of the rows, and what their scores were."""

    counts: Counts = field(default_factory=Counts)
    formats: Counter[str] = field(default_factory=Counter[str])
    answers: int = 0
    total: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, score: float) -> None:
        self.answers += 1
        self.total += score
        self.lowest, self.highest = min(self.lowest, score), max(self.highest, score)


def score_file(
    reward: str | Path,
    data: str | Path,
    settings: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    min_score: float | None = None,
    top_share: float | None = None,
    say: Callable[[str], None] = _say,
) -> dict[str, Any]:
    """Score the rows of ``data`` (a file, a folder of files, or a hub id) with ``reward`` (a run or a folder), in their
    order.

    A row gets ``score``; a pair ``chosen_score`` and ``rejected_score``; a row of several answers ``scores``, in the
    order it holds them, null for a blank one. A column of its own by such a name becomes ``given_NAME``. Only rows with
    ``min_score`` or more are kept, and of all that were scored the best ``top_share`` (in (0, 1]; at a tie the earlier
    row). ``settings`` are `data.format`, `data.columns`, `data.limit` and `model.device`.

    Returns ``read``, ``kept``, ``dropped`` by reason, ``notes``, ``formats`` and what the scores were; the rows are
    written to ``out`` as JSON Lines, whole or not at all, or else stand in ``rows``. The rows are held in memory for
    ``top_share`` and without ``out``. A file of samples is scored by any reward, as `score_samples` says. Raises
    ConfigError, DataError, ModelError and RunError.
    """
    if are_samples(data):
        if (min_score, top_share) != (None, None):
            raise ConfigError("min-score and top-share choose no samples", hint="fairlead select keeps the best")
        return score_samples(reward, data, settings, out=out)
    recipe = _settings(settings, out, min_score, top_share)
    tally = _Tally()
    given = recipe.data
    rows = read_answers(str(data), format=given.format, columns=given.columns, notes=tally.counts.notes)
    if (Path(reward) / "recipe.yaml").is_file():
        finished_run(reward)
    model = open_model(str(reward), device=pick_device(recipe.model.device))
    single = None if (min_score, top_share) == (None, None) else "min-score" if min_score is not None else "top-share"
    scored = _scored(model, islice(rows, given.limit), tally, single, say)
    if top_share is not None:
        scored = _best(list(scored), top_share, tally)
    kept = _kept(scored, min_score, tally, str(data))
    found: dict[str, Any] = {} if out is not None else {"rows": list(kept)}
    if out is not None:
        write_jsonl(out, kept)
    return {
        "reward": str(reward),
        "data": str(data),
        "out": None if out is None else str(out),
        **tally.counts.as_dict(),
        "formats": dict(tally.formats),
        "scores": {
            "mean": tally.total / tally.answers,
            "lowest": tally.lowest,
            "highest": tally.highest,
            "n": tally.answers,
        },
        **found,
    }


def describe(result: dict[str, Any]) -> str:
    """What was done, in a line."""
    dropped = "; ".join(f"{number:,} {reason}" for reason, number in result["dropped"].items())
    noted = "".join(f"; noted {number:,}: {note}" for note, number in result["notes"].items())
    scores = result["scores"]
    return (
        f"{result['read']:,} rows read as {' and '.join(result['formats'])}, {result['kept']:,} kept; dropped: "
        f"{dropped or 'none'}{noted}; {scores['n']:,} scores from {scores['lowest']:.3g} to {scores['highest']:.3g}, "
        f"mean {scores['mean']:.3g}"
    )


def _settings(settings: Sequence[str], out: str | Path | None, min_score: float | None, top_share: float | None) -> Any:
    """The recipe of the settings. Raises ConfigError for what has no meaning here."""
    if min_score is not None and not math.isfinite(min_score):
        raise ConfigError(f"min-score must be a number, got {min_score}")
    if top_share is not None and not 0 < top_share <= 1:
        raise ConfigError(f"top-share must be above 0 and at most 1, got {top_share:g}")
    require_jsonl(out)
    return asked("score", settings, Section, SETTINGS)


def _scored(
    reward: ModelReward,
    rows: Iterable[tuple[Row, Format | None, Answers | str]],
    tally: _Tally,
    single: str | None,
    say: Callable[[str], None],
) -> Iterator[Scored]:
    """The rows that hold answers, with their scores. ``single`` is the option that needs one score a row."""
    waiting, last = iter(rows), time.monotonic()
    while chunk := list(islice(waiting, CHUNK)):
        held: list[tuple[Row, Answers]] = []
        for row, format, answers in chunk:
            tally.counts.read += 1
            if format is not None:
                tally.formats[format.name] += 1
            if isinstance(answers, str):
                tally.counts.dropped[answers] += 1
            elif single is not None and answers.columns != ("score",):
                raise ConfigError(
                    f"{single} needs rows with one score each, but {row.place} holds {len(answers.answers)} answers",
                    hint=f"score the file without {single}: each of its rows gets {' and '.join(answers.columns)}",
                )
            else:
                held.append((row, answers))
        ids = reward.ids([answer for _, answers in held for answer in answers.answers if answer is not None])
        if cut := sum(len(row) > reward.max_length for row in ids):
            tally.counts.notes[f"answers read without their beginning, beyond {reward.max_length} tokens"] += cut
        scores = iter(reward.score_ids(ids))
        for row, answers in held:
            given = [None if answer is None else next(scores) for answer in answers.answers]
            for score in given:
                if score is not None:
                    tally.add(score)
            yield _with_scores(row, answers, given, tally.counts), given[0] if len(given) == 1 else None
        if time.monotonic() - last > SAY_EVERY:
            say(f"{tally.counts.read:,} rows read")
            last = time.monotonic()


def _with_scores(row: Row, answers: Answers, scores: list[float | None], counts: Counts) -> dict[str, Any]:
    new = {"scores": scores} if answers.columns == ("scores",) else dict(zip(answers.columns, scores, strict=True))
    data: dict[str, Any] = {}
    for name, value in row.data.items():
        if name not in new or value is None:
            data[name] = value
        elif f"{GIVEN}{name}" in row.data:
            counts.notes[f"{name} of an earlier scoring replaced"] += 1
        else:
            data[f"{GIVEN}{name}"] = value
            counts.notes[f"{name} of the data kept as {GIVEN}{name}"] += 1
    return data | new


def _best(scored: Sequence[Scored], share: float, tally: _Tally) -> Iterator[Scored]:
    """The best of them, as many as the share is, rounded up; in their order."""
    number = math.ceil(share * len(scored) - 1e-9)
    ranked = sorted(range(len(scored)), key=lambda index: -(scored[index][1] or 0.0))
    if left_out := len(scored) - number:
        tally.counts.dropped[f"not of the best {share:g}"] = left_out
    return (scored[index] for index in sorted(ranked[:number]))


def _kept(scored: Iterable[Scored], least: float | None, tally: _Tally, name: str) -> Iterator[dict[str, Any]]:
    """The rows that are good enough. Raises DataError, when all are through, where there is none."""
    counts = tally.counts
    for row, score in scored:
        if least is not None and score is not None and score < least:
            counts.dropped[f"score below {least:g}"] += 1
        else:
            counts.kept += 1
            yield row
    if not counts.kept:
        raise DataError(
            f"no row of {name} is left: {counts.read} read, dropped {dict(counts.dropped)}",
            hint="look at its rows: is a field filled with what belongs to another?"
            if not tally.answers
            else f"the scores lie between {tally.lowest:.3g} and {tally.highest:.3g}",
        )
