"""What there is to check and to measure, and in which order. Imports nothing but this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CHECKS = {
    "masks": "check_attention:masks",
    "forest": "check_attention:forest",
    "compiling": "check_attention:compiling",
    "head": "check_numbers:head",
    "kernels": "check_numbers:kernels",
    "memory savers": "check_numbers:memory_savers",
    "roles": "check_models:roles",
    "sampler": "check_models:sampler",
    "keyed sampling": "check_models:keyed_sampling",
    "precision": "check_runs:precision",
    "quantised": "check_runs:quantised",
    "stages": "check_runs:stages",
}
"""Name -> file and function."""
STAGES = ("checks", "sft", "dpo", "ppo", "decode", "reward", "head", "pretrain", "score")
"""In the order they run: should time run out, the last are missing."""
MODES = {
    "sft": ("full", "lora"),
    "dpo": ("full", "lora"),
    "ppo": ("lora",),
    "reward": ("full", "lora"),
    "pretrain": ("full", "lora"),
}
"""Those of a stage; of reward and pretrain the first that is wanted is measured alone."""
BESIDE = ("sft", "dpo", "decode", "reward", "head", "pretrain")
"""Stages that a peer has too: TRL has no PPO since 1.13, and its scoring is a part of its trainers."""
SIZES = ("tiny", "0.5B", "1B", "8B")


def planned(only: Sequence[str], size: str, modes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Stages and modes. All weights of 8B are not trained: with 16 bytes each they would need 128 GB."""
    for stage in STAGES:
        if stage not in only:
            continue
        able = [mode for mode in MODES.get(stage, ("",)) if mode in ("", "lora") or size != "8B"]
        able = [mode for mode in able if not mode or mode in modes]
        for mode in able[:1] if stage in ("reward", "pretrain") else able:
            yield stage, mode
