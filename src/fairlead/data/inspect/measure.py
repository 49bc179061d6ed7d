"""Measures records before anything is trained on them: lengths, padding, shared prompts, labels, length bias and more.

Works on records and, where there is one, a renderer; without it lengths are in words and characters. Knows neither
files nor how a figure is shown.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

from fairlead.data.filters import Contamination, duplicates, parts, responses, score_margin, words
from fairlead.data.pack import packing_report
from fairlead.data.records import prompt_key
from fairlead.data.render import LengthCounts, Renderer, Tree
from fairlead.errors import ConfigError
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Ranking, Record, Text

KINDS: dict[str, type[Any]] = {
    "text": Text,
    "sft": Demonstration,
    "preference": Preference,
    "ranking": Ranking,
    "labelled": Labelled,
    "prompt": Prompt,
}
"""The names of the kinds of record."""
NEAR_SIMILARITY = 0.8
NEAR_RECORDS = 20_000
"""Near duplicates are looked for among so many records: some ten seconds."""
UNLIMITED = 2**31
Z = 1.959964
"""95 % of the normal distribution."""
BINS = 12


@dataclass(frozen=True, slots=True)
class Lengths:
    """Nearest-rank percentiles: each is the length of some record."""

    number: int
    mean: float
    p5: int
    p50: int
    p95: int
    max: int


@dataclass(frozen=True, slots=True)
class Rate:
    """A share and its 95 % interval."""

    hits: int
    number: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How often the better response is the longer one; equal lengths are left out of the rate."""

    unit: str
    longer: Rate
    equal: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What data.max_length and data.max_prompt_length do to the records."""

    max_length: int
    max_prompt_length: int
    kept: int
    cut: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    prompts: int
    """Different ones."""
    records: int
    """Those whose prompt stands in another record too."""
    saved: float | None
    """Share of the tokens that need not be computed because the responses of a record share its prompt."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    searched: int
    exact: int
    near: int | None
    """None: datasketch is not installed."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Values from ``low`` up to, but without, ``high`` (with it in the last bar); of one value where both are equal."""

    low: float
    high: float
    number: int


@dataclass(slots=True)
class Measures:
    kind: str
    records: int
    tokenizer: str | None
    template: str | None
    lengths: dict[str, dict[str, Lengths]]
    """Unit -> part of the record -> lengths, whole, before any limit."""
    limits: Limits | None
    packing: dict[str, Any] | None
    shared_prompts: SharedPrompts | None
    labels: Rate | None
    """Share of responses labelled good."""
    histograms: dict[str, list[Bar]]
    length_bias: LengthBias | None
    duplicates: Duplicates
    heldout: dict[str, int] | None
    """Held-out records, their different prompts, and how many of these share 13 words with a training record."""
    trees: list[Tree] = field(default_factory=list[Tree])
    """What the records became, limits applied: to be drawn, not shown as a measure."""
    kept: list[int] = field(default_factory=list[int])
    """Index of each tree's record."""


def kind_of(record: type[Any]) -> str:
    return next(name for name, known in KINDS.items() if known is record)


def measure(
    records: Sequence[Any],
    renderer: Renderer | None = None,
    *,
    heldout: Sequence[Any] = (),
    scores: Mapping[str, Sequence[float]] | None = None,
    tokenizer: str | None = None,
) -> Measures:
    """All measures of records of one kind, at least one.

    ``scores`` are columns of numbers that stand beside the records, each to be shown as a histogram.
    """
    kind = kind_of(type(records[0]))
    lengths: dict[str, dict[str, Lengths]] = {}
    limits = packing = saved = None
    trees, kept = list[Tree](), list[int]()
    sizes, unit = _text_sizes(records, len), "characters"
    bias_sizes = sizes
    if renderer is not None:
        unit = "tokens"
        trees, kept, counts, bias_sizes = _rendered(records, renderer)
        lengths[unit] = _lengths(records, bias_sizes)
        dropped = dict(sorted(counts.dropped.items()))
        limits = Limits(renderer.max_length, renderer.max_prompt_length, counts.kept, counts.cut, dropped)
        if kind != "prompt":
            sizes_together = [tree.num_tokens for tree in trees]
            length = max(renderer.max_length, *sizes_together)  # a limit is of one path, a pair has two
            packing = {"length": length, **packing_report(sizes_together, length)}
            saved = _saved(trees)
    else:
        lengths["words"] = _lengths(records, _text_sizes(records, lambda text: len(words(text))))
    lengths["characters"] = _lengths(records, sizes)
    columns = {**_score_columns(records), **(scores or {})}
    good = [record.label for record in records if isinstance(record, Labelled)]
    return Measures(
        kind=kind,
        records=len(records),
        tokenizer=tokenizer,
        template=None if renderer is None else renderer.template,
        lengths=lengths,
        limits=limits,
        packing=packing,
        shared_prompts=_shared([record for record in records if not isinstance(record, Text) and record.prompt], saved),
        labels=rate(sum(good), len(good)) if good else None,
        histograms={name: histogram(values) for name, values in columns.items() if values},
        length_bias=_length_bias(records, bias_sizes, unit),
        duplicates=_duplicates(records),
        heldout=_overlap(records, heldout) if heldout else None,
        trees=trees,
        kept=kept,
    )


# --- lengths -------------------------------------------------------------------------------------------------------

Sizes = dict[int, tuple[int, tuple[int, ...]]]
"""Index of a record -> the length of its prompt and of each response."""


def _text_sizes(records: Sequence[Any], size: Callable[[str], int]) -> Sizes:
    return {
        index: (0 if isinstance(record, Text) else size(parts(record)[0]), tuple(map(size, responses(record))))
        for index, record in enumerate(records)
    }


def _rendered(records: Sequence[Any], renderer: Renderer) -> tuple[list[Tree], list[int], LengthCounts, Sizes]:
    """Trees within the limits, their records' indices, what the limits did, and the lengths without them."""
    if isinstance(records[0], Prompt):
        within, counts = renderer.prompts(records)
        ids = renderer.prompt_ids(records)
        of_prompt = {id(prompt) for prompt, _ in within}
        kept = [index for index, record in enumerate(records) if id(record) in of_prompt]
        return [Tree(ids[i], ()) for i in kept], kept, counts, {i: (len(row), ()) for i, row in enumerate(ids)}
    trees, kept, counts = renderer.trees(records)
    whole, indices = trees, kept
    if counts.cut or counts.dropped:
        unlimited = copy(renderer)
        unlimited.max_length = unlimited.max_prompt_length = UNLIMITED
        whole, indices, _ = unlimited.trees(records)
    sizes = {i: (len(t.prompt), tuple(map(len, t.responses))) for i, t in zip(indices, whole, strict=True)}
    return trees, kept, counts, sizes


def _lengths(records: Sequence[Any], sizes: Sizes) -> dict[str, Lengths]:
    columns: defaultdict[str, list[int]] = defaultdict(list)
    for index, (prompt, sides) in sizes.items():
        record = records[index]
        if not isinstance(record, Text) and (prompt or not isinstance(record, Labelled)):
            columns["prompt"].append(prompt)
        for name, side in zip(response_names(record), sides, strict=True):
            columns[name].append(side)
        if not isinstance(record, Text | Prompt):
            columns["row"].append(prompt + sum(sides))
    ordered = [*sorted(columns.keys() - {"prompt", "row"}), *columns.keys() & {"row"}]
    return {name: lengths_of(columns[name]) for name in [*columns.keys() & {"prompt"}, *ordered]}


def response_names(record: Record) -> tuple[str, ...]:
    match record:
        case Text():
            return ("text",)
        case Preference():
            return ("chosen", "rejected")
        case Labelled():
            return ("good response" if record.label else "bad response",)
        case Ranking():
            return ("response",) * len(record.responses)
        case Demonstration():
            return ("response",)
        case Prompt():
            return ()


def lengths_of(values: Sequence[int]) -> Lengths:
    ordered = sorted(values)

    def percentile(share: float) -> int:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    mean = sum(ordered) / len(ordered)
    return Lengths(len(ordered), mean, percentile(0.05), percentile(0.5), percentile(0.95), ordered[-1])


# --- prompts -------------------------------------------------------------------------------------------------------


def _shared(records: Sequence[Any], saved: float | None) -> SharedPrompts | None:
    if not records:
        return None
    prompts = Counter(map(prompt_key, records))
    return SharedPrompts(len(prompts), sum(number for number in prompts.values() if number > 1), saved)


def _saved(trees: Sequence[Tree]) -> float:
    """Against rows of their own, prompt included, for every response."""
    separate = sum(len(t.prompt) * max(1, len(t.responses)) + sum(map(len, t.responses)) for t in trees)
    return 1 - sum(tree.num_tokens for tree in trees) / separate


def _overlap(records: Sequence[Any], heldout: Sequence[Any]) -> dict[str, int]:
    evaluated = Contamination(heldout)
    met = set[int]().union(*map(evaluated.near, records))
    return {"records": len(heldout), "prompts": len(evaluated), "near": len(met)}


# --- what a reward would learn -------------------------------------------------------------------------------------


def rate(hits: int, number: int, effective: float | None = None) -> Rate:
    """A share with Wilson's interval (1927), ``effective`` being the number of independent ones among ``number``."""
    n = number if effective is None else effective
    share = hits / number
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    centre, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    return Rate(hits, number, share, (centre - spread) / scale, (centre + spread) / scale)


def clustered_rate(outcomes: Iterable[tuple[str, bool]]) -> Rate | None:
    """The share of true outcomes, those of one cluster being dependent: pairs of one prompt share responses.

    The interval is Wilson's at the effective number of outcomes (Kish 1965): the number of independent ones whose share
    would vary as much as this ratio of cluster totals does.
    """
    hits, numbers = Counter[str](), Counter[str]()
    for cluster, outcome in outcomes:
        hits[cluster] += outcome
        numbers[cluster] += 1
    number, hit = numbers.total(), hits.total()
    if not number:
        return None
    share = hit / number
    squares = sum((hits[cluster] - share * size) ** 2 for cluster, size in numbers.items())
    effective = share * (1 - share) * number**2 / squares if squares else len(numbers)
    return rate(hit, number, min(effective, number))


def _length_bias(records: Sequence[Any], sizes: Sizes, unit: str) -> LengthBias | None:
    """Of a ranking, the best response against the worst."""
    outcomes: list[tuple[str, bool]] = []
    equal = 0
    for index, (_, sides) in sizes.items():
        record = records[index]
        if not isinstance(record, Preference | Ranking) or score_margin(record) == 0:
            continue
        equal += sides[0] == sides[-1]
        if sides[0] != sides[-1]:
            outcomes.append((prompt_key(record), sides[0] > sides[-1]))
    longer = clustered_rate(outcomes)
    return None if longer is None else LengthBias(unit, longer, equal)


def _score_columns(records: Sequence[Any]) -> dict[str, list[float]]:
    margins = [m for r in records if isinstance(r, Preference | Ranking) and (m := score_margin(r)) is not None]
    scores = [score for record in records if isinstance(record, Ranking) for score in record.scores or ()]
    return {"score": scores, "margin": margins}


def histogram(values: Sequence[float]) -> list[Bar]:
    """A bar for each value where they are few whole numbers, else twelve of equal width."""
    numbers = Counter(values)
    if len(numbers) <= 2 * BINS and all(float(value).is_integer() for value in numbers):
        return [Bar(value, value, number) for value, number in sorted(numbers.items())]
    low, high = min(values), max(values)
    if low == high:
        return [Bar(low, high, len(values))]
    width = (high - low) / BINS
    bins = Counter(min(int((value - low) / width), BINS - 1) for value in values)
    edges = [low + width * index for index in range(BINS)] + [high]
    return [Bar(start, end, bins[index]) for index, (start, end) in enumerate(pairwise(edges))]


def _duplicates(records: Sequence[Any]) -> Duplicates:
    exact = len(duplicates(records, None))
    searched = list(islice(records, NEAR_RECORDS))
    try:
        near = Counter(duplicates(searched, NEAR_SIMILARITY).values())["near duplicate"]
    except ConfigError:
        return Duplicates(0, exact, None)
    return Duplicates(len(searched), exact, near)
