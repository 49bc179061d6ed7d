"""Rows to records: recognises what a row is by its fields. Knows nothing of tokens or templates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fairlead.data.hh import parse_pair
from fairlead.data.sources import Counts, Row, read_rows
from fairlead.data.splits import split_of
from fairlead.errors import DataError
from fairlead.types import Conversation, Demonstration, Message, Preference, Prompt, Record, Text

RecordType = type[Text] | type[Demonstration] | type[Preference] | type[Prompt]
Rows = Iterable[Mapping[str, Any]]

_FILES: dict[RecordType, str] = {
    Text: "pretrain.jsonl",
    Demonstration: "sft.jsonl",
    Preference: "preference.jsonl",
    Prompt: "prompts.jsonl",
}
_WANTED: dict[RecordType, str] = {
    Text: "text",
    Demonstration: "prompt and response (or completion), question and answer, or messages",
    Preference: "prompt, chosen and rejected, or question, response_j and response_k, or two HH transcripts",
    Prompt: "prompt, question or messages",
}


def load_records(
    source: str | Sequence[str] | Rows, record: RecordType, *, limit: int | None = None, heldout: bool = False
) -> tuple[list[Any], Counts]:
    """The records of files, of a folder written by `fairlead prepare`, of a hub data set, or of rows in memory.

    Rows that are what they should be but cannot be used (empty response, chosen equal to rejected) are dropped and
    counted by reason. Raises DataError for a row without the needed fields, naming its line, and when none is left.
    """
    counts, records = Counts(), list[Record]()
    for row in _rows(source, record, heldout):
        if limit is not None and len(records) >= limit:
            break
        counts.read += 1
        parsed = parse_record(row, record)
        if isinstance(parsed, str):
            counts.dropped[parsed] += 1
        else:
            counts.kept += 1
            records.append(parsed)
    if not records:
        raise DataError(
            f"no usable row in {_name(source)}: {counts.read} read, dropped {dict(counts.dropped)}",
            hint="look at its rows: is a field filled with what belongs to another?",
        )
    return records, counts


def split_records(records: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, held-out) records; equal prompts always land on one side.

    The key is not that of `fairlead prepare`: what it put in one split would all land on one side here.
    """
    parts: dict[str, list[Any]] = {"train": [], "eval": []}
    for record in records:
        parts[split_of(f"held-out {prompt_key(record)}", {"train": 1 - fraction, "eval": fraction}, seed)].append(
            record
        )
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
    if not isinstance(prompt, str) and [turn["role"] for turn in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    return prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False, sort_keys=True)


def parse_record(row: Row, record: RecordType) -> Any:
    """The record a row holds, or the reason to drop it (str). Raises DataError where fields are missing or wrong."""
    parse = {Text: _text, Demonstration: _demonstration, Preference: _preference, Prompt: _prompt}[record]
    return parse(row)


def _text(row: Row) -> Text | str:
    text = _string(row, "text") if "text" in row.data else _missing(row, Text)
    return Text(text) if text.strip() else "empty text"


def _demonstration(row: Row) -> Demonstration | str:
    data = row.data
    if "messages" in data:
        *prompt, last = _messages(row, "messages")
        if last["role"] != "assistant" or not prompt:
            return "does not end in an assistant turn"
        return Demonstration(tuple(prompt), last["content"]) if last["content"].strip() else "empty response"
    for prompt, response in (("prompt", "response"), ("prompt", "completion"), ("question", "answer")):
        if prompt in data and response in data:
            text = _response(row, response)
            return Demonstration(_conversation(row, prompt), text) if text.strip() else "empty response"
    return _missing(row, Demonstration)


def _preference(row: Row) -> Preference | str:
    data = row.data
    if "prompt" in data and "chosen" in data and "rejected" in data:
        names = ("prompt", "chosen", "rejected")
    elif "question" in data and "response_j" in data and "response_k" in data:
        names = ("question", "response_j", "response_k")
    elif isinstance(data.get("chosen"), str) and isinstance(data.get("rejected"), str):
        pair = parse_pair(data["chosen"], data["rejected"])
        if pair == "no turn markers":
            return _missing(row, Preference)
        return pair if isinstance(pair, str) else Preference(tuple(pair.prompt), pair.chosen, pair.rejected)
    else:
        return _missing(row, Preference)
    prompt, chosen, rejected = _conversation(row, names[0]), _response(row, names[1]), _response(row, names[2])
    if not chosen.strip() or not rejected.strip():
        return "empty answer"
    if chosen == rejected:
        return "chosen equal to rejected"
    margin = data.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin)
    ):
        raise DataError(f"{row.place}: margin must be a number, got {margin!r}")
    return Preference(prompt, chosen, rejected, None if margin is None else float(margin))


def _prompt(row: Row) -> Prompt | str:
    name = next((name for name in ("prompt", "question", "messages") if name in row.data), None)
    if name is None:
        return _missing(row, Prompt)
    prompt = _conversation(row, name)
    if isinstance(prompt, str) and not prompt.strip():
        return "empty prompt"
    return Prompt(prompt, {key: value for key, value in row.data.items() if key != name})


def _missing(row: Row, record: RecordType) -> Any:
    raise DataError(
        f"{row.place}: the row lacks the fields of a {record.__name__}: it has {', '.join(row.data) or 'none'}",
        hint=f"needed: {_WANTED[record]}",
    )


def _string(row: Row, name: str) -> str:
    value = row.data[name]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {name} must be text, got {type(value).__name__} {str(value)[:60]!r}")
    return value


def _response(row: Row, name: str) -> str:
    """Text, or a list of messages that holds one assistant turn."""
    if isinstance(row.data[name], list):
        turns = _messages(row, name)
        if turns[-1]["role"] != "assistant":
            raise DataError(f"{row.place}: {name} does not end in an assistant turn")
        return turns[-1]["content"]
    return _string(row, name)


def _conversation(row: Row, name: str) -> Conversation:
    return tuple(_messages(row, name)) if isinstance(row.data[name], list) else _string(row, name)


def _messages(row: Row, name: str) -> list[Message]:
    value = row.data[name]
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.place}: {name} must be a list of messages, got {str(value)[:60]!r}")
    messages: list[Message] = []
    for item in cast(list[Any], value):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DataError(
                f"{row.place}: {name} holds {str(item)[:60]!r}, which is no message",
                hint='a message is {"role": "user", "content": "..."}; roles are system, user, assistant',
            )
        messages.append({"role": role, "content": content})
    return messages


# --- where rows come from ------------------------------------------------------------------------------------------


def _rows(source: str | Sequence[str] | Rows, record: RecordType, heldout: bool) -> Iterator[Row]:
    if isinstance(source, str):
        yield from _rows_of_path(source, record, heldout)
        return
    for index, item in enumerate(source):
        if isinstance(item, str):
            yield from _rows_of_path(item, record, heldout)
        elif isinstance(item, Mapping):
            yield Row(dict(item), f"row {index}")
        else:
            raise DataError(f"row {index} must be a mapping of fields, got {type(item).__name__}")


def _rows_of_path(name: str, record: RecordType, heldout: bool) -> Iterator[Row]:
    path = Path(name)
    if path.is_dir():
        wanted = path / f"{'heldout_' if heldout else ''}{_FILES[record]}"
        if not wanted.is_file():
            raise DataError(
                f"{name} is a directory without {wanted.name}, where a file was meant",
                hint="give a file of records, or a folder written by `fairlead prepare`",
            )
        path = wanted
    if path.exists() or path.suffix or not _could_be_hub_id(name):
        yield from read_rows(path)
        return
    yield from _rows_of_hub(name, heldout)


def _could_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def _rows_of_hub(name: str, heldout: bool) -> Iterator[Row]:
    import datasets

    split = "test" if heldout else "train"
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # datasets raises a different class for each way a hub can fail
        raise DataError(
            f"{name} is no local file, and as a data set of the hub it cannot be read: {error}",
            hint="check the path, the network and the name",
        ) from error
    for index, row in enumerate(rows):
        yield Row(dict(cast(Mapping[str, Any], row)), f"{name} {split} row {index}")


def _name(source: Any) -> str:
    return source if isinstance(source, str) else "the given rows"
