"""Writes the row files of a prepared folder side by side, each as a stream. Knows neither kinds nor splits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from fairlead.data.sources import Counts, atomic_write
from fairlead.data.text import read_documents
from fairlead.errors import DataError


class Outputs:
    """``add`` appends a row to ``NAME.jsonl``; of equal rows of a file the first stays, and ``merged`` counts."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.merged: Counter[str] = Counter()
        self._folder, self._stack = folder, stack
        self._files: dict[str, IO[bytes]] = {}
        self._seen: defaultdict[str, set[bytes]] = defaultdict(set)

    def add(self, name: str, row: Mapping[str, Any]) -> bool:
        """Whether the row was new to its file."""
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"a row of {name} cannot be written as JSON: {error}") from error
        return self.add_line(name, line)

    def add_line(self, name: str, line: bytes) -> bool:
        identity = hashlib.blake2b(line, digest_size=16).digest()
        if identity in self._seen[name]:
            self.merged[name] += 1
            return False
        self._seen[name].add(identity)
        if name not in self._files:
            self._files[name] = self._stack.enter_context(atomic_write(self._folder / f"{name}.jsonl"))
        self._files[name].write(line)
        return True


@contextmanager
def writing(folder: Path) -> Iterator[Outputs]:
    """Outputs into ``folder``, which is emptied before, and after an error."""
    _empty(folder)
    try:
        with ExitStack() as stack:
            yield Outputs(folder, stack)
    except BaseException:
        _empty(folder)
        raise


def join_text(work: Path, done: Path, texts: Sequence[Path]) -> dict[str, Any]:
    """Writes the pretraining text of ``work``, and after it the documents of ``texts``, into ``done``."""
    counts = Counts()
    documents = read_documents(texts, counts)
    if (own := work / "pretrain.parquet").exists():
        _join_parquet(own, done / own.name, documents)
        return counts.as_dict()
    with writing(done) as outputs:
        if (own := work / "pretrain.jsonl").exists():
            with own.open("rb") as lines:
                for line in lines:
                    outputs.add_line("pretrain", line)
        for document in documents:
            outputs.add("pretrain", document)
    return counts.as_dict() | {"equal_rows_merged": outputs.merged["pretrain"]}


def _join_parquet(own: Path, joined: Path, documents: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(own) as file, atomic_write(joined) as sink:
        schema = file.schema_arrow
        with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
            for batch in file.iter_batches():
                writer.write_batch(batch)
            for rows in batched(documents, 10_000):
                writer.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
