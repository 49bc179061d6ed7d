"""An observer that looks at every step by the rules, writes alarms.jsonl, and says aloud what it found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairlead.health.phrases import phrase_rule
from fairlead.health.rules import BEGINNING, LAST, RULES, Rule
from fairlead.tracking.run_directory import RunDirectory
from fairlead.types import Progress


class Alarms:
    """Each alarm is raised when its rule first speaks, and again only after the rule was silent. Its state belongs to
    the checkpoint, so that a continued run raises what an uninterrupted one would."""

    def __init__(self, directory: RunDirectory, say: Callable[[str], None], *, rules: Sequence[Rule] = RULES) -> None:
        self._directory, self._say = directory, say
        self._rules = (*rules, phrase_rule(directory.rounds))
        self._raised = set[str]()
        self._round = 0
        self._beginning: dict[str, list[float]] = {}
        self._last: dict[str, float] = {}

    def after_step(self, progress: Progress) -> None:
        metrics = {name: value for name, value in progress.metrics.items() if math.isfinite(value)}
        if not progress.step:
            return
        self._round = int(metrics.get("rollout/round", self._round))
        start = {name: sum(seen) / len(seen) for name, seen in self._beginning.items()}
        start |= {f"{LAST}{name}": value for name, value in self._last.items()}
        for rule in self._rules:
            if progress.step < rule.since or not all(name in metrics for name in rule.needs):
                continue
            message = rule.check(metrics, {**metrics, **start})
            if message is None:
                self._raised.discard(rule.name)
            elif rule.name not in self._raised:
                self._raised.add(rule.name)
                self._raise(progress.step, rule.name, message)
        self._last |= metrics
        for name, value in metrics.items():
            seen = self._beginning.setdefault(name, [])
            if len(seen) < BEGINNING:
                seen.append(value)

    def _raise(self, step: int, name: str, message: str) -> None:
        if sample := _newest_sample(self._directory.rounds, self._round):
            message = f"{message}. For example: {sample}"
        self._directory.append("alarms.jsonl", [{"step": step, "alarm": name, "message": message}])
        self._say(f"alarm at step {step}: {name}: {message}")

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"raised": sorted(self._raised), "beginning": self._beginning, "last": self._last, "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._raised, self._round = set(state["raised"]), int(state["round"])
        self._last = dict(state.get("last", {}))  # checkpoints of before have none
        self._beginning = {name: [float(value) for value in seen] for name, seen in state["beginning"].items()}


def _newest_sample(folder: Path, last: int) -> str:
    """The first response of the newest round that was scored, with its score; of several rewards with each one's.
    Rounds after the ``last`` are there where a run goes on from before them."""
    found = [path for path in folder.glob("*/scored.jsonl") if int(path.parent.name) <= last]
    rounds = sorted(found, key=lambda path: int(path.parent.name))
    if not rounds:
        return ""
    with rounds[-1].open(encoding="utf-8", errors="surrogatepass") as file:
        row = next((row for row in map(json.loads, file) if row["score"] is not None), None)
    if row is None:
        return ""
    scores = row.get("scores") or {"score": row["score"]}
    told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return f"{row['response'][:120]!r} ({told}; round {rounds[-1].parent.name})"
