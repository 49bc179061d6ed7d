"""Tensors on disk, whole or in the shards of several ranks: safetensors, each with the rows it holds in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fairlead.types import Ranks


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if _is_sharded(tensor) else tensor  # pyright: ignore


def own_rows(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """First, and last + 1, of the rows that this rank has of a tensor: those of its part by `torch.chunk`."""
    rows = tensor.shape[0] if tensor.ndim else 1
    size = -(-rows // ranks.size) if _is_sharded(tensor) else rows
    first = ranks.rank * size if _is_sharded(tensor) else 0
    return min(rows, first), min(rows, first + size)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, whose import takes a while


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> Path | None:
    """Write what this rank has to write: its shards, and as the leader what is not sharded. Returns the file, if there
    is something in it. A file name says of how many ranks it is, where there are several."""
    path = folder / (
        f"{stem}.safetensors" if ranks.size == 1 else f"{stem}-{ranks.rank + 1}-of-{ranks.size}.safetensors"
    )
    held: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, int, int]] = {}
    for name, tensor in tensors.items():
        if _is_sharded(tensor):
            first, last = own_rows(tensor, ranks)
            if first < last:
                held[name], rows[name] = local(tensor).detach().contiguous(), (first, last, tensor.shape[0])
        elif ranks.is_leader:
            held[name] = tensor.detach().contiguous()
    if not held and ranks.size > 1:
        return None
    save_file(held, path, {"rows": json.dumps(rows)} if rows else None)
    return path


class Stored:
    """The tensors of one ``stem`` in a folder, however many ranks have written them."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        self._totals: dict[str, int] = {}
        for path in sorted((*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors"))):
            file: Any = safe_open(path, framework="pt")
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                first, last, total = rows.get(name, (0, shape[0] if shape else 1, shape[0] if shape else 1))
                self._pieces.setdefault(name, []).append((first, last, file))
                self._totals[name] = total

    @property
    def names(self) -> set[str]:
        return set(self._pieces)

    def read(self, name: str, like: Tensor, ranks: Ranks) -> Tensor:
        """The rows of a tensor that this rank has of one that is sharded ``like`` another of as many rows; else all."""
        first, last = own_rows(like, ranks) if self._totals[name] == len(like if like.ndim else [0]) else (0, None)
        return self.rows(name, first, last)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        last = self._totals[name] if last is None else last
        found: list[Tensor] = []
        for start, stop, file in sorted(self._pieces[name], key=lambda piece: piece[0]):
            piece = file.get_slice(name)
            if not piece.get_shape():
                return file.get_tensor(name)
            from_row, to_row = max(first, start), min(last, stop)
            found.append(piece[from_row - start : max(from_row, to_row) - start])
        filled = [piece for piece in found if len(piece)] or found[:1]  # there may be more ranks than rows
        return filled[0] if len(filled) == 1 else torch.cat(filled)
