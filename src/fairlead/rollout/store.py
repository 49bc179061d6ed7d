"""Finished rollouts on disk: immutable, hashed, read back instead of sampled again.

rounds/003/chunk-000.json ...              while sampling, each by the rank that samples it; removed once the round is
                                           whole
rounds/003/prompts.jsonl, samples.jsonl, scored.jsonl
                                           as `fairlead generate` and `fairlead score` write them
rounds/003/round.safetensors               tensors of the round
rounds/003/round.json                      checksums; written last
rounds/003/selected.jsonl                  the scored rows that are learned from, where some are chosen
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fairlead.errors import CheckpointError
from fairlead.types import Prompt, Ranks, Rollout, Sampler, Sampling

TENSORS, CHECKSUMS = "round.safetensors", "round.json"


class RolloutStore:
    """The leader of the ``ranks`` reads and writes; the others are told."""

    def __init__(self, folder: Path, ranks: Ranks | None = None) -> None:
        self._folder, self._ranks = folder, ranks or Ranks()

    def chunk(
        self, round_number: int, number: int, prompts: Sequence[Prompt], sample: Callable[[], list[Rollout]]
    ) -> list[Rollout]:
        """The rollouts of one chunk of prompts: read back when they were sampled before, else sampled and saved."""
        among = f"-of-{self._ranks.size}-ranks" if self._ranks.size > 1 else ""
        path = self._path(round_number, f"chunk-{number:03d}{among}.json")
        rows = _chunk_rows(path)
        if rows is not None:
            return [Rollout(prompt, **_frozen(row)) for prompt, row in zip(prompts, rows, strict=True)]
        rollouts = sample()
        rows = [{k: v for k, v in asdict(rollout).items() if k != "prompt"} for rollout in rollouts]
        _write(path, _sealed(json.dumps(rows).encode()))
        return rollouts

    def sample(
        self,
        sampler: Sampler,
        round_number: int,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling,
        num_samples: int,
        seed: int,
        rows: int,
        after_chunk: Callable[[int], None] = lambda _: None,
    ) -> list[Rollout]:
        """This rank's rollouts of a round, ``rows`` prompts a chunk, or fewer where there would be a rank without; what
        was sampled before is read back. ``after_chunk`` is told how many there are."""
        rollouts: list[Rollout] = []
        key = (seed, "rollout", round_number)
        rows, chunks = self._chunks(len(prompts), rows)
        for number in chunks:
            start = number * rows
            part = prompts[start : start + rows]

            def sample(part: Sequence[Prompt] = part, start: int = start) -> list[Rollout]:
                return sampler.generate(part, sampling=sampling, key=key, first_item=start, num_samples=num_samples)

            asked = [prompt for prompt in part for _ in range(num_samples)]
            rollouts += self.chunk(round_number, number, asked, sample)
            after_chunk(len(rollouts))
        return rollouts

    def first_prompt(self, count: int, rows: int) -> int:
        """Of ``count`` prompts the number of the first that this rank samples."""
        rows, chunks = self._chunks(count, rows)
        return chunks.start * rows

    def _chunks(self, count: int, rows: int) -> tuple[int, range]:
        """How many prompts are in a chunk, and this rank's chunks."""
        rows = max(1, min(rows, math.ceil(count / self._ranks.size)))
        return rows, self._ranks.part(math.ceil(count / rows))

    def has(self, round_number: int) -> bool:
        return self._ranks.from_leader(self._path(round_number, CHECKSUMS).is_file)

    def save(
        self, round_number: int, tensors: dict[str, Tensor], texts: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> str:
        """Make the round final, with ``texts`` as a file of rows for each name; returns its hash. For the leader."""
        blobs = {f"{name}.jsonl": _lines(rows) for name, rows in texts.items()}
        blobs[TENSORS] = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        digests = {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()}
        for name, blob in blobs.items():
            _write(self._path(round_number, name), blob)
        _write(self._path(round_number, CHECKSUMS), (json.dumps(digests, indent=1) + "\n").encode())
        self._drop_chunks(round_number)
        return digests[TENSORS]

    def _drop_chunks(self, round_number: int) -> None:
        for chunk in self._path(round_number, "").glob("chunk-*.json"):
            chunk.unlink()

    def load(self, round_number: int) -> tuple[dict[str, Tensor], str]:
        """Tensors of a finished round and their hash. Raises CheckpointError when a file was changed."""
        digest = self._ranks.from_leader(lambda: self._checked(round_number))
        load = partial(load_file, self._path(round_number, TENSORS))
        return self._ranks.tensors_from_leader(load), digest

    def _checked(self, round_number: int) -> str:
        try:
            digests: dict[str, str] = json.loads(self._path(round_number, CHECKSUMS).read_bytes())
        except ValueError:
            raise self._changed(round_number, CHECKSUMS) from None
        for name, digest in digests.items():
            path = self._path(round_number, name)
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise self._changed(round_number, name)
        if TENSORS not in digests:
            raise self._changed(round_number, CHECKSUMS)
        self._drop_chunks(round_number)  # a kill may have come between the checksums and this
        return digests[TENSORS]

    def _changed(self, round_number: int, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path(round_number, name)} was changed after it was written",
            hint="`fairlead resume RUN at=STEP` goes back to a checkpoint before this round, and makes it anew",
        )

    def select(self, round_number: int, keep: Sequence[bool]) -> None:
        """Put those of a finished round's scored rows that are kept into a file of their own."""
        if not self._ranks.is_leader:
            return
        rows = self._path(round_number, "scored.jsonl").read_bytes().splitlines(keepends=True)
        chosen = [row for row, is_kept in zip(rows, keep, strict=True) if is_kept]
        _write(self._path(round_number, "selected.jsonl"), b"".join(chosen))

    def _path(self, round_number: int, name: str) -> Path:
        return self._folder / f"{round_number:03d}" / name


def _sealed(blob: bytes) -> bytes:
    """A line with the checksum of what follows."""
    return hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob


def _chunk_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a chunk; none where it is not there, or damaged: then it is sampled again, to the same rows."""
    data = path.read_bytes() if path.is_file() else b""
    blob = data.partition(b"\n")[2]
    return json.loads(blob) if data and data == _sealed(blob) else None


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


def _frozen(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _write(path: Path, blob: bytes) -> None:
    temporary = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"{path} could not be written: {error}", hint="make room and run the same command again: it continues"
        ) from error
