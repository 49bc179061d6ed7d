"""Which trained reward of a recipe can be a role on the policy's base, and why the others are models of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairlead.config import ModelSection
from fairlead.errors import ConfigError
from fairlead.models.adapters import StartAdapter
from fairlead.models.identity import weights_sha256
from fairlead.models.load import base_of, base_origin, resolve_folder
from fairlead.rollout.rewards.settings import model_paths


def shared_reward(source: Any, section: ModelSection) -> tuple[StartAdapter | None, str]:
    """The adapter of the first reward run that stands on the base of the policy's adapters; or none, and why the first
    of them is a model of its own. Raises ConfigError where `model.roles` says shared and none can be."""
    reasons: list[str] = []
    for path in (paths := model_paths(source)):
        found = _on_base(path, section)
        if isinstance(found, StartAdapter):
            return found, ""
        reasons.append(found)
    if reasons and section.roles == "shared":
        raise ConfigError(
            f"model.roles=shared, but the reward {paths[0]} cannot stand on the policy's base: {reasons[0]}",
            hint="model.roles=auto",
        )
    return None, reasons[0] if reasons else ""


def _on_base(path: str, section: ModelSection) -> StartAdapter | str:
    """Its adapter, or why it is a model of its own."""
    folder = resolve_folder(path)
    if folder is None or not (folder / "adapter_config.json").is_file():
        return "it is a whole model, not an adapter"
    if section.roles == "separate":
        return "model.roles=separate"
    if section.adapter is None or section.path is None:
        return "the policy trains no adapter on a base that is saved"
    ours, theirs = base_origin(section.path), base_of(folder)
    if Path(ours).resolve() == Path(theirs).resolve() or (weights_sha256(ours) or ours) == weights_sha256(theirs):
        return StartAdapter.read(folder)
    return f"its base is {theirs}, the policy's is {ours}"
