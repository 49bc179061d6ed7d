"""The answers that rows hold, whatever their format, for something that judges each of them. Knows no judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fairlead.data.convert import PLURALS
from fairlead.data.formats import FORMATS, Format, Notes, best_fit, find_format, missing_field, ranked_answers, unknown
from fairlead.data.records import is_prepared, renamed
from fairlead.data.sources import Row, read_source
from fairlead.errors import DataError
from fairlead.types import Conversation, Demonstration, Labelled, Message, Preference, Prompt, Ranking, Record

KINDS = (Preference, Ranking, Labelled, Demonstration)

Answer = tuple[Prompt, str | Message]


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a row, each with its prompt, in the order of the row; a blank one is None."""

    columns: tuple[str, ...]
    """Where verdicts on them belong: ``score``; ``chosen_score`` and ``rejected_score``; or ``scores``, a list."""
    answers: tuple[Answer | None, ...]


def read_answers(
    source: str, *, format: str = "auto", columns: Mapping[str, str] | None = None, notes: Notes | None = None
) -> Iterator[tuple[Row, Format | None, Answers | str]]:
    """Each row of a file, of a folder of files, or of a hub data set, as it stands there, its format, and its answers,
    or (str) why it has none to judge. ``format`` and ``columns`` as in ``load_records``.

    Raises DataError for what cannot be read or is of no format, and for a row that by its fields holds no answer.
    """
    if is_prepared(Path(source)):
        names = sorted(path.name for path in Path(source).iterdir() if path.suffix in (".jsonl", ".parquet"))
        raise DataError(f"{source} holds several kinds of records", f"name one of its files: {', '.join(names)}")
    notes = Notes() if notes is None else notes
    forced = None if format == "auto" else find_format(format)
    return _each(read_source(source, notes=notes), forced, columns, notes)


def _each(
    rows: Iterator[Row], forced: Format | None, columns: Mapping[str, str] | None, notes: Notes
) -> Iterator[tuple[Row, Format | None, Answers | str]]:
    for row in rows:
        named = renamed(row, columns) if columns else row
        found = _format_of(named, forced)
        yield (row, None, found) if isinstance(found, str) else (row, found, _answers(named, found, notes))


def _format_of(row: Row, forced: Format | None) -> Format | str:
    found = best_fit(row, KINDS, None if forced is None else (forced,))
    if found is not None and found.record in KINDS:
        return found
    serving = [each for each in (FORMATS.values() if forced is None else (forced,)) if each.record in KINDS]
    if null := missing_field(row, serving):
        return f"{null} is null"
    if found is None:
        raise unknown(row, forced)
    raise DataError(
        f"{row.place}: the row has {', '.join(row.data)} and is read as {found.name} ({found.about}): it holds no "
        "answer to a prompt",
        f"give {', '.join(PLURALS[kind] for kind in KINDS)}; data.columns can name the columns",
    )


def _answers(row: Row, format: Format, notes: Notes) -> Answers | str:
    parsed = format.parse(row, notes)
    if isinstance(parsed, str):
        return parsed
    records = parsed if isinstance(parsed, list) else [parsed]
    pairs: list[tuple[Prompt, str | Message]] = []
    for record in records:
        if not isinstance(record, KINDS):
            return "does not end in an assistant turn" if isinstance(record, Prompt) else "holds text alone"
        if _is_blank(record.prompt):
            return "empty prompt"
        prompt = Prompt(record.prompt, tools=getattr(record, "tools", ()))
        pairs += [(prompt, text) for text in _texts(row, record)]
    answers = tuple(None if _is_empty(text) else (prompt, text) for prompt, text in pairs)
    if isinstance(parsed, Preference):
        return Answers(("chosen_score", "rejected_score"), answers) if all(answers) else "empty answer"
    if not any(answers):
        return "empty response"
    return Answers(("scores",) if isinstance(parsed, list | Ranking) else ("score",), answers)


def _texts(row: Row, record: Record) -> list[str | Message]:
    match record:
        case Preference():
            return [record.chosen, record.rejected]
        case Ranking():  # which is sorted, and may have left some out
            return [*ranked_answers(replace(row, data={k: v for k, v in row.data.items() if v is not None}))]
        case Demonstration() | Labelled():
            return [record.response]
        case _:
            return []


def _is_blank(prompt: Conversation) -> bool:
    return not (prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)).strip()


def _is_empty(answer: str | Message) -> bool:
    text = answer if isinstance(answer, str) else answer["content"]
    return not text.strip() and (isinstance(answer, str) or not answer.get("tool_calls"))
