"""Finished rollouts on disk: immutable, hashed, read back instead of sampled again.

rollouts/round-000003/chunk-000.json ...   while sampling; removed once the round is whole
rollouts/round-000003.safetensors          tensors of the round
rollouts/round-000003.jsonl                prompt, response, score: for people
rollouts/round-000003.json                 checksums; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fairlead.errors import CheckpointError
from fairlead.types import Prompt, Rollout


class RolloutStore:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def chunk(
        self, round_number: int, number: int, prompts: Sequence[Prompt], sample: Callable[[], list[Rollout]]
    ) -> list[Rollout]:
        """The rollouts of one chunk of prompts: read back when they were sampled before, else sampled and saved."""
        path = self._path(round_number, "") / f"chunk-{number:03d}.json"
        if path.is_file():
            rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
            return [Rollout(prompt, **_frozen(row)) for prompt, row in zip(prompts, rows, strict=True)]
        rollouts = sample()
        rows = [{k: v for k, v in asdict(rollout).items() if k != "prompt"} for rollout in rollouts]
        _write(path, json.dumps(rows).encode())
        return rollouts

    def has(self, round_number: int) -> bool:
        return self._path(round_number, ".json").is_file()

    def save(self, round_number: int, tensors: dict[str, Tensor], rows: Sequence[dict[str, Any]]) -> str:
        """Make the round final; returns its hash."""
        blobs = {
            ".safetensors": save({name: tensor.contiguous() for name, tensor in tensors.items()}),
            ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(
                "utf-8", "surrogatepass"
            ),
        }
        digests = {suffix: hashlib.sha256(blob).hexdigest() for suffix, blob in blobs.items()}
        for suffix, blob in blobs.items():
            _write(self._path(round_number, suffix), blob)
        _write(self._path(round_number, ".json"), (json.dumps(digests, indent=1) + "\n").encode())
        shutil.rmtree(self._path(round_number, ""), ignore_errors=True)
        return digests[".safetensors"]

    def load(self, round_number: int) -> tuple[dict[str, Tensor], str]:
        """Tensors of a finished round and their hash. Raises CheckpointError when a file was changed."""
        digests = json.loads(self._path(round_number, ".json").read_text("utf-8"))
        for suffix, digest in digests.items():
            path = self._path(round_number, suffix)
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise CheckpointError(f"{path} was changed after it was written", hint="remove the run and start again")
        return load_file(self._path(round_number, ".safetensors")), digests[".safetensors"]

    def _path(self, round_number: int, suffix: str) -> Path:
        return self._folder / f"round-{round_number:06d}{suffix}"


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
