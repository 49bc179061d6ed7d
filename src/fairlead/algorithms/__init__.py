"""One file an algorithm. This table is the only place that lists them; an algorithm of a user's own is
``module:ATTRIBUTE`` and needs no entry."""

from __future__ import annotations

import importlib
from typing import Any

from fairlead.config_file import suggest
from fairlead.errors import ConfigError
from fairlead.types import Algorithm

REGISTRY = {
    "bco": "fairlead.algorithms.bco:ALGORITHM",
    "cpo": "fairlead.algorithms.cpo:ALGORITHM",
    "dpo": "fairlead.algorithms.dpo:ALGORITHM",
    "grpo": "fairlead.algorithms.grpo:ALGORITHM",
    "kto": "fairlead.algorithms.kto:ALGORITHM",
    "online_dpo": "fairlead.algorithms.online_dpo:ALGORITHM",
    "orpo": "fairlead.algorithms.orpo:ALGORITHM",
    "ppo": "fairlead.algorithms.ppo:ALGORITHM",
    "pretrain": "fairlead.algorithms.pretrain:ALGORITHM",
    "raft": "fairlead.algorithms.raft:ALGORITHM",
    "reinforce": "fairlead.algorithms.reinforce:ALGORITHM",
    "reward": "fairlead.algorithms.reward:ALGORITHM",
    "rft": "fairlead.algorithms.rft:ALGORITHM",
    "rloo": "fairlead.algorithms.rloo:ALGORITHM",
    "sft": "fairlead.algorithms.sft:ALGORITHM",
    "simpo": "fairlead.algorithms.simpo:ALGORITHM",
}


def find(name: str) -> Algorithm[Any]:
    """The algorithm of a registry name or of ``module:ATTRIBUTE``. Raises ConfigError with the nearest name."""
    target = REGISTRY.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigError(
            f"no algorithm {name!r}; {suggest(name, REGISTRY)}", hint="or give module:ATTRIBUTE of your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm={name!r} cannot be imported: {error}") from error
    if not isinstance(found, Algorithm):
        raise ConfigError(f"{target} is a {type(found).__name__}, not a fairlead.types.Algorithm")
    return found  # pyright: ignore[reportUnknownVariableType]
