"""Says what a run was made of: the hashes of what it read, versions, hardware, counts. Knows the run directory."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fairlead.algorithms.stage import Stage
from fairlead.assemble import Given
from fairlead.config import Recipe
from fairlead.errors import RunError
from fairlead.models.load import resolve_folder
from fairlead.rollout.rewards import model_paths
from fairlead.tracking import RunDirectory, file_sha256, tree_sha256
from fairlead.training.budget import TokenBudget
from fairlead.types import Algorithm, Progress

FORMAT_VERSION = 1


def fingerprints(recipe: Recipe, given: Given) -> dict[str, dict[str, str]]:
    """Hashes of everything the run reads, by setting."""
    found: dict[str, dict[str, str]] = {}
    reward = getattr(recipe.settings, "reward", None)
    places = {
        "data.path": recipe.data.path if given.data is None else None,
        "data.eval_path": recipe.data.eval_path if given.eval_data is None else None,
        "model.path": recipe.model.path,
        "model.tokenizer": recipe.model.tokenizer,
        "reward": reward if isinstance(reward, str) else model_paths(reward),
        "teacher": getattr(recipe.settings, "teacher", None),
    }
    for key, place in places.items():
        for name in (place,) if isinstance(place, str) else place or ():
            path = Path(name)
            if key in ("model.path", "reward", "teacher") and path.is_dir():
                path = resolve_folder(name) or path
            if path.exists():
                found[key if isinstance(place, str) else f"{key}: {name}"] = {
                    "path": name,
                    "sha256": tree_sha256(path) if path.is_dir() else file_sha256(path),
                }
    if given.model is not None:
        digest = hashlib.sha256()
        for name, tensor in given.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found["model"] = {"path": "given in Python", "sha256": digest.hexdigest()}
    return found


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_manifest(
    directory: RunDirectory, stage: Stage, algorithm: Algorithm[Any], inputs: dict[str, Any], notes: Sequence[str]
) -> None:
    created, forked = now(), {}
    if directory.manifest.is_file():
        before = directory.read_json("manifest.json")
        created, forked = before["created"], {name: before[name] for name in ("parent",) if name in before}
        changed = [name for name in inputs if before["inputs"].get(name) != inputs[name]]
        if changed:
            raise RunError(
                f"{directory.path} was begun with another content of {', '.join(changed)}",
                hint="bring the old content back, or start again under another run.name",
            )
    directory.write_json(
        "manifest.json",
        {
            "format_version": FORMAT_VERSION,
            "algorithm": algorithm.name,
            "name": directory.path.name,
            "created": created,
            **forked,
            "seed": stage.recipe.seed,
            "versions": versions(),
            "hardware": {
                "device": str(stage.models.device),
                "processor": _processor(stage.models.device),
                "threads": torch.get_num_threads(),
            },
            "inputs": inputs,
            "data": stage.counts,
            "parameters": stage.models.parameter_counts(),
            "micro_batch_tokens": stage.budget.tokens,
            "notes": list(notes),
        },
    )


def keep_threads(directory: RunDirectory, say: Callable[[str], None]) -> None:
    """An unfinished run goes on with the CPU threads it began with: at another number its last bits differ."""
    if not directory.manifest.is_file():
        return
    threads, here = directory.read_json("manifest.json")["hardware"]["threads"], torch.get_num_threads()
    if threads != here:
        torch.set_num_threads(threads)
        say(f"{directory.path} was begun with {threads} CPU threads and goes on with as many; this process had {here}")


class BudgetNote:
    """An observer that writes into the manifest that memory ran out."""

    def __init__(self, directory: RunDirectory, budget: TokenBudget) -> None:
        self._directory, self._budget, self._known = directory, budget, len(budget.halved)

    def after_step(self, progress: Progress) -> None:
        if len(self._budget.halved) == self._known:
            return
        self._known = len(self._budget.halved)
        manifest = self._directory.read_json("manifest.json")
        note = f"memory ran out in step {progress.step}: forward passes of {self._budget.tokens} tokens from there on"
        self._directory.write_json("manifest.json", {**manifest, "notes": [*manifest["notes"], note]})

    def close(self) -> None: ...


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fairlead", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
