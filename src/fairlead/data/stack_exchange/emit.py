"""Last pass: the questions of one part as rows of each output. Knows splits; not where they come from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from fairlead.data.sources import Counts, atomic_write

from .options import StackExchangeOptions
from .questions import Answer, Question, demonstrations, sample_pairs
from .resolve import REPEATED
from .scatter import COMPRESSED

_STRING, _INTEGER = pyarrow.string(), pyarrow.int64()
_ASKED = {
    "site": _STRING,
    "question_id": _INTEGER,
    "question_author": _STRING,
    "question_licence": _STRING,
    "tags": pyarrow.list_(_STRING),
}
_ANSWERED = {"answer_id": _INTEGER, "answer_author": _STRING, "answer_licence": _STRING}
_SFT = {"prompt": _STRING, "response": _STRING, "score": _INTEGER, **_ASKED, **_ANSWERED}
_PREFERENCE = {
    **dict.fromkeys(("prompt", "chosen", "rejected"), _STRING),
    **dict.fromkeys(("chosen_score", "rejected_score"), _INTEGER),
    **_ASKED,
    **{f"{side}_{name[7:]}": kind for side in ("chosen", "rejected") for name, kind in _ANSWERED.items()},
}
_PROMPTS = {"prompt": _STRING, **_ASKED}
SCHEMAS = {
    "pretrain": pyarrow.schema({"text": _STRING, **_ASKED, **_ANSWERED}),
    "sft": pyarrow.schema(_SFT),
    "preference": pyarrow.schema(_PREFERENCE),
    "prompts": pyarrow.schema(_PROMPTS),
    "heldout_sft": pyarrow.schema(_SFT),
    "heldout_preference": pyarrow.schema(_PREFERENCE),
    "heldout_prompts": pyarrow.schema(_PROMPTS),
}
_ROWS_IN_BATCH = 2048


def emit(target: Path, questions: Path, resolved: Path, options: StackExchangeOptions, seed: int) -> dict[str, Any]:
    """Writes the rows of a part, ``TARGET-NAME.arrow`` for each output that has some; returns the counts."""
    counts, pairs = Counts(), Counts()
    splits, scores, merged, numbers = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    held: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    writers: dict[str, pyarrow.RecordBatchFileWriter] = {}
    with ExitStack() as stack:

        def flush(name: str) -> None:
            if name not in writers:
                sink = stack.enter_context(atomic_write(target.with_name(f"{target.name}-{name}.arrow")))
                writers[name] = stack.enter_context(pyarrow.ipc.new_file(sink, SCHEMAS[name], options=COMPRESSED))
            writers[name].write_batch(pyarrow.RecordBatch.from_pylist(held[name], schema=SCHEMAS[name]))
            numbers[name] += len(held[name])
            held[name].clear()

        for question, split in _split(questions, numpy.load(resolved.with_suffix(".npy")), list(options.shares)):
            if split is None:
                counts.dropped["duplicate question"] += 1
                counts.dropped["answer of a dropped question"] += len(question.answers)
                continue
            posts = (question, *question.answers)
            counts.kept += len(posts)
            counts.notes["licence by date"] += sum("(by date)" in (post.licence or "") for post in posts)
            counts.notes["author unknown"] += sum(post.author is None for post in posts)
            splits[split] += 1
            scores.update(str(answer.score) for answer in question.answers)
            for name, rows in _outputs(question, split, options, seed, pairs, merged):
                held[name] += rows
                if len(held[name]) >= _ROWS_IN_BATCH:
                    flush(name)
        for name in [name for name, rows in held.items() if rows]:
            flush(name)
    return {
        "counts": counts.as_dict(),
        "pairs": pairs.as_dict(),
        "splits": dict(splits),
        "scores": dict(scores),
        "merged": dict(merged),
        "rows": dict(numbers),
    }


def _split(path: Path, resolved: numpy.ndarray, names: Sequence[str]) -> Iterator[tuple[Question, str | None]]:
    """Every question with the name of its split, none for one that repeats another."""
    keys = iter(numpy.load(path.with_suffix(".npy")))
    with pyarrow.memory_map(f"{path}.arrow") as source, pyarrow.ipc.open_file(source) as file:
        for index in range(file.num_record_batches):
            for row in file.get_batch(index).to_pylist():
                _, place, split = next(keys)
                found = int(numpy.searchsorted(resolved["place"], place))
                if found < len(resolved) and resolved["place"][found] == place:
                    split = resolved["split"][found]
                row |= {"answers": tuple(Answer(**answer) for answer in row["answers"]), "tags": tuple(row["tags"])}
                yield Question(**row), None if split == REPEATED else names[int(split)]


def _outputs(
    question: Question, split: str, options: StackExchangeOptions, seed: int, pairs: Counts, merged: Counter[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of one question by the name of the output; rows of equal text are merged and counted."""
    asked = {
        "site": question.site,
        "question_id": question.id,
        "question_author": question.author,
        "question_licence": question.licence,
        "tags": question.tags,
    }
    prefix = "heldout_" if split == "evaluation" else ""
    if split in ("finetune", "evaluation"):
        answers = _distinct(demonstrations(question, options.sft), f"{prefix}sft", merged)
        yield (
            f"{prefix}sft",
            [
                {"prompt": question.prompt, "response": answer.text, **asked, **_by("answer", answer)}
                for answer in answers
            ],
        )
    if split == "finetune":
        yield (
            "pretrain",
            [
                {"text": f"Question: {question.prompt}\n\nAnswer: {answer.text}", **asked, **_by("answer", answer)}
                for answer in _distinct(question.answers, "pretrain", merged)
            ],
        )
    if split in ("reward", "evaluation"):
        yield (
            f"{prefix}preference",
            [
                {
                    "prompt": question.prompt,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "chosen_score": chosen.score,
                    "rejected_score": rejected.score,
                    **asked,
                    **_by("chosen", chosen),
                    **_by("rejected", rejected),
                }
                for chosen, rejected in sample_pairs(question, seed=seed, limit=options.max_pairs, counts=pairs)
            ],
        )
    if split in ("rl", "evaluation"):
        yield f"{prefix}prompts", [{"prompt": question.prompt, **asked}]


def _by(name: str, answer: Answer) -> dict[str, Any]:
    return {f"{name}_id": answer.id, f"{name}_author": answer.author, f"{name}_licence": answer.licence}


def _distinct(answers: Sequence[Answer], name: str, merged: Counter[str]) -> list[Answer]:
    """The first of answers with one text."""
    distinct = list({answer.text: answer for answer in reversed(answers)}.values())[::-1]
    merged[name] += len(answers) - len(distinct)
    return distinct
