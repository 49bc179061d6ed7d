"""Sums with answers that end in ``#### n``, as GSM8K's do, made by a seed. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
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
    solved: Annotated[int, Field(ge=1)] = 3000
    """Problems with an answer, to fine-tune on."""
    unsolved: Annotated[int, Field(ge=1)] = 4000
    """More problems, of which the result alone is given: prompts for a rule."""
    heldout: Annotated[int, Field(ge=1)] = 500
    """More problems, kept for evaluation."""
    worked: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of the answers that show their steps; the others are the result alone."""
    terms: Annotated[int, Field(ge=2)] = 6
    largest: Annotated[int, Field(ge=1)] = 5
    """Terms are whole numbers from 0 to this one."""


@dataclass(frozen=True, slots=True)
class Problem:
    terms: tuple[int, ...]
    operators: str
    """One before each term but the first."""

    @property
    def prompt(self) -> str:
        return " ".join([str(self.terms[0]), *(f"{operator} {term}" for operator, term in self._steps), "="])

    @property
    def totals(self) -> list[int]:
        """After each term, from left to right."""
        signed = [self.terms[0], *(term if operator == "+" else -term for operator, term in self._steps)]
        return list(accumulate(signed))

    def answer(self, *, worked: bool) -> str:
        """One line a step where it is worked, and the result."""
        steps = zip(self.totals, self._steps, self.totals[1:], strict=False)
        lines = [f"\n{before} {operator} {term} = {after}" for before, (operator, term), after in steps]
        return "".join([*(lines if worked else ()), f"\n#### {self.totals[-1]}"])

    @property
    def _steps(self) -> list[tuple[str, int]]:
        return list(zip(self.operators, self.terms[1:], strict=True))


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
    made, rng = problems(options, seed), Random(f"worked/{seed}")
    with writing(folder) as outputs:
        for split, number in splits.items():
            prefix = "heldout_" if split == "heldout" else ""
            for problem in islice(made, number):
                if split != "unsolved":
                    answer = problem.answer(worked=rng.random() < options.worked)
                    outputs.add(f"{prefix}sft", {"prompt": problem.prompt, "response": answer})
                if split != "solved":
                    outputs.add(f"{prefix}prompts", {"prompt": problem.prompt, "answer": str(problem.totals[-1])})
    total = sum(splits.values())
    return {"read": total, "kept": total, "dropped": {}, "splits": splits}
