"""The phrase that grows: what the responses learned from have come to repeat, against those sampled before anything was
learned. The source's case is '#', which half of the responses ended with, since the reward could not see it. Reads the
rounds of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fairlead.health.rules import Rule, Values
from fairlead.rollout.texts import grown_phrase

FACTOR, SHARE = 5.0, 0.05
"""How many times its first share a phrase has come to, and what share that is at least."""


def phrase_rule(rounds: Path) -> Rule:
    """Speaks at the first step of a round, and names the phrase. ``rounds`` is a run's folder of them."""

    def check(now: Values, _: Values) -> str | None:
        folder = rounds / f"{int(now['rollout/round']):03d}"
        selected = folder / "selected.jsonl"
        learned = _responses(selected if selected.is_file() else folder / "scored.jsonl")
        grown = grown_phrase([*_responses(rounds / "000" / "samples.jsonl")], [*learned], factor=FACTOR, share=SHARE)
        if grown is None:
            return None
        return (
            f"{grown.phrase!r} has become {grown.now:.0%} of what is learned from, {grown.before:.1%} of the first "
            "samples: the reward pays for it, or cannot see it. Read the round's texts; discard it ([hashes, repeats, "
            "{contains: {part: ...}}]), or mend the reward"
        )

    return Rule("phrase", ("rollout/round",), check)


def _responses(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="surrogatepass") as file:
        for line in file:
            row = json.loads(line)
            if "discarded" not in row:
                yield row["response"]
