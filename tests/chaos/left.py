"""What a run leaves behind, as bytes to compare: every file, without what tells wall-clock time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def left_behind(run: Path) -> dict[str, bytes]:
    """File of a run directory -> its bytes; of JSON files without fields that tell time."""
    return {
        str(path.relative_to(run)): _timeless(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def differing(ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> list[str]:
    """Files that are not on both sides, or not the same on both."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _timeless(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        return json.dumps([_without_time(json.loads(line)) for line in data.splitlines()]).encode()
    if path.name in ("summary.json", "state.json"):
        return json.dumps(_without_time(json.loads(data))).encode()
    if path.name != "manifest.json":
        return data
    manifest = json.loads(data)
    if path.parent.parent.name == "checkpoints":  # holds the digest of a file that tells time
        manifest["files"].pop("state.json")
        manifest.pop("sha256", None)
    return json.dumps({name: value for name, value in manifest.items() if name != "created"}).encode()


def _without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_time(each)
            for name, each in value.items()
            if name != "seconds" and not name.startswith("performance/")
        }
    return value
