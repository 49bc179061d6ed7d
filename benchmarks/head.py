"""Log-probabilities of 2048 tokens from hidden states, forward and backward: tokens a second and memory.

    make bench-head
    make bench-head ARGS="--sizes S --calls 2 --repeats 1"

Beside plain logits with log_softmax, and beside the fused head that TRL's trainers use. Each call is measured in a
process of its own, by turns; memory is the peak above what lay there before, the gradients included.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import given
import side_by_side as bench

ROWS = 2048
TOLERANCE = 1e-5
"""Norms of the log-probabilities and of both gradients may differ by this share."""
PEERS = {"plain": "plain logits, log_softmax", "fused": "TRL's fused head"}
METRICS: dict[tuple[str, str], Callable[[dict[str, Any]], float]] = {
    ("tokens a second", "1/s"): lambda found: ROWS / found["seconds"],
    ("memory above the inputs", "MB"): lambda found: found["memory"],
}
REMARK = "fp32, forward and backward. TRL's head computes log-probabilities alone."


def job(size: str, way: str, calls: int) -> dict[str, Any]:
    hidden_size = given.SIZES[size]["hidden_size"]
    return {
        "way": way,
        "rows": ROWS,
        "hidden_size": hidden_size,
        "vocabulary": given.VOCABULARY[size],
        "calls": calls,
    }


def measure_ours(job: dict[str, Any]) -> dict[str, Any]:
    from peers.head_case import measure

    from fairlead.ops.logprobs import token_logprobs

    return measure(job, lambda hidden, weight, targets: token_logprobs(hidden, weight, targets)[0])


def lines(size: str, way: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["facts"], b["facts"], strict=True)]
    return [
        {
            "case": f"{size}, {ROWS} rows",
            "metric": metric,
            "unit": unit,
            **bench.compared([measure(found) for found in ours], [measure(found) for found in theirs]),
            "peer_name": PEERS[way],
            "repeats": len(ours),
            "agree": all(abs(one - other) <= TOLERANCE * abs(other) for one, other in pairs),
        }
        for (metric, unit), measure in METRICS.items()
    ]


def main() -> None:
    parser = bench.options(__doc__, "head", folders=())
    parser.add_argument("--calls", type=int, default=5, help="timed calls of a process")
    settings = parser.parse_args()
    cases: list[dict[str, Any]] = []
    for size in settings.sizes:
        ours, theirs = list[dict[str, Any]](), {way: list[dict[str, Any]]() for way in PEERS}
        for _ in range(settings.repeats):
            ours.append(bench.run([sys.executable, __file__], job(size, "ours", settings.calls)))
            for way in PEERS:
                theirs[way].append(bench.run_peer("head.py", job(size, way, settings.calls)))
        for way in PEERS:
            cases += lines(size, way, ours, theirs[way])
    bench.write_results(settings.out, "head", cases, ours[0]["versions"] | theirs["fused"][0]["versions"], REMARK)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):  # our side of one run
        Path(sys.argv[2]).write_text(json.dumps(measure_ours(json.loads(Path(sys.argv[1]).read_text()))))
    else:
        main()
