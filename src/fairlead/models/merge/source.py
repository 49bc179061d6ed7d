"""What is to be merged: follows an adapter to its base, over other adapters where there are some, and finds how the run
had loaded it. Reads names and settings; no tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fairlead.config import QuantizeSection
from fairlead.errors import ModelError
from fairlead.models.identity import weights_folder, weights_sha256
from fairlead.models.load import read_meta, resolve_folder
from fairlead.models.merge.deltas import Delta
from fairlead.models.merge.verify import Quantisation

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What is fetched of a model on the hub; .bin files only where there are no safetensors."""


@dataclass(frozen=True, slots=True)
class Source:
    """A base and the adapters over it, the nearest to it first; a whole model has none."""

    folder: Path
    """Of the last adapter, or of the whole model."""
    base: Path
    base_name: str
    """As the adapters name it."""
    deltas: tuple[Delta, ...]
    run: Path | None
    """The run directory that ``folder`` is in, if it is in one."""
    quantised: Quantisation | None
    """Where the adapters were trained on a quantised base, or it is stored so."""
    scores: bool
    """A sequence classifier with a score head, not a causal language model."""

    @classmethod
    def find(cls, run: str) -> Source:
        """Raises ModelError where a link of the chain is missing, or is not what the adapter was trained on."""
        folder = here = _folder(run, None)
        name, chain = run, list[Delta]()
        while (here / "adapter_config.json").is_file():
            delta = Delta.read(here)
            chain.insert(0, delta)
            name = delta.settings.get("base_model_name_or_path")
            if not name:
                raise ModelError(f"{here} is an adapter that does not name its base", "name it in adapter_config.json")
            below = _folder(name, here)
            recorded = (read_meta(here).get("base") or {}).get("sha256")
            if recorded is not None and recorded != weights_sha256(below):
                raise ModelError(
                    f"{here} was trained on other weights than {name} holds now",
                    hint="bring the base back that it was trained on",
                )
            if below in [delta.folder for delta in chain]:
                raise ModelError(f"{below} is an adapter over itself", "name its base in adapter_config.json")
            here = below
        config = json.loads((here / "config.json").read_text("utf-8"))
        architecture = (config.get("architectures") or [""])[0]
        scores = chain[-1].scores if chain else architecture.endswith("ForSequenceClassification")
        around = folder.parent if folder.name == "model" and (folder.parent / "recipe.yaml").is_file() else None
        quantised = _stored(name, config) or (_quantisation(folder, around) if chain else None)
        return cls(folder, here, name, tuple(chain), around, quantised, scores)


def _folder(name: str, adapter: Path | None) -> Path:
    """The folder of a path, a run or a hub id; ``adapter`` is the one that names it as its base."""
    try:
        return resolve_folder(name) or _fetched(name)
    except ModelError as error:
        if adapter is None:
            raise
        raise ModelError(
            f"the base of {adapter} is not there: {error.message}",
            hint="merge where that path leads to it, or write another into adapter_config.json",
        ) from error


def _fetched(name: str) -> Path:
    """Where the hub's cache keeps a model, fetched if need be."""
    from huggingface_hub import snapshot_download

    if weights_sha256(name) is not None and (folder := weights_folder(name)) is not None:
        return folder
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin"])
    except Exception as error:  # the hub's client lets through those of two HTTP libraries
        raise ModelError(
            f"{name} cannot be fetched: {str(error).splitlines()[0]}",
            hint=f"there is no folder {name} here, so it was taken for a hub id: check the path, and the network",
        ) from error
    return folder


def _stored(name: str, config: Mapping[str, Any]) -> Quantisation | None:
    """Of a base whose files are quantised."""
    found = config.get("quantization_config")
    if found is not None and found.get("quant_method") != "bitsandbytes":
        raise ModelError(f"{name} is stored quantised, by {found.get('quant_method')}", "bitsandbytes alone is known")
    return None if found is None else Quantisation(found, None, torch.float32)


def _quantisation(folder: Path, run: Path | None) -> Quantisation | None:
    """How a run had the base of its adapter quantised, as the adapter's own folder or its recipe says; none where it
    did not."""
    recipe: dict[str, Any] = {}
    if run is not None:
        recipe = (yaml.safe_load((run / "recipe.yaml").read_text("utf-8")) or {}).get("model") or {}
    settings = (read_meta(folder).get("base") or {}).get("quantize") or recipe.get("quantize")
    if not settings:
        return None
    dtype = recipe.get("dtype", "auto")
    if dtype == "auto":  # bf16 on devices that are fast at it, as the CUDA devices of today are
        manifest = folder.parent / "manifest.json"
        hardware = json.loads(manifest.read_text("utf-8"))["hardware"] if manifest.is_file() else {}
        dtype = "bfloat16" if str(hardware.get("device", "")).startswith("cuda") else "float32"
    section = QuantizeSection.model_validate(settings)
    return Quantisation(section.model_dump(mode="json"), section, getattr(torch, dtype))
