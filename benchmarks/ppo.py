"""PPO on HH's prompts beside TRL's PPOTrainer: responses a second, by phase, and peak memory.

    make bench-ppo
    make bench-ppo ARGS="--steps 2 --repeats 1 --seeds 1"

Rounds of 32 responses of 48 tokens, scored by a reward model and learned in 4 epochs of one minibatch. Ours has four
models as TRL's (policy, reference, value, reward), or one trunk for policy and value.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import given
import rounds
import side_by_side as bench
from rounds import Asked, Way

PYTHON = bench.HERE / "peers" / ".venv-ppo" / "bin" / "python"
EPOCHS = 4
TRUNKS = {"four models": "model", "one trunk": "policy"}
REMARK = (
    "Random Llamas in fp32, AdamW at a constant rate; gradients are not scaled down, as TRL's PPO has it; the same "
    "prompts of HH in the same order. Every response has as many tokens as the limit allows: ours cannot draw the end "
    "of sequence, TRL's may and goes on. The reward model has the policy's first weights and a random head; ours reads "
    "the text at the end of sequence, as any user's, TRL's the ids at the last token. Ours is the ppo stage with all "
    "that it writes; TRL writes neither rollouts nor checkpoints. peer_name says how many responses go through TRL's "
    "models at once in an update. Scoring is all between sampling and the first update. "
) + rounds.REMARK


def recipe(asked: Asked, trunk: str) -> dict[str, Any]:
    own = {"epochs": EPOCHS, "value": {"trunk": trunk}}
    found = asked.recipe("ppo", EPOCHS, rounds.GRADIENT | own)
    return found | {"optim": found["optim"] | {"max_grad_norm": None}}


def way(asked: Asked, case: str, trunk: str, rows_at_once: int, warmup: int) -> Way:
    peer = asked.job("ppo", rows_at_once, num_ppo_epochs=EPOCHS)
    name = f"TRL, {rows_at_once} responses at once"
    return Way(case, name, recipe(asked, trunk), peer, PYTHON, EPOCHS, warmup)


def planned(prompts: rounds.Prompts, folder: Path, settings: argparse.Namespace) -> list[rounds.Plan]:
    size, number = "S", settings.warmup + settings.steps
    reward = str(given.judge_of(folder / size))
    asked = Asked(size, folder / size, prompts[size], number, reward=reward)
    timed = [
        way(asked, f"{size}, {case}", trunk, at_once, settings.warmup)
        for case, trunk in TRUNKS.items()
        for at_once in (rounds.BATCH, 8)
    ]
    seeds = [Asked("XS", folder / "XS", prompts["XS"], settings.learning_steps, seed) for seed in range(settings.seeds)]
    learning = {
        f"{size}, {case}": [way(each, f"XS, {case}", trunk, rounds.BATCH, 1) for each in seeds]
        for case, trunk in TRUNKS.items()
    }
    return [rounds.Plan(timed, learning)]


if __name__ == "__main__":
    rounds.main(__doc__, "ppo", planned, REMARK)
