"""Which weights these are: the hash of what a folder or hub id holds on disk, not of what is made of it in memory."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model*.safetensors", "pytorch_model*.bin")
"""Names of files of weights; the first that is there counts."""


def weights_folder(origin: str | Path) -> Path | None:
    """The folder itself, or where the hub's cache keeps what an id names; none for what is not on this machine."""
    if Path(origin).is_dir():
        return Path(origin)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(origin), "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def weights_sha256(origin: str | Path) -> str | None:
    """Of one file its SHA-256; of several that of the lines `sha256sum` prints for them. None where there are none."""
    folder = weights_folder(origin)
    files = next((found for pattern in WEIGHTS if folder and (found := sorted(folder.glob(pattern)))), [])
    lines = [f"{_digest(path, *_state(path))}  {path.name}\n" for path in files]
    if len(lines) < 2:
        return lines[0].split()[0] if lines else None
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@functools.cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Cached for as long as ``size`` and time stay: several roles ask after the same base."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
