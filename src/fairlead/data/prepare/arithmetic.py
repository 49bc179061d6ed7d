"""Sums with worked answers that end in ``#### n``, as GSM8K's do, made by a seed. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

from pydantic import Field

from fairlead.data.prepare.kind import Say
from fairlead.data.prepare.rows import writing
from fairlead.errors import ConfigError

OPERATORS = "+-"


@dataclass(frozen=True, slots=True)
class ArithmeticOptions:
    solved: Annotated[int, Field(ge=1)] = 2000
    """Problems with a worked answer, to fine-tune on."""
    unsolved: Annotated[int, Field(ge=1)] = 4000
    """More problems, of which the result alone is given: prompts for a rule."""
    heldout: Annotated[int, Field(ge=1)] = 500
    """More problems, kept for evaluation."""
    terms: Annotated[int, Field(ge=2)] = 3
    largest: Annotated[int, Field(ge=1)] = 99
    """Terms are whole numbers from 0 to this one."""


@dataclass(frozen=True, slots=True)
class Problem:
    terms: tuple[int, ...]
    operators: str
    """One before each term but the first."""

    @property
    def prompt(self) -> str:
        rest = "".join(f" {operator} {term}" for operator, term in zip(self.operators, self.terms[1:], strict=True))
        return f"{self.terms[0]}{rest} ="

    @property
    def result(self) -> int:
        return self._totals[-1]

    @property
    def response(self) -> str:
        """One line a step, from left to right, then the result."""
        steps = zip(self._totals, self.operators, self.terms[1:], self._totals[1:], strict=False)
        lines = [f"{before} {operator} {term} = {after}" for before, operator, term, after in steps]
        return "".join(f"\n{line}" for line in [*lines, f"#### {self.result}"])

    @property
    def _totals(self) -> list[int]:
        totals = [self.terms[0]]
        for operator, term in zip(self.operators, self.terms[1:], strict=True):
            totals.append(totals[-1] + (term if operator == "+" else -term))
        return totals


def problems(options: ArithmeticOptions, seed: int) -> Iterator[Problem]:
    """All that the options ask for, each another one. Raises ConfigError where there are not so many."""
    size, signs = options.largest + 1, len(OPERATORS) ** (options.terms - 1)
    wanted, possible = options.solved + options.unsolved + options.heldout, size**options.terms * signs
    if wanted > possible:
        raise ConfigError(
            f"{wanted} problems are asked for, and {options.terms} terms up to {options.largest} make {possible}",
            "ask for fewer, or for more or larger terms",
        )
    for number in Random(f"arithmetic/{seed}").sample(range(possible), wanted):
        terms, operators = list[int](), ""
        for _ in range(options.terms):
            number, term = divmod(number, size)
            terms.append(term)
        for _ in range(options.terms - 1):
            number, sign = divmod(number, len(OPERATORS))
            operators += OPERATORS[sign]
        yield Problem(tuple(terms), operators)


def write_problems(_: Sequence[Path], folder: Path, options: ArithmeticOptions, seed: int, say: Say) -> dict[str, Any]:
    splits = {"solved": options.solved, "unsolved": options.unsolved, "heldout": options.heldout}
    made = problems(options, seed)
    with writing(folder) as outputs:
        for split, number in splits.items():
            for problem in islice(made, number):
                prefix = "heldout_" if split == "heldout" else ""
                if split != "unsolved":
                    outputs.add(f"{prefix}sft", {"prompt": problem.prompt, "response": problem.response})
                if split != "solved":
                    outputs.add(f"{prefix}prompts", {"prompt": problem.prompt, "answer": str(problem.result)})
    total = sum(splits.values())
    return {"read": total, "kept": total, "dropped": {}, "splits": splits}
