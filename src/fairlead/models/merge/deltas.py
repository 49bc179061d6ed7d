"""What an adapter, as peft saves it, makes of the tensors of its base: one tensor at a time, in fp32. Knows LoRA, its
rank-stabilised form, DoRA and modules trained in full; loads no model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.errors import ModelError
from fairlead.models.merge.tensors import Tensors

PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
_OTHER = re.compile(r"lora_|token_adapter|hada_|lokr_|ia3_|oft_|vera_")
_REFUSED = ("layer_replication", "alora_invocation_tokens", "target_parameters", "trainable_token_indices",
            "megatron_config", "arrow_config")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Delta:
    """An adapter folder; its tensors are read when they are asked for."""

    folder: Path
    settings: Mapping[str, Any]
    """adapter_config.json"""
    modules: Mapping[str, Mapping[str, str]]
    """Name of an adapted module -> lora_A, lora_B, magnitude -> key of the file."""
    replaced: Mapping[str, str]
    """Name of a tensor of the base -> key of what takes its place: embeddings that had grown."""
    trained: Mapping[str, str]
    """Likewise of modules trained in full; a tensor tied to one of them is not changed with it."""
    tensors: Tensors

    @classmethod
    def read(cls, folder: Path) -> Delta:
        """Raises ModelError for an adapter that is not of a known kind, or is torn."""
        settings = read_settings(folder)
        kind = settings.get("peft_type")
        refused = [name for name in _REFUSED if settings.get(name)]
        if kind != "LORA" or refused:
            what = f"of the kind {kind}" if kind != "LORA" else f"with {', '.join(refused)}"
            raise ModelError(f"{folder} is an adapter {what}", hint="LoRA, rsLoRA and DoRA can be merged")
        tensors = Tensors(folder, ("adapter_model",))
        modules: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        trained: dict[str, str] = {}
        wholes = settings.get("modules_to_save") or ()
        for key in tensors.shapes:
            name = key.removeprefix(PREFIX)
            if match := _PARTS.fullmatch(name):
                part = match["part"].removesuffix(".weight").replace("embedding_", "")
                modules.setdefault(match["module"], {})[part] = key
            elif _OTHER.search(name):
                raise ModelError(f"{folder} holds {key}, which cannot be merged", hint="LoRA, rsLoRA and DoRA can be")
            elif any(f".{name}".rpartition(".")[0].endswith(f".{module}") for module in wholes):
                trained[name] = key
            else:
                replaced[name.replace(".base_layer.", ".")] = key
        for module, parts in modules.items():
            wanted = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if settings.get("use_dora") else [])}
            if missing := sorted(wanted - parts.keys()):
                raise ModelError(f"{folder} is torn: {module} lacks {', '.join(missing)}")
        return cls(folder, settings, modules, replaced, trained, tensors)

    @property
    def scores(self) -> bool:
        return self.settings.get("task_type") == "SEQ_CLS"

    @property
    def named(self) -> list[str]:
        """Every tensor of the base that the adapter speaks of."""
        return [*(f"{module}.weight" for module in self.modules), *self.replaced, *self.trained]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor that takes the place of the base's; none where the base's own is kept or added to."""
        key = self.trained.get(name) or self.replaced.get(name)
        return None if key is None else self.tensors.shapes[key]

    def apply(
        self, name: str, weight: Tensor | None, tied: str | None, *, transposed: bool, device: str
    ) -> Tensor | None:
        """``weight`` of the base as the adapter has it; none where neither holds such a tensor.

        With peft's own formulas: W + s B A, s = alpha / r or alpha / sqrt(r) (Hu et al. 2021; Kalajdzievski 2023);
        DoRA m (W + s B A) / ||W + s B A||, the norm over the inputs of each output (Liu et al. 2024, eq. 5).

        Args:
            tied: the other name of a tensor that the base has but once.
            transposed: the tensor lies as [in, out]: of GPT-2's Conv1D and of embeddings.
            device: where the products are computed. The result lies there, or where ``weight`` does if it is kept.
        """
        key = self.trained.get(name) or self.replaced.get(name) or (self.replaced.get(tied) if tied else None)
        if key is not None:
            weight = self.tensors.read(key)
        parts = self.modules.get(name.removesuffix(".weight"))
        if weight is None or parts is None or not name.endswith(".weight"):
            return weight
        first, second = (self.tensors.read(parts[part]).to(device, torch.float32) for part in ("lora_A", "lora_B"))
        inputs, outputs = (weight.shape if transposed else reversed(weight.shape)) if weight.dim() == 2 else (0, 0)
        if (first.shape[1], second.shape[0]) != (inputs, outputs):
            raise ModelError(
                f"{self.folder}: {name} takes {first.shape[1]} to {second.shape[0]}, that of the base {inputs} to "
                f"{outputs}: the adapter belongs to another base",
                hint="name the base it was trained on in adapter_config.json",
            )
        scaling = self._scaling(name.removesuffix(".weight"), first.shape[0])
        left, right = (first.T, second.T) if transposed else (second, first)
        total = weight.to(device, torch.float32, copy=True).addmm_(left, right, alpha=scaling)
        if "lora_magnitude_vector" in parts:
            magnitude = self.tensors.read(parts["lora_magnitude_vector"]).to(device, torch.float32)
            side = 0 if transposed else 1
            total *= (magnitude / total.norm(dim=side)).unsqueeze(side)
        return total

    def _scaling(self, module: str, rank: int) -> float:
        alphas: Mapping[str, float] = self.settings.get("alpha_pattern") or {}
        alpha = next((a for key, a in alphas.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = self.settings["lora_alpha"] if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises ModelError when it is damaged."""
    path = folder / "adapter_config.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
