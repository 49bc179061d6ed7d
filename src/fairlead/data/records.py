"""Rows of a file, folder, hub id or of memory to the kind of record that is wanted, each row kept or counted. Knows
nothing of tokens or templates."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fairlead.data.convert import CONVERSIONS, PLURALS, convert, sources_of, targets_of
from fairlead.data.formats import FORMATS, Format, Notes, RecordType, best_fit, find_format, missing_field, unknown
from fairlead.data.sources import Counts, Row, read_source
from fairlead.data.splits import keyed_hash, split_of
from fairlead.errors import ConfigError, DataError
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Ranking, Record, Text

Rows = Iterable[Mapping[str, Any]]
Tag = TypeVar("Tag")

_FILES: dict[RecordType, str] = {
    Text: "pretrain",
    Demonstration: "sft",
    Preference: "preference",
    Ranking: "ranking",
    Labelled: "labelled",
    Prompt: "prompts",
}
"""The files of a folder written by `fairlead prepare`, each .jsonl or .parquet."""
_SPLITS: dict[RecordType, tuple[str, ...]] = {
    Text: ("pretrain",),
    Demonstration: ("sft", "finetune"),
    Preference: ("prefs", "preference", "reward"),
    Ranking: ("ranking", "reward"),
    Labelled: ("labelled", "kto"),
    Prompt: ("prompts", "gen", "rl"),
}
"""Words in the names of the splits that a data set publishes for each kind."""
_SPECIAL = re.compile(r"</?s>|<unk>|<pad>|<[be]os>|<\|\w+\|>|\[/?INST\]|<(?:start|end)_of_turn>")
_READ_AS, _TAKEN = "read as ", "taken: "


def load_records(
    source: str | Sequence[str] | Rows,
    record: RecordType,
    *,
    limit: int | None = None,
    heldout: bool = False,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[list[Any], Counts]:
    """The records of one or several files, folders, hub data sets, or of rows in memory.

    A row is of the first format of ``FORMATS`` that its fields fit and that gives ``record``, or of ``format``;
    ``columns`` names the column that holds a field. What is no ``record`` is converted where that can be, and the notes
    say so. A row that gives several records counts as several. With ``weights``, a number for each source, 2 takes
    every record twice (as the same object) and 0.5 half of them, by a hash of their place; held-out records have none.

    Rows that are understood but cannot be used (an empty answer, a tie) are dropped and counted by reason. Raises
    DataError, naming file and line, for a row of no format, with a value of the wrong type, or from which ``record``
    cannot be had; and when none is left. ``statement`` says what was read in one line.
    """
    shares = None if heldout or weights is None else _shares(source, weights)
    records, origins, counts = load_tagged(
        source, record, lambda origin, _: origin, limit=limit, heldout=heldout, format=format, columns=columns
    )
    if shares is not None:
        records = _weigh(records, origins, shares, counts)
        _require_some(records, source, counts)
    return records, counts


def load_tagged(
    source: str | Sequence[str] | Rows,
    record: RecordType,
    tag: Callable[[int, Row], Tag],
    *,
    limit: int | None = None,
    heldout: bool = False,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Any], list[Tag], Counts]:
    """``load_records`` without weights, and beside each record the tag of its row: what ``tag`` makes of the number of
    its source and of the row."""
    counts, records, tags = Counts(), list[Any](), list[Tag]()
    for origin, row in _rows(source, record, heldout, counts.notes):
        if limit is not None and len(records) >= limit:
            break
        for outcome in parse_row(row, record, format=format, columns=columns, notes=counts.notes):
            if limit is not None and len(records) >= limit:  # a row may give several
                break
            counts.read += 1
            if isinstance(outcome, str):
                counts.dropped[outcome] += 1
            else:
                counts.kept += 1
                records.append(outcome)
                tags.append(tag(origin, row))
    _require_some(records, source, counts)
    return records, tags, counts


def parse_row(
    row: Row,
    record: RecordType,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    notes: Notes | None = None,
) -> list[Any]:
    """The records a row gives; a reason (str) stands for each that is dropped. Raises DataError as ``load_records``."""
    notes = Counter() if notes is None else notes
    row = renamed(row, columns) if columns else row
    found = _format_of(row, record, format)
    if isinstance(found, str):
        return [found]
    notes[_READ_AS + found.name] += 1
    parsed = found.parse(row, notes)
    if isinstance(parsed, str):
        return [parsed]
    held = parsed if isinstance(parsed, list) else [parsed]
    outcomes = convert(held, record)
    if conversion := CONVERSIONS.get((type(held[0]), record)):
        notes[_TAKEN + conversion[0]] += 1
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, Prompt):
            outcomes[index] = replace(outcome, columns={**found.columns(row.data), **outcome.columns})
        if not isinstance(outcome, str) and any(_SPECIAL.search(text) for text in _texts(outcome)):
            notes["special token written as text"] += 1
    return outcomes


def statement(counts: Counts, record: RecordType) -> str:
    """What was read as what, what was taken of it, and what was dropped: one line for the user."""
    notes = +counts.notes
    formats = {name: number for name in FORMATS if (number := notes.pop(_READ_AS + name, 0))}
    taken = [note.removeprefix(_TAKEN) for note in notes if note.startswith(_TAKEN)]
    read = " and ".join(
        f"{name} ({FORMATS[name].about})" if len(formats) == 1 else f"{name} ({number:,})"
        for name, number in formats.items()
    )
    pieces = [f"{counts.read:,} rows read as {read}: {counts.kept:,} {PLURALS[record]}"]
    pieces += [f"taken of it: {' and '.join(taken)}"] if taken else []
    pieces += [f"dropped {number:,}: {reason}" for reason, number in (+counts.dropped).most_common()]
    pieces += [f"noted {number:,}: {note}" for note, number in notes.most_common() if not note.startswith(_TAKEN)]
    return "; ".join(pieces)


def has_heldout(source: str, record: RecordType) -> bool:
    """Whether ``source`` is a prepared folder with held-out rows that give ``record``."""
    return _prepared_file(Path(source), record, heldout=True) is not None


def split_records(records: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, held-out) records; equal prompts always land on one side. What stands in ``records`` several times as
    one object, by a weight, is held out once.

    The key is not that of `fairlead prepare`: what it put in one split would all land on one side here.
    """
    parts: dict[str, list[Any]] = {"train": [], "eval": []}
    for record in records:
        side = split_of(f"held-out {prompt_key(record)}", {"train": 1 - fraction, "eval": fraction}, seed)
        parts[side].append(record)
    parts["eval"] = list({id(record): record for record in parts["eval"]}.values())
    if not parts["train"] or (fraction and not parts["eval"]):
        raise DataError(
            f"data.eval_fraction={fraction} of {len(records)} records leaves {len(parts['train'])} to train on and "
            f"{len(parts['eval'])} to evaluate on",
            hint="give data.eval_path, or another fraction",
        )
    return parts["train"], parts["eval"]


def prompt_key(record: Record) -> str:
    """What two records must not share across splits: the prompt, or the whole text. Plain text is one user turn."""
    prompt = record.text if isinstance(record, Text) else record.prompt
    if not prompt and isinstance(record, Labelled):  # a review stands for itself
        prompt = record.response
    if not isinstance(prompt, str) and [turn["role"] for turn in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    return prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False, sort_keys=True)


def _format_of(row: Row, record: RecordType, name: str) -> Format | str:
    """The format of a row, or (str) why it is dropped: a field is null without which it is of no format that serves."""
    kinds = sources_of(record)
    forced = None if name == "auto" else find_format(name)
    among = None if forced is None else (forced,)
    found = best_fit(row, kinds, among)
    if record is Text and found is not None and found.record is Demonstration:  # a transcript to pretrain on is text
        text = best_fit(row, (Text,), among)
        found = text if text is not None and text.record is Text else found
    if found is not None and found.record in kinds:
        return found
    serving = [format for format in (FORMATS.values() if forced is None else (forced,)) if format.record in kinds]
    if null := missing_field(row, serving):
        return f"{null} is null"
    raise unknown(row, forced) if found is None else _refusal(row, found, record)


def _refusal(row: Row, held: Format, record: RecordType) -> DataError:
    """The error for a row of a format that does not serve; names the nearest one that would, and what it lacks."""
    hint = f"it can serve as {', '.join(PLURALS[kind] for kind in targets_of(held.record))}"
    direct = [format for format in FORMATS.values() if format.record is record]
    lacks = {f.name: [names for names in f.fields if not row.data.keys() & {*names.split("|")}] for f in direct}
    begun = [format.name for format in direct if 0 < len(lacks[format.name]) < len(format.fields)]
    if begun:
        nearest = min(begun, key=lambda name: len(lacks[name]))
        needed = " and ".join(names.replace("|", " or ") for names in lacks[nearest])
        hint = f"to be {nearest} it lacks {needed}, which data.columns can name; {hint}"
    return DataError(
        f"{row.place}: the row has {', '.join(row.data)} and is read as {held.name} ({held.about}); that gives no "
        f"{PLURALS[record]}",
        hint,
    )


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns under the names of the fields they hold; what had such a name before gives way.
    ``attributes.clear`` is ``clear`` in the field ``attributes``."""
    fields: dict[str, Any] = {}
    for field, column in columns.items():
        if column not in row.data:
            raise DataError(
                f"{row.place}: there is no column {column!r}, which data.columns names for {field}",
                f"the row has: {', '.join(row.data) or 'none'}",
            )
        outer, _, inner = field.partition(".")
        if inner:
            fields[outer] = {**fields.get(outer, {}), inner: row.data[column]}
        else:
            fields[field] = row.data[column]
    rest = {name: value for name, value in row.data.items() if name not in {*columns.values(), *fields}}
    return replace(row, data={**fields, **rest})


def _texts(record: Record) -> Iterator[str]:
    if isinstance(record, Text):
        yield record.text
        return
    yield from [record.prompt] if isinstance(record.prompt, str) else (turn["content"] for turn in record.prompt)
    match record:
        case Preference():
            yield from (record.chosen, record.rejected)
        case Ranking():
            yield from record.responses
        case Labelled() | Demonstration():
            yield record.response if isinstance(record.response, str) else record.response["content"]
        case Prompt():
            pass


# --- where rows come from ------------------------------------------------------------------------------------------


def _rows(
    source: str | Sequence[str] | Rows, record: RecordType, heldout: bool, notes: Notes
) -> Iterator[tuple[int, Row]]:
    """Rows, each with the number of its source."""
    for index, item in enumerate([source] if isinstance(source, str) else source):
        if isinstance(item, str):
            for row in _rows_of_path(item, record, heldout, notes):
                yield index, row
        elif isinstance(item, Mapping):
            yield 0, Row(dict(item), f"row {index}")
        else:
            raise DataError(f"row {index} must be a mapping of fields, got {type(item).__name__}")


def _rows_of_path(name: str, record: RecordType, heldout: bool, notes: Notes) -> Iterator[Row]:
    path = Path(name)
    if not is_prepared(path):
        return read_source(name, prefer=_SPLITS[record], heldout=heldout, notes=notes)
    file = _prepared_file(path, record, heldout)
    if file is None:
        raise DataError(
            f"{name} is a directory without {'heldout_' if heldout else ''}{_FILES[record]}.jsonl or .parquet, and "
            f"without another file that gives {PLURALS[record]}",
            hint="give a file of records, or prepare the data again with other options",
        )
    return read_source(str(file), notes=notes)


def is_prepared(path: Path) -> bool:
    """Whether `fairlead prepare` wrote the folder."""
    return any(_prepared_file(path, record, heldout) for record in _FILES for heldout in (False, True))


def _prepared_file(path: Path, record: RecordType, heldout: bool) -> Path | None:
    """The file of a prepared folder that holds the wanted kind, else one from which it can be had. Text has its own."""
    kinds = (Text,) if record is Text else sources_of(record)
    stems = [f"{'heldout_' if heldout else ''}{_FILES[kind]}" for kind in kinds]
    files = [path / f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".parquet")]
    return next((file for file in files if file.is_file()), None)


def _shares(source: Any, weights: Sequence[float]) -> Sequence[float]:
    paths = [source] if isinstance(source, str) else source
    if not all(isinstance(path, str) for path in paths) or len(paths) != len(weights):
        raise ConfigError(
            f"data.weights has {len(weights)} numbers, which is not one for each path of data.path",
            hint="for example data.path=[a.jsonl,b.jsonl] data.weights=[1,0.5]",
        )
    if not all(weight >= 0 for weight in weights) or not any(weights):
        raise ConfigError(f"data.weights must not be negative, nor all zero, got {list(weights)}")
    return weights


def _weigh(records: list[Record], origins: list[int], weights: Sequence[float], counts: Counts) -> list[Record]:
    weighed: list[Record] = []
    seen = Counter[int]()
    for record, origin in zip(records, origins, strict=True):
        seen[origin] += 1
        whole, part = divmod(weights[origin], 1)
        times = int(whole) + (keyed_hash(0, "weight", origin, seen[origin]) / 2**64 < part)
        weighed += [record] * times
        if not times:
            counts.dropped["left out by the weight of its source"] += 1
        elif times > 1:
            counts.notes["taken again by the weight of its source"] += times - 1
    counts.kept = len(weighed)
    counts.read = counts.kept + counts.dropped.total()
    return weighed


def _require_some(records: Sequence[Any], source: Any, counts: Counts) -> None:
    if not records:
        paths = [source] if isinstance(source, str) else source
        named = isinstance(paths, list | tuple) and paths and all(isinstance(path, str) for path in paths)
        raise DataError(
            f"no usable row in {', '.join(paths) if named else 'the given rows'}: {counts.read} read, dropped "
            f"{dict(counts.dropped)}",
            hint="look at its rows: is a field filled with what belongs to another?",
        )
