"""The kinds of raw data known by name: where each is published, under which licence, and what becomes of its rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fairlead.data import hh, stack_exchange
from fairlead.data.prepare import parsers
from fairlead.data.prepare.arithmetic import ArithmeticOptions, write_problems
from fairlead.data.prepare.kind import Kind, Say, Source
from fairlead.data.prepare.parsers import MathOptions, PairOptions, ReviewOptions
from fairlead.data.prepare.rows import writing
from fairlead.data.prepare.sets import SetOptions, write_set
from fairlead.data.prepare.walks import WalkOptions, write_walks
from fairlead.data.sources import Counts, find_files, format_of
from fairlead.data.splits import split_of
from fairlead.data.text import read_documents, text_files
from fairlead.errors import DataError


@dataclass(frozen=True, slots=True)
class HHOptions:
    heldout: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Share of the conversations kept for evaluation; the others serve every stage."""
    pretrain_on_chosen: bool = True
    """pretrain holds the training split's chosen transcripts; false: the plain text alone, so that a model pretrained
    on it has seen no answer of any fold of a cross-validation."""


def _hh_files(path: Path) -> list[Path]:
    """HH also publishes red-team attempts, which are no pairs."""

    def accepts(file: Path) -> bool:
        return format_of(file) == ".jsonl" and file.parent.name != "red-team-attempts"

    return find_files(path, accepts, ".jsonl or .jsonl.gz files")


def _write_hh(paths: Sequence[Path], folder: Path, options: HHOptions, seed: int, say: Say) -> dict[str, Any]:
    """Split by the first human turn: HH cuts a conversation into prompts that begin each other."""
    counts, splits = Counts(), Counter[str]()
    shares = {"train": 1 - options.heldout, "heldout": options.heldout}
    with writing(folder) as outputs:
        for prompt, chosen, rejected in hh.read_pairs(paths, counts):
            split = split_of(prompt[0]["content"], shares, seed)
            splits[split] += 1
            prefix = "heldout_" if split == "heldout" else ""
            outputs.add(f"{prefix}sft", {"prompt": prompt, "response": chosen})
            outputs.add(f"{prefix}preference", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
            outputs.add(f"{prefix}prompts", {"prompt": prompt})
            if split == "train" and options.pretrain_on_chosen:
                outputs.add("pretrain", {"text": hh.transcript(prompt, chosen)})
    return counts.as_dict() | {"splits": dict(sorted(splits.items())), "equal_rows_merged": dict(outputs.merged)}


@dataclass(frozen=True, slots=True)
class TextOptions:
    heldout: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the documents kept for evaluation, drawn by a hash."""
    max_characters: Annotated[int, Field(ge=1)] = 4000
    """Longest document; longer texts are cut, at blank lines where possible."""


def _write_text(paths: Sequence[Path], folder: Path, options: TextOptions, seed: int, say: Say) -> dict[str, Any]:
    counts, splits = Counts(), Counter[str]()
    shares = {"train": 1 - options.heldout, "heldout": options.heldout}
    with writing(folder) as outputs:
        for document in read_documents(paths, counts, max_characters=options.max_characters):
            split = split_of(document["text"], shares, seed)
            splits[split] += 1
            outputs.add("heldout_pretrain" if split == "heldout" else "pretrain", document)
    return counts.as_dict() | {"splits": dict(sorted(splits.items())), "equal_rows_merged": dict(outputs.merged)}


def _named(*patterns: str) -> Callable[[Path], list[Path]]:
    """Finds the files whose names fit a pattern, all parts of each set of parts among them."""

    def find(path: Path) -> list[Path]:
        files = find_files(path, lambda file: any(fnmatch(file.name, p) for p in patterns), " or ".join(patterns))
        names = [(file.parent, re.fullmatch(r"(.*-)\d{5}-of-(\d{5}).*", file.name)) for file in files if path.is_dir()]
        parts = Counter((parent, name[1], int(name[2])) for parent, name in names if name)
        for (parent, name, total), number in parts.items():
            if number < total:
                raise DataError(
                    f"{parent} holds {number} of the {total} parts of {name}*",
                    "fetch the others: without --from, the same command takes the download up again",
                )
        return files

    return find


def _parts_by_folder(file: Path) -> tuple[str, ...]:
    """stack-exchange-paired names the split in the folder; every file is called train."""
    return ("heldout",) if file.parent.name == "evaluation" else ("train",)


def _hub(name: str, *files: str, checksums: dict[str, str] | None = None) -> Source:
    return Source(f"https://huggingface.co/datasets/{name}", name, files, checksums or {})


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "hh-rlhf",
            "preferences between two answers of an assistant, on helpfulness and harmlessness (Bai et al. 2022)",
            _hub("Anthropic/hh-rlhf", "harmless-base/*.jsonl.gz", "helpful-*/*.jsonl.gz"),
            "MIT",
            HHOptions,
            _hh_files,
            _write_hh,
        ),
        Kind(
            "stack-exchange",
            "data dumps: questions with two or more answers, scored by votes (Askell et al. 2021)",
            Source("https://archive.org/details/stackexchange"),
            "CC BY-SA 4.0, 3.0 or 2.5 by date of post: name the author and link the post",
            stack_exchange.StackExchangeOptions,
            stack_exchange.posts_files,
            stack_exchange.write,
        ),
        Kind(
            "stack-exchange-paired",
            "questions with a better and a worse answer, as StackLLaMA was trained on (Beeching et al. 2023)",
            _hub("lvwerra/stack-exchange-paired", "data/*/*.parquet"),
            "CC BY-SA 4.0, that of the posts: name the author and link the post",
            SetOptions,
            _named("*.parquet", "*.jsonl", "*.json"),
            partial(write_set, parsers.paired_answers, parts=_parts_by_folder),
        ),
        Kind(
            "ultrafeedback",
            "instructions with two of four answers scored by GPT-4, as Zephyr was trained on (Cui et al. 2023)",
            _hub("HuggingFaceH4/ultrafeedback_binarized", "data/*_prefs-*.parquet"),
            "MIT",
            PairOptions,
            _named("*_prefs-*.parquet", "*.jsonl", "*.json"),
            partial(write_set, parsers.pair),
        ),
        Kind(
            "alpaca-eval",
            "pairs of answers to 805 instructions, judged by GPT-4 (Li et al. 2023)",
            Source("https://github.com/tatsu-lab/alpaca_eval/tree/main/results"),
            "CC BY-NC 4.0",
            SetOptions,
            _named("*annotations.json"),
            partial(write_set, parsers.pair, parts=lambda file: ("train",)),
            research_only=True,
        ),
        Kind(
            "alpaca",
            "52,002 instructions with answers of text-davinci-003 (Taori et al. 2023)",
            _hub("tatsu-lab/alpaca", "data/*.parquet"),
            "CC BY-NC 4.0",
            SetOptions,
            _named("*alpaca_data*.json", "*.parquet"),
            partial(write_set, parsers.demonstration),
            research_only=True,
        ),
        Kind(
            "gsm8k",
            "grade-school mathematics problems with solutions that end in a number (Cobbe et al. 2021)",
            _hub("openai/gsm8k", "main/*.parquet", checksums={
                "train.jsonl": "sha256:17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test.jsonl": "sha256:3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            }),
            "MIT",
            MathOptions,
            _named("train.jsonl", "test.jsonl", "train-*.parquet", "test-*.parquet"),
            partial(write_set, parsers.mathematics),
        ),
        Kind(
            "imdb",
            "film reviews and whether they are favourable (Maas et al. 2011)",
            _hub("stanfordnlp/imdb", "plain_text/*.parquet", checksums={
                "aclImdb_v1.tar.gz": "md5:7c2ac02c03563afcf9b574c7e56c153a",
            }),
            "none stated: for research, with citation; the reviews belong to their authors",
            ReviewOptions,
            _named("aclImdb*.tar.gz", "*.parquet"),
            partial(write_set, parsers.review),
            research_only=True,
        ),
        Kind(
            "rt-polarity",
            "sentences of film reviews and whether they are favourable (Pang and Lee 2005)",
            _hub("cornell-movie-review-data/rotten_tomatoes", "*.parquet"),
            "CC BY 4.0, as its authors state",
            ReviewOptions,
            _named("rt-polarity.pos", "rt-polarity.neg", "*.parquet"),
            partial(write_set, parsers.review),
        ),
        Kind(
            "text",
            "plain text of your own to pretrain on: .txt of any encoding, or the field text of .jsonl",
            Source(""),
            "yours to know",
            TextOptions,
            text_files,
            _write_text,
        ),
        Kind(
            "random-walks",
            "walks on a small graph that should reach a goal: trlX's test of algorithms, made here",
            Source("https://github.com/CarperAI/trlx/tree/main/examples/randomwalks"),
            "none needed: numbers drawn by a program",
            WalkOptions,
            None,
            write_walks,
        ),
        Kind(
            "arithmetic",
            "sums with answers that end in a number, as GSM8K's do, some of them worked step by step, made here",
            Source(""),
            "none needed: numbers drawn by a program",
            ArithmeticOptions,
            None,
            write_problems,
        ),
    )
}  # fmt: skip
"""By name, in the order they are shown."""
