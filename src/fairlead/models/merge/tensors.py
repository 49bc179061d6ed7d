"""The tensors of a folder of weights, read one at a time from safetensors or .bin, in one file or many; and written the
same way. Knows nothing of models: names, shapes and numbers."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.errors import ModelError

STEMS = ("model", "pytorch_model")
"""How transformers names files of weights; `adapter_model` is peft's."""


class Tensors:
    """What the files of weights of ``folder`` hold. A safetensors file is opened for each tensor and closed again, so
    that no page of it stays in memory. Raises ModelError where there are none, or where a shard is missing."""

    def __init__(self, folder: Path, stems: tuple[str, ...] = STEMS) -> None:
        self.folder = folder
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _files(folder, stems):
            shapes = self._shapes(path)
            self.shapes |= shapes
            self._file_of |= dict.fromkeys(shapes, path)

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU."""
        path = self._file_of[name]
        if path.suffix == ".bin":
            return self._load(path)[name]
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def _shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        if path.suffix == ".bin":
            return {name: tuple(tensor.shape) for name, tensor in self._load(path).items()}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                names: list[str] = list(file.keys())
                return {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}", hint="fetch or save it again") from error

    def _load(self, path: Path) -> dict[str, Tensor]:
        """The pages of a .bin file of today's form are mapped, and read when a tensor is."""
        if path not in self._pickled:
            try:
                found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except Exception as error:  # torch names no class for a damaged file
                raise ModelError(f"{path} cannot be read: {error}", hint="fetch or save it again") from error
            self._pickled = {path: found}
        return self._pickled[path]


def _files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """safetensors before .bin, as transformers chooses."""
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            index, whole = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
            if index.is_file():
                paths = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
                if missing := [path.name for path in paths if not path.is_file()]:
                    raise ModelError(f"{folder} lacks {', '.join(missing)}, which its index names")
                return paths
            if whole.is_file():
                return [whole]
    raise ModelError(f"{folder} holds no weights", hint=f"expected {stems[0]}.safetensors, whole or in shards")


def write(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    *,
    names: Mapping[str, str],
    shard_size: int,
    dtype: torch.dtype,
) -> None:
    """Make and write the tensors in order, in files of at most ``shard_size`` bytes, or of one tensor that is larger.

    Args:
        sizes: bytes of each tensor.
        make: the tensor of a name; no more than a file's worth is kept.
        names: under which to write those that are called otherwise in the file.
        dtype: floating tensors are written in it, others as they are.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_size:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {names.get(name, name): _plain(make(name), dtype) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
