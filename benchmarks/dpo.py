"""DPO on HH's pairs beside TRL's DPOTrainer: pairs a second, whole runs, peak memory.

    make bench-dpo
    make bench-dpo ARGS="--sizes S --steps 2 --repeats 1"

The same pairs in two orders: random, and batches of like length as train_sampling_strategy=group_by_length makes them.
TRL asks its reference model in every step, we ask ours once before the first: that pass is counted, in pairs a second
by the share of the pairs that are timed, in whole runs with the loading and tokenising of both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import given
import side_by_side as bench

BATCH = {"S": 8, "M": 4}
"""Pairs of a step."""
SETTINGS = {"S": (("random", 8), ("random", 1), ("grouped", 8)), "M": (("random", 4), ("random", 1))}
"""Of TRL: the order, and the pairs that go through its models at once."""
LEARNING_RATE = 1e-4
REMARK = (
    "Random Llamas in fp32, AdamW, the same pairs of HH in the same order, none of them cut. Ours is the dpo stage "
    "with all that it writes, its pass over the reference counted; TRL writes no checkpoints. peer_name says in which "
    "order, and how many pairs go through TRL's models at once. A whole run begins at the call, with all imports done, "
    "and ends with the last step."
)


def with_reference(way: bench.Way, result: bench.Result) -> float:
    """Our pairs a second, with the reference's share of the time and that of tokenising."""
    seconds, timed = result["seconds"], sum(way.units[way.warmup :])
    return timed / (seconds[-1] - seconds[way.warmup - 1] + result["prepared"] * timed / sum(way.units))


def whole(way: bench.Way, result: bench.Result) -> float:
    return sum(way.units) / result["whole"]


METRICS = {
    ("pairs a second, with reference", "1/s"): (with_reference, bench.rate),
    ("pairs a second, whole run", "1/s"): (whole, whole),
    **bench.PEAK,
}


def ways(size: str, model: Path, pairs: Sequence[given.Pair], warmup: int, steps: int) -> Iterator[bench.Way]:
    batch = BATCH[size]
    orders = given.orders(pairs, batch, warmup, steps)
    for order, at_once in SETTINGS[size]:
        mine, theirs = given.write_pairs(model / order, orders[order])
        ours = given.recipe(
            "dpo",
            model,
            mine,
            optim={"learning_rate": LEARNING_RATE},
            train={"steps": warmup + steps, "batch_size": batch},
            dpo={"beta": 0.1},
        )
        peer = given.job(
            "dpo",
            model,
            theirs,
            steps=warmup + steps,
            batch_size=batch,
            rows_at_once=at_once,
            learning_rate=LEARNING_RATE,
            arguments={"beta": 0.1, "max_length": given.LENGTH},
            ids=[pair.ids for pair in orders[order]],
        )
        yield bench.Way(f"TRL, {order}, {at_once} pairs at once", ours, peer, [batch] * (warmup + steps), warmup)


def main() -> None:
    parser = bench.options(__doc__, "dpo")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of S; of M half as many")
    settings = parser.parse_args()
    data = bench.data_folder(parser, settings)
    rows = given.transcripts(data)
    texts = [row["chosen"] for row in rows]
    cases: list[dict[str, Any]] = []
    with bench.scratch() as folder:
        for size in settings.sizes:
            tokenizer = given.save_model(folder / size, size, [*texts, *given.books(data)])
            steps = settings.steps if size == "S" else max(1, settings.steps // 2)
            pairs = given.whole_pairs(rows, tokenizer)
            tried = list(ways(size, folder / size, pairs, settings.warmup, steps))
            runs = bench.interleave(size, tried, settings.repeats)
            cases += bench.results(size, tried, runs, METRICS)
    bench.write_results(settings.out, "dpo", cases, bench.versions(runs), REMARK)


if __name__ == "__main__":
    main()
