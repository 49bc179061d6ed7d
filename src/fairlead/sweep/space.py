"""What a sweep searches, as its YAML file says it: the metric, how it is read, and where the values of each key come
from. Knows no recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fairlead.config import Section
from fairlead.config_file import read_mapping
from fairlead.config_resolve import located, validate
from fairlead.errors import ConfigError

KINDS = ("uniform", "loguniform", "int", "choice")
TRIALS = 20
_GOLDEN = (math.sqrt(5) - 1) / 2
_Int = int  # the name of a kind hides it below


class Parameter(Section):
    """Where the values of one key come from: one of KINDS."""

    uniform: tuple[float, float] | None = None
    """From low to high."""
    loguniform: tuple[float, float] | None = None
    """From low to high, each order of magnitude alike."""
    int: tuple[_Int, _Int] | None = None
    """Whole numbers, both ends included."""
    choice: tuple[Any, ...] | None = None
    """One of these; any value that a recipe can hold."""
    step: float | None = Field(default=None, gt=0)
    """Of uniform and int: low, low + step ... and nothing between."""
    log: bool = False
    """Of int: each order of magnitude alike."""

    @model_validator(mode="after")
    def _one_kind(self) -> Parameter:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            told = " and ".join(given) if given else "none"
            raise ValueError(f"one of {', '.join(KINDS)} was expected, got {told}")
        if self.choice is None:
            low, high = self._ends
            if low >= high:
                raise ValueError(f"{given[0]} goes from low to high, got {low:g} to {high:g}")
            if low <= 0 and (self.loguniform or self.log):
                raise ValueError(f"a logarithm needs values above 0, got {low:g}")
            if self.step is not None and self.step > high - low:
                raise ValueError(f"step={self.step:g} leads out of {low:g} to {high:g}")
        else:
            self._refuse_choices(self.choice)
        if self.step is not None and not self.uniform and (not self.int or self.log or self.step % 1):
            raise ValueError("step is for uniform, and a whole number for int without log")
        if self.log and not self.int:
            raise ValueError("log is for int; of other numbers there is loguniform")
        return self

    @staticmethod
    def _refuse_choices(choices: Sequence[Any]) -> None:
        try:
            texts = [json.dumps(value, allow_nan=False) for value in choices]
        except (TypeError, ValueError) as error:
            raise ValueError(f"choice holds what no recipe can hold: {error}") from error
        if len(set(texts)) < max(len(texts), 1):
            raise ValueError("choice is empty, or holds a value twice")

    @property
    def _ends(self) -> tuple[float, float]:
        ends = self.uniform or self.loguniform or self.int
        assert ends is not None
        return ends

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value of numbers."""
        low, high = self._ends
        return (low, high) if self.step is None else (low, self._at(_steps(low, high, self.step)))

    @property
    def values(self) -> Sequence[Any] | None:
        """All values in order, where they are so many."""
        if self.choice is not None:
            return self.choice
        low, high = self._ends
        if self.int:
            return range(int(low), int(high) + 1, int(self.step or 1))
        return None if self.step is None else [self._at(n) for n in range(_steps(low, high, self.step) + 1)]

    @property
    def samples(self) -> Sequence[Any]:
        """Values that a recipe is tried with: every choice; of numbers both ends, and one between that is not round."""
        if self.choice is not None:
            return self.choice
        low, high = self.bounds
        if self.int or self.step is not None:
            return (low, high)
        return (low, high, low + _GOLDEN * (high - low))

    def _at(self, number: _Int) -> float:
        """The value so many steps above the lowest."""
        low = self._ends[0]
        value = Decimal(str(low)) + number * Decimal(str(self.step))
        return int(value) if self.int else float(value)


def _steps(low: float, high: float, step: float) -> int:
    """In decimals, in which 0.3 is three times 0.1."""
    return int((Decimal(str(high)) - Decimal(str(low))) // Decimal(str(step)))


class Space(Section):
    metric: str = Field(min_length=1)
    """A metric of metrics.jsonl, such as eval/loss."""
    goal: Literal["max", "min"]
    read: Literal["last", "mean", "best"] = "last"
    """The value of a trial: the metric's last value, the mean of the last quarter of its values, or its best one."""
    trials: int | None = Field(default=None, ge=1)
    """All in all, failed ones included; null: 20, of a grid all combinations."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: learns from the trials so far where good values lie (Bergstra et al. 2011); grid: every combination, those
    of the last key first."""
    pruner: Literal["none", "median"] = "none"
    """median: a trial whose best value so far is worse than the median of the others at the same step is stopped, from
    the sixth trial on."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the sampler; each run has the recipe's."""
    max_failures: int = Field(default=5, ge=1)
    """So many trials in a row that fail end the sweep."""
    space: dict[str, Parameter] = Field(min_length=1)
    """Key of the recipe -> where its values come from."""

    @model_validator(mode="after")
    def _finite_grid(self) -> Space:
        endless = [key for key, parameter in self.space.items() if parameter.values is None]
        if self.sampler == "grid" and endless:
            raise ValueError(f"a grid needs choice, int, or uniform with a step, but not so {', '.join(endless)}")
        return self

    @property
    def num_trials(self) -> int:
        if self.sampler != "grid":
            return self.trials or TRIALS
        size = math.prod(len(parameter.values or ()) for parameter in self.space.values())
        return min(self.trials or size, size)

    def combination(self, number: int) -> dict[str, Any]:
        """The values of a grid's trial."""
        found: dict[str, Any] = {}
        for key, parameter in reversed(self.space.items()):
            assert parameter.values is not None
            number, place = divmod(number, len(parameter.values))
            found[key] = parameter.values[place]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Every setting with its value; of each key what was said of it."""
        space = {key: each.model_dump(mode="json", exclude_defaults=True) for key, each in self.space.items()}
        return {**self.model_dump(mode="json", exclude={"space"}), "space": space}


def read_space(path: Path) -> Space:
    """Raises ConfigError with file, line, key and the nearest known key."""
    raw, lines = read_mapping(path)
    problems: list[str] = []

    def origin(key: str) -> str:
        return located(key, str(path), lines)

    given = raw.get("space")
    for key, parameter in given.items() if isinstance(given, dict) else ():
        validate(Parameter, parameter, f"space.{key}.", origin, problems)
    space = None if problems else validate(Space, raw, "", origin, problems)
    if space is None:
        raise ConfigError("\n".join(problems))
    return space
