"""RLOO and GRPO on HH's prompts beside TRL's trainers: responses a second, by phase, and peak memory.

    make bench-rloo
    make bench-rloo ARGS="--steps 2 --repeats 1 --seeds 1"

Rounds of 4 prompts with 8 responses of 48 tokens each, scored by a function of the text and learned in one step. The KL
to a reference is in the reward of RLOO and in the loss of GRPO.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import rounds
import side_by_side as bench
from rounds import Asked, Way

SAMPLES = 8
"""Responses to a prompt."""
OURS: dict[str, dict[str, Any]] = {"rloo": {"loss_over": "constant"}, "grpo": {}}
"""TRL's RLOO sums over the tokens of a response what ours divides by their number."""
PEER: dict[str, dict[str, Any]] = {
    "rloo": {},
    "grpo": {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": True},
}
WAYS: dict[str, tuple[int, str | None]] = {
    "32 responses at once": (32, None),
    "8 responses at once": (8, None),
    "32 responses at once, static cache": (32, "static"),
}
"""Settings of TRL: responses in one pass of an update, and the cache it samples with, which is the same for GRPO."""
TRIED = {"rloo": tuple(WAYS), "grpo": tuple(WAYS)[:2]}
REMARK = (
    "Random Llamas in fp32, AdamW at a constant rate; the same prompts of HH in the same order, the same function of "
    "the text as a reward. Every response has as many tokens as the limit allows: neither side can draw the end of "
    "sequence. Ours is the stage with all that it writes; TRL writes neither rollouts nor checkpoints. peer_name says "
    "how many responses go through TRL's model at once in an update. Scoring is all between sampling and the update. "
) + rounds.REMARK


def way(algorithm: str, asked: Asked, name: str, warmup: int) -> Way:
    at_once, cache = WAYS[name]
    new, clipped = rounds.NEW[asked.size], 1.0
    peer = asked.job(
        algorithm,
        at_once,
        max_grad_norm=clipped * new if algorithm == "rloo" else clipped,
        cache_implementation=cache,
        **PEER[algorithm],
    )
    ours = asked.recipe(algorithm, 1, rounds.GRADIENT | OURS[algorithm])
    return Way(f"{algorithm.upper()}, {asked.size}", f"TRL, {name}", ours, peer, bench.PEER_PYTHON, 1, warmup)


def planned(prompts: rounds.Prompts, folder: Path, settings: argparse.Namespace) -> list[rounds.Plan]:
    number, plans = settings.warmup + settings.steps, list[rounds.Plan]()
    for algorithm in OURS:
        asked = Asked("S", folder / "S", prompts["S"], number, samples=SAMPLES)
        seeds = [
            Asked("XS", folder / "XS", prompts["XS"], settings.learning_steps, seed, SAMPLES)
            for seed in range(settings.seeds)
        ]
        timed = [way(algorithm, asked, name, settings.warmup) for name in TRIED[algorithm]]
        learning = [way(algorithm, each, next(iter(WAYS)), 1) for each in seeds]
        plans.append(rounds.Plan(timed, {timed[0].case: learning}))
    return plans


if __name__ == "__main__":
    rounds.main(__doc__, "rloo", planned, REMARK)
