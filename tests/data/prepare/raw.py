"""Small raw data, and what a prepared folder holds."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from fairlead.data.records import load_records
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Text


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of an output; none where it was left out."""
    if (file := folder / f"{name}.parquet").exists():
        return parquet.read_table(file).to_pylist()
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]] if file.exists() else []


def outputs(folder: Path) -> dict[str, int]:
    """Outputs and their numbers of rows, counted here."""
    files = sorted({*folder.glob("*.jsonl"), *folder.glob("*.parquet")})
    return {file.stem: len(rows(folder, file.stem)) for file in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def every_row_loads(folder: Path) -> bool:
    """Each output is read back as what it is, and no row is lost."""
    kinds = {"pretrain": Text, "sft": Demonstration, "preference": Preference, "labelled": Labelled, "prompts": Prompt}
    for name, number in outputs(folder).items():
        kind = kinds[name.removeprefix("heldout_")]
        records, _ = load_records(str(folder), kind, heldout=name.startswith("heldout_"))
        assert len(records) == number, name
        assert all(type(record) is kind for record in records)
    return True


def data_folder(name: str) -> Path:
    folder = Path(os.environ.get("FAIRLEAD_DATA", "")) / name
    if not os.environ.get("FAIRLEAD_DATA") or not folder.exists():
        pytest.skip(f"FAIRLEAD_DATA names no folder with {name}")
    return folder


def hh_file(path: Path, *pairs: tuple[str, str, str]) -> Path:
    lines = [{"chosen": f"{p} {chosen}", "rejected": f"{p} {rejected}"} for p, chosen, rejected in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def question(*turns: str) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)) + "\n\nAssistant:"


def many_hh(path: Path) -> Path:
    """A hundred conversations, each cut into two prompts, each prompt with two pairs."""
    prompts = [
        question(*turns)
        for number in range(100)
        for turns in ((f"q{number}",), (f"q{number}", "yes?", f"more {number}"))
    ]
    return hh_file(path, *((p, f"good {i}", f"bad {i}") for p in prompts for i in range(2)))
