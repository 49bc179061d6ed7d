"""A reward model on HH's pairs beside TRL's RewardTrainer: pairs a second and peak memory.

    make bench-reward
    make bench-reward ARGS="--sizes S --steps 2 --repeats 1"

The same pairs in two orders: random, and batches of like length as train_sampling_strategy=group_by_length makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import given
import side_by_side as bench

BATCH = 8
"""Pairs of a step."""
SETTINGS = {"S": (("random", 8), ("random", 1), ("grouped", 8)), "M": (("random", 1), ("grouped", 8))}
"""Of TRL: the order, and the pairs that go through its model at once."""
LEARNING_RATE = 1e-4
METRICS = {("pairs a second", "1/s"): (bench.rate, bench.rate), **bench.PEAK}
REMARK = (
    "Random Llamas in fp32, AdamW, the same pairs of HH in the same order, none of them cut. Ours is the reward stage "
    "with all that it writes; TRL writes no checkpoints. peer_name says in which order, and how many pairs go through "
    "TRL's model at once."
)


def ways(size: str, model: Path, pairs: Sequence[given.Pair], warmup: int, steps: int) -> Iterator[bench.Way]:
    orders = given.orders(pairs, BATCH, warmup, steps)
    for order, at_once in SETTINGS[size]:
        mine, theirs = given.write_pairs(model / order, orders[order])
        ours = given.recipe(
            "reward",
            model,
            mine,
            optim={"learning_rate": LEARNING_RATE},
            train={"steps": warmup + steps, "batch_size": BATCH},
        )
        peer = given.job(
            "reward",
            given.judge_of(model),
            theirs,
            steps=warmup + steps,
            batch_size=BATCH,
            rows_at_once=at_once,
            learning_rate=LEARNING_RATE,
            arguments={"max_length": given.LENGTH},
            ids=[pair.sides for pair in orders[order]],
        )
        yield bench.Way(f"TRL, {order}, {at_once} pairs at once", ours, peer, [BATCH] * (warmup + steps), warmup)


def main() -> None:
    parser = bench.options(__doc__, "reward")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of S; of M a quarter")
    settings = parser.parse_args()
    data = bench.data_folder(parser, settings)
    rows = given.transcripts(data)
    texts = [row["chosen"] for row in rows]
    cases: list[dict[str, Any]] = []
    with bench.scratch() as folder:
        for size in settings.sizes:
            tokenizer = given.save_model(folder / size, size, [*texts, *given.books(data)])
            steps = settings.steps if size == "S" else max(1, settings.steps // 4)
            tried = list(ways(size, folder / size, given.whole_pairs(rows, tokenizer), settings.warmup, steps))
            runs = bench.interleave(size, tried, settings.repeats)
            cases += bench.results(size, tried, runs, METRICS)
    bench.write_results(settings.out, "reward", cases, bench.versions(runs), REMARK)


if __name__ == "__main__":
    main()
