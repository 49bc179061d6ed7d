"""RAFT on HH's prompts beside the plain way: responses a second, by phase, and peak memory.

    make bench-raft
    make bench-raft ARGS="--sizes S --steps 1 --repeats 1 --seeds 1"

Rounds of 16 prompts with 8 responses of 48 tokens each, scored by a function of the text; the best of each prompt is
learned in one step. The plain way is transformers.generate over batches in which each prompt stands eight times, then
TRL's SFTTrainer on the model it has sampled from.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import rounds
import side_by_side as bench
from rounds import Asked, Way

SAMPLES = 8
"""Responses to a prompt."""
RESPONSES = 128
"""Of a round."""
TEMPERATURE = 0.85
SIZES = ("S", "M")
REMARK = (
    "Random Llamas in fp32, AdamW at a constant rate, anew in each round; the same prompts of HH in the same order, "
    "the same function of the text as a reward. Every response has as many tokens as the limit allows: neither side "
    "can draw the end of sequence, nor learns it. Ours is the raft stage with all that it writes; the plain way writes "
    "nothing. peer_name says how many responses generate samples at once, with which cache, and how many the trainer "
    "has in one pass. "
) + rounds.REMARK


@dataclass(frozen=True, slots=True)
class Setting:
    """Of the plain way."""

    sampled: int
    """Responses sampled at once."""
    learned: int
    """Responses in one pass of the trainer."""
    cache: str | None = None

    def __str__(self) -> str:
        cache = f", {self.cache} cache" if self.cache else ""
        return f"{self.sampled} at once{cache}, {self.learned} in a pass"


PLAIN = (Setting(128, 16), Setting(128, 4, "static"), Setting(32, 4))


def way(asked: Asked, setting: Setting, warmup: int) -> Way:
    own = {"temperature": TEMPERATURE, "epochs": 1, "optimizer": "fresh", "plateau": None, "rollout_rows": RESPONSES}
    peer = asked.job("raft", setting.learned) | {
        "sampled_at_once": setting.sampled,
        "cache": setting.cache,
        "temperature": TEMPERATURE,
    }
    name = f"transformers and TRL, {setting}"
    ours = asked.recipe("raft", 1, own)
    return Way(asked.size, name, ours, peer, bench.PEER_PYTHON, 1, warmup, RESPONSES, "raft.py")


def planned(prompts: rounds.Prompts, folder: Path, settings: argparse.Namespace) -> list[rounds.Plan]:
    def asked(size: str, number: int, seed: int = 0) -> Asked:
        return Asked(size, folder / size, prompts[size], number, seed, SAMPLES, responses=RESPONSES)

    number = settings.warmup + settings.steps
    timed = [way(asked(size, number), each, settings.warmup) for size in settings.sizes for each in PLAIN]
    seeds = [asked("XS", settings.learning_steps, seed) for seed in range(settings.seeds)]
    learning = [way(each, PLAIN[0], 1) for each in seeds]
    return [rounds.Plan(timed, dict.fromkeys(settings.sizes, learning))]


if __name__ == "__main__":
    rounds.main(__doc__, "raft", planned, REMARK, SIZES)
