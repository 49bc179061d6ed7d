"""Loss scaling for fp16: its factor, and when a step is skipped. Knows no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossScale:
    """The factor on an fp16 loss that keeps small gradients above zero, by the rule of `torch.amp.GradScaler`: halved
    when a gradient overflows, whose step is skipped, doubled after 2000 steps without."""

    interval = 2000

    def __init__(self, value: float = 65536.0) -> None:
        self.value, self._since, self.skipped = value, 0, 0

    def update(self, *, finite: bool) -> None:
        """Take note of a step whose gradients were ``finite`` or not."""
        self._since = self._since + 1 if finite else 0
        if not finite:
            self.value, self.skipped = self.value / 2, self.skipped + 1
        elif self._since == self.interval:
            self.value, self._since = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "since": self._since, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self._since, self.skipped = float(state["value"]), int(state["since"]), int(state["skipped"])
