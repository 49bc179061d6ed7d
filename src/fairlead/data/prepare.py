"""Turns a raw data set into the files every stage reads. Knows that folder; not what trains on it.

    pretrain.jsonl    {"text"}
    sft.jsonl         {"prompt", "response"}
    preference.jsonl  {"prompt", "chosen", "rejected"}, and for stack-exchange where they come from
    prompts.jsonl     {"prompt"}
    heldout_*.jsonl   the last three again, for evaluation
    manifest.json     inputs, options, outputs by checksum, and what was dropped and why

A prompt is a list of messages for hh-rlhf and a string for stack-exchange. The folder is made under
another name and renamed, so it is whole or absent; it holds no time and no absolute path, so equal
inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

from fairlead.data import hh, stack_exchange
from fairlead.data.sources import Counts, atomic_write, clip, find_files, format_of, write_jsonl
from fairlead.data.splits import split_of
from fairlead.data.text import read_documents, text_files
from fairlead.errors import ConfigError, DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OUTPUTS = (
    "pretrain.jsonl", "sft.jsonl", "preference.jsonl", "prompts.jsonl",
    "heldout_sft.jsonl", "heldout_preference.jsonl", "heldout_prompts.jsonl",
)  # fmt: skip

Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class HHOptions:
    heldout: float = 0.15
    """Share of the conversations kept for evaluation; the others serve every stage."""
    pretrain_on_chosen: bool = True
    """pretrain.jsonl holds the training split's chosen transcripts; false: the plain text alone, so that a model
    pretrained on it has seen no answer of any fold of a cross-validation."""


@dataclass(frozen=True, slots=True)
class StackExchangeOptions:
    """Shares of the questions: supervised finetuning, reward model, sampling, evaluation."""

    finetune: float = 0.35
    reward: float = 0.35
    rl: float = 0.15
    evaluation: float = 0.15
    sft: Literal["all", "accepted_or_best"] = "all"
    """Which answers are demonstrations; the best has the highest score, then the lowest id."""
    max_pairs: int = 10
    """Pairs of one question, so that a few famous ones do not outweigh the rest."""

    def __post_init__(self) -> None:
        if self.sft not in ("all", "accepted_or_best"):
            raise ConfigError(f"sft must be 'all' or 'accepted_or_best', got {self.sft!r}")
        if self.max_pairs < 1:
            raise ConfigError(f"max_pairs must be at least 1, got {self.max_pairs}")


@dataclass(frozen=True, slots=True)
class _Kind:
    options: type[HHOptions] | type[StackExchangeOptions]
    find: Callable[[Path], list[Path]]
    build: Callable[[Sequence[Path], Any, int], tuple[Rows, dict[str, Any]]]


def prepare(
    kind: str,
    path: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Prepares the raw data at ``path`` into the folder ``out`` and returns its manifest.

    ``kind`` is ``hh-rlhf`` (a file or a folder of them; options: HHOptions) or ``stack-exchange``
    (a ``Posts.xml``, a site folder or a folder of those; options: StackExchangeOptions). ``text``
    adds plain text to ``pretrain.jsonl``. When ``out`` already holds what these inputs give,
    nothing is done.

    Raises ConfigError for an unknown kind or option, DataError for paths, rows and disks that do
    not serve.
    """
    if kind not in _KINDS:
        raise ConfigError(f"unknown kind of data {kind!r}", f"known are {', '.join(_KINDS)}")
    settings = _settings(kind, options)
    path, out = Path(path), Path(out).resolve()
    files, texts = _KINDS[kind].find(path), [] if text is None else text_files(text)
    inputs = _describe(files, path) + ([] if text is None else _describe(texts, Path(text)))
    request: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "inputs": inputs,
        "seed": seed,
        "options": asdict(settings),
    }
    if (manifest := _finished(out, request)) is not None:
        return manifest
    _refuse_strangers(out)

    rows, counts = _KINDS[kind].build(files, settings, seed)
    if not counts["kept"]:
        raise DataError(
            f"nothing of {path} can be used: {counts['read']} read, dropped {counts['dropped']}",
            f"is this really {kind} data?",
        )
    if texts:
        text_counts = Counts()
        rows["pretrain.jsonl"] += read_documents(texts, text_counts)
        counts["text"] = text_counts.as_dict()
    counts["equal_rows_merged"] = _merge_equal(rows)
    return _write(out, rows, request | {"counts": counts})


def _settings(kind: str, options: dict[str, Any]) -> HHOptions | StackExchangeOptions:
    known = [field.name for field in fields(_KINDS[kind].options)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{kind} has no option {name!r}",
                f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}",
            )
    return _KINDS[kind].options(**options)


def _hh_files(path: Path) -> list[Path]:
    """HH also publishes red-team attempts, which are no pairs."""

    def accepts(file: Path) -> bool:
        return format_of(file) == ".jsonl" and file.parent.name != "red-team-attempts"

    return find_files(path, accepts, ".jsonl or .jsonl.gz files")


def _build_hh(paths: Sequence[Path], options: HHOptions, seed: int) -> tuple[Rows, dict[str, Any]]:
    """Split by the first human turn: HH cuts a conversation into prompts that begin each other."""
    rows: Rows = {name: [] for name in OUTPUTS}
    counts, splits = Counts(), Counter[str]()
    shares = {"train": 1 - options.heldout, "heldout": options.heldout}
    for prompt, chosen, rejected in hh.read_pairs(paths, counts):
        split = split_of(prompt[0]["content"], shares, seed)
        splits[split] += 1
        prefix = "heldout_" if split == "heldout" else ""
        rows[f"{prefix}sft.jsonl"].append({"prompt": prompt, "response": chosen})
        rows[f"{prefix}preference.jsonl"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        rows[f"{prefix}prompts.jsonl"].append({"prompt": prompt})
        if split == "train" and options.pretrain_on_chosen:
            rows["pretrain.jsonl"].append({"text": hh.transcript(prompt, chosen)})
    return rows, counts.as_dict() | {"splits": dict(sorted(splits.items()))}


def _build_stack_exchange(
    paths: Sequence[Path], options: StackExchangeOptions, seed: int
) -> tuple[Rows, dict[str, Any]]:
    rows: Rows = {name: [] for name in OUTPUTS}
    counts, pair_counts, splits = Counts(), Counts(), Counter[str]()
    shares = {name: getattr(options, name) for name in ("finetune", "reward", "rl", "evaluation")}
    for question in stack_exchange.read_questions(paths, counts):
        split = split_of(question.prompt, shares, seed)
        splits[split] += 1
        prefix = "heldout_" if split == "evaluation" else ""
        if split in ("finetune", "evaluation"):
            answers = _demonstrations(question, options.sft)
            rows[f"{prefix}sft.jsonl"] += ({"prompt": question.prompt, "response": a.text} for a in answers)
        if split in ("reward", "evaluation"):
            pairs = stack_exchange.sample_pairs(question, seed=seed, limit=options.max_pairs, counts=pair_counts)
            rows[f"{prefix}preference.jsonl"] += (_preference(question, *pair) for pair in pairs)
        if split in ("rl", "evaluation"):
            rows[f"{prefix}prompts.jsonl"].append({"prompt": question.prompt})
        if split == "finetune":
            rows["pretrain.jsonl"] += (
                {"text": f"Question: {question.prompt}\n\nAnswer: {answer.text}"} for answer in question.answers
            )
    return rows, counts.as_dict() | {
        "splits": dict(sorted(splits.items())),
        "pairs": pair_counts.as_dict(),
    }


def _demonstrations(question: stack_exchange.Question, which: str) -> Sequence[stack_exchange.Answer]:
    if which == "all":
        return question.answers
    return [min(question.answers, key=lambda answer: (not answer.is_accepted, -answer.score, answer.id))]


def _preference(
    question: stack_exchange.Question,
    chosen: stack_exchange.Answer,
    rejected: stack_exchange.Answer,
) -> dict[str, Any]:
    return {
        "prompt": question.prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        "site": question.site,
        "question_id": question.id,
        "chosen_id": chosen.id,
        "rejected_id": rejected.id,
        "question_licence": question.licence,
        "chosen_licence": chosen.licence,
        "rejected_licence": rejected.licence,
    }


_KINDS = {
    "hh-rlhf": _Kind(HHOptions, _hh_files, _build_hh),
    "stack-exchange": _Kind(StackExchangeOptions, stack_exchange.posts_files, _build_stack_exchange),
}


def _merge_equal(rows: Rows) -> dict[str, int]:
    """Leaves the first of equal rows in each file; returns how many were merged."""
    merged: dict[str, int] = {}
    for name, listed in rows.items():
        distinct = list({json.dumps(row): row for row in listed}.values())
        if len(distinct) < len(listed):
            merged[name] = len(listed) - len(distinct)
            rows[name] = distinct
    return merged


def _describe(files: Sequence[Path], root: Path) -> list[dict[str, Any]]:
    """Files by their path from ``root``, so that the manifest does not name the machine."""
    name = Path(root.resolve().name)
    return [
        {
            "path": (name / file.relative_to(root)).as_posix(),
            "sha256": _sha256(file),
            "bytes": file.stat().st_size,
        }
        for file in files
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finished(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in ``out``, if it answers this request and every file is as it says."""
    try:
        manifest = cast("dict[str, Any]", json.loads((out / MANIFEST).read_bytes()))
        if any(manifest[name] != value for name, value in request.items()):
            return None
        outputs = cast("dict[str, dict[str, Any]]", manifest["outputs"])
        whole = all(_sha256(out / name) == output["sha256"] for name, output in outputs.items())
        return manifest if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_strangers(out: Path) -> None:
    """Raises DataError where writing ``out`` would destroy what was not made here."""
    if out.is_dir():
        strangers = sorted({entry.name for entry in out.iterdir()} - {*OUTPUTS, MANIFEST})
        if not strangers:
            return
        what = f"{out} holds other files: {', '.join(map(clip, strangers[:5]))}"
    elif not out.exists():
        return
    else:
        what = f"{out} is a file"
    raise DataError(what, "name a folder that does not exist yet, or one made by an earlier preparation")


def _write(out: Path, rows: Rows, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes everything into a folder beside ``out``, the manifest last, and moves it there."""
    partial, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    for leftover in (partial, old):  # of a killed process that had our number
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        outputs = {name: write_jsonl(partial / name, listed) for name, listed in rows.items()}
        manifest["outputs"] = {
            name: {"rows": number, "sha256": _sha256(partial / name)} for name, number in outputs.items()
        }
        with atomic_write(partial / MANIFEST) as file:
            file.write(json.dumps(manifest, ensure_ascii=False, indent=2).encode() + b"\n")
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except OSError as error:
        with suppress(OSError):
            old.rename(out)
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}", "check the place and run again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return manifest
