"""Rewards by text: trained ones, classifiers, functions, rules, scorers behind HTTP, and weighted lists of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairlead.rollout.rewards.classify import LabelReward as LabelReward
    from fairlead.rollout.rewards.functions import TextReward as TextReward
    from fairlead.rollout.rewards.models import ClassifierReward as ClassifierReward
    from fairlead.rollout.rewards.models import EnsembleReward as EnsembleReward
    from fairlead.rollout.rewards.models import ModelReward as ModelReward
    from fairlead.rollout.rewards.models import RoleReward as RoleReward
    from fairlead.rollout.rewards.models import classifier_dtype as classifier_dtype
    from fairlead.rollout.rewards.models import open_model as open_model
    from fairlead.rollout.rewards.opening import WeightedReward as WeightedReward
    from fairlead.rollout.rewards.opening import open_reward as open_reward
    from fairlead.rollout.rewards.returned import is_constant as is_constant
    from fairlead.rollout.rewards.settings import ModelSource as ModelSource
    from fairlead.rollout.rewards.settings import RewardSource as RewardSource
    from fairlead.rollout.rewards.settings import model_paths as model_paths
    from fairlead.rollout.rewards.settings import sources as sources
    from fairlead.rollout.rewards.shared import shared_reward as shared_reward

_HOMES = {
    "ClassifierReward": "models",
    "EnsembleReward": "models",
    "LabelReward": "classify",
    "ModelReward": "models",
    "ModelSource": "settings",
    "RewardSource": "settings",
    "RoleReward": "models",
    "TextReward": "functions",
    "WeightedReward": "opening",
    "classifier_dtype": "models",
    "is_constant": "returned",
    "model_paths": "settings",
    "open_model": "models",
    "open_reward": "opening",
    "shared_reward": "shared",
    "sources": "settings",
}


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that the settings need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
