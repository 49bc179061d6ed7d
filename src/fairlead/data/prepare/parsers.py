"""How the rows of each published set become rows of the outputs. Knows neither files nor splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fairlead.data.prepare.sets import Parsed, SetOptions
from fairlead.data.sources import Row, clip
from fairlead.errors import DataError

_BREAK = re.compile(r"[ \t]*<br\s*/?>[ \t]*", re.IGNORECASE)
_C1 = re.compile(r"[\x80-\x9f]")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"####\s*(\S[^\n]*?)\s*\Z")
PAIRED_FOLDERS = {"finetune": ("sft",), "reward": ("preference",), "rl": ("prompts",)}
"""The stage each folder of stack-exchange-paired serves; the questions of one are in no other."""


@dataclass(frozen=True, slots=True)
class PairOptions(SetOptions):
    min_margin: Annotated[float, Field(ge=0)] = 0.0
    """Pairs whose scores differ by less are dropped; ties always are."""


@dataclass(frozen=True, slots=True)
class ReviewOptions(SetOptions):
    prompt_words: Annotated[int, Field(ge=1)] = 4
    """Words of a review that make its prompt, and the prompt of its demonstration."""
    passage_words: Annotated[int, Field(ge=1)] | None = None
    """Labelled are the first and the last so many words of a review, each as a row; null: the review."""


@dataclass(frozen=True, slots=True)
class MathOptions(SetOptions):
    calculations: bool = True
    """Keep the calculator's notes, <<48/2=24>>, in the solutions."""


def demonstration(row: Row, file: Path, options: SetOptions, notes: Counter[str]) -> Parsed:
    """Instructions with an answer."""
    from fairlead.types import Demonstration

    found = _record(row, Demonstration, notes)
    if isinstance(found, str):
        return found
    tools = {"tools": list(found.tools)} if found.tools else {}
    return [
        ("sft", {"prompt": found.prompt, "response": found.response, **tools}),
        ("prompts", {"prompt": found.prompt, **tools}),
    ]


def pair(row: Row, file: Path, options: SetOptions, notes: Counter[str]) -> Parsed:
    """Two answers, the better one known; it also is a demonstration."""
    from fairlead.types import Preference

    found = _record(row, Preference, notes)
    if isinstance(found, str):
        return found
    margin = {} if found.margin is None else {"margin": found.margin}
    if margin and isinstance(options, PairOptions) and margin["margin"] < options.min_margin:
        return "margin below min_margin"
    return [
        ("preference", {"prompt": found.prompt, "chosen": found.chosen, "rejected": found.rejected, **margin}),
        ("sft", {"prompt": found.prompt, "response": found.chosen}),
        ("prompts", {"prompt": found.prompt}),
    ]


def paired_answers(row: Row, file: Path, options: SetOptions, notes: Counter[str]) -> Parsed:
    """Question, better and worse answer, and where they come from. The publisher's folders serve a stage each."""
    rows = pair(row, file, options, notes)
    if isinstance(rows, str):
        return rows
    serves = PAIRED_FOLDERS.get(file.parent.name, [name for name, _ in rows])
    origin = {name: row.data[name] for name in ("qid", "date", "metadata") if row.data.get(name) is not None}
    return [(name, {**fields, **origin}) for name, fields in rows if name in serves]


def review(row: Row, file: Path, options: ReviewOptions, notes: Counter[str]) -> Parsed:
    """A review and whether it is favourable; one without a label is text alone."""
    text = row.data.get("text")
    if not isinstance(text, str):
        raise DataError(f"{row.place}: text must be a review, got {clip(text)}")
    label = _label(row)
    if _C1.search(text):
        text = _C1.sub(_from_windows, text)
        notes["control characters read as Windows-1252"] += 1
    if _BREAK.search(text):
        text = _BREAK.sub("\n", text)
        notes["<br /> made line ends"] += 1
    text = text.strip()
    if not text:
        return "empty review"
    rows: list[tuple[str, Mapping[str, Any]]] = [("pretrain", {"text": text})]
    if label is None:
        notes["without a label, text alone"] += 1
        return rows
    words = re.match(rf"(?:\S+\s+){{{options.prompt_words - 1}}}\S+", text)
    prompt = words[0] if words else text
    for passage in _passages(text, options.passage_words):
        rows.append(("labelled", {"prompt": "", "response": passage, "label": label}))
    rows.append(("prompts", {"prompt": prompt}))
    if label and len(prompt) < len(text):
        rows.append(("sft", {"prompt": prompt, "response": text[len(prompt) :]}))
    return rows


def mathematics(row: Row, file: Path, options: MathOptions, notes: Counter[str]) -> Parsed:
    """A problem and its solution, which ends in ``#### n``; the number stands beside the prompt for a reward."""
    question, answer = row.data.get("question"), row.data.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"{row.place}: question and answer must be text, got {clip(question)} and {clip(answer)}")
    final = _FINAL.search(answer)
    if not question.strip() or final is None:
        return "empty question" if final else "no final answer after ####"
    number = final[1].replace(",", "")
    if not options.calculations:
        answer = _CALCULATION.sub("", answer)
    return [("sft", {"prompt": question, "response": answer}), ("prompts", {"prompt": question, "answer": number})]


def _record(row: Row, wanted: Any, notes: Counter[str]) -> Any:
    """What the row's format makes of it, or the reason to drop it."""
    from fairlead.data.records import parse_row

    (outcome,) = parse_row(row, wanted, notes=notes)
    return outcome


def _label(row: Row) -> bool | None:
    """True for a favourable review; none where nobody has said (IMDB's ``unsup``, -1 on the hub)."""
    value = row.data.get("label")
    if value is None or value == -1:
        return None
    if value not in (0, 1):
        raise DataError(f"{row.place}: label must be 1 for favourable or 0, got {clip(value)}")
    return bool(value)


def _passages(text: str, words: int | None) -> list[str]:
    """The first and the last ``words`` of a text; the text where it has no more, or none are asked for."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    if words is None or len(spans) <= words:
        return [text]
    return [text[: spans[words - 1][1]], text[spans[-words][0] :]]


def _from_windows(match: re.Match[str]) -> str:
    """A C1 control character as the Windows-1252 character that some program took for Latin-1."""
    try:
        return match[0].encode("latin-1").decode("cp1252")
    except UnicodeDecodeError:  # five of the 32 are nothing there
        return match[0]
