"""Rewards that are functions of texts: a user's own, in this process or in several, awaited where it is async; and the
rules that are built in. Reads no model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fairlead.config_file import suggest
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, FairleadError, TrainingError
from fairlead.rollout.rewards.calls import RewardFunction, Workers, results
from fairlead.rollout.rewards.returned import listed, sample, scores_from
from fairlead.rollout.rewards.rules import RULES, bound, columns_of
from fairlead.rollout.rewards.settings import FunctionSource, RuleSource
from fairlead.types import Rollout, Scores


@dataclass(frozen=True, slots=True)
class Asked:
    """Some rollouts as texts."""

    samples: list[str]
    """Prompt and response, as the policy's template writes them."""
    prompts: list[str]
    outputs: list[str]
    response_ids: list[tuple[int, ...]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], renderer: Renderer) -> Asked:
        prompts = [renderer.prompt_text(rollout.prompt) for rollout in rollouts]
        samples = [
            prompt + renderer.response_text(rollout.prompt, rollout.text)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        names = sorted({name for rollout in rollouts for name in rollout.prompt.columns})
        columns = {name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in names}
        outputs, ids = [rollout.text for rollout in rollouts], [rollout.response_ids for rollout in rollouts]
        return cls(samples, prompts, outputs, ids, columns)

    def texts(self) -> dict[str, list[Any]]:
        """What is handed out, by name. Raises TrainingError for a column that bears one of these names."""
        own = {"samples": self.samples, "prompts": self.prompts, "outputs": self.outputs}
        for name in (*own, "response_ids", "tokenizer"):
            if name in self.columns:
                raise TrainingError(
                    f"a column of the prompts is called {name!r}, as what a reward is given besides", hint="rename it"
                )
        return own | self.columns

    def parts(self, size: int) -> Iterator[Asked]:
        for at in range(0, len(self.outputs), size):
            part = slice(at, at + size)
            columns = {name: values[part] for name, values in self.columns.items()}
            yield Asked(self.samples[part], self.prompts[part], self.outputs[part], self.response_ids[part], columns)


class Judge(Protocol):
    def __call__(self, asked: Asked) -> Sequence[Any]:
        """One value a sample, not yet checked."""
        ...


class TextReward:
    """What a judge of texts says, checked."""

    def __init__(self, judge: Judge, name: str, renderer: Renderer) -> None:
        self._judge, self.name, self._renderer = judge, name, renderer

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        asked = Asked.of(rollouts, self._renderer)
        try:
            found = self._judge(asked)
        except FairleadError:
            raise
        except Exception as error:
            first = f", the first of which is {sample(asked.outputs[0])}" if rollouts else ""
            raise TrainingError(
                f"the reward {self.name} raised {type(error).__name__}: {error}, given {len(rollouts)} samples{first}",
                hint="mend the function; the same command continues the run",
            ) from error
        return scores_from(found, rollouts, self.name, self._renderer)


# --- a user's own --------------------------------------------------------------------------------------------------


class FunctionJudge:
    """Calls a function with what it takes. ``source`` says where other processes find it, and how it is called."""

    def __init__(
        self, function: RewardFunction, name: str, tokenizer: Any, source: FunctionSource | None = None
    ) -> None:
        self._function, self._name, self._source = function, name, source
        self._takes = _parameters(function)
        given = {} if source is None else source.arguments
        if self._takes is not None and (unknown := [key for key in given if key not in self._takes]):
            raise ConfigError(
                f"the reward {name} takes no argument {unknown[0]!r}", hint=suggest(unknown[0], self._takes)
            )
        self._fixed = given | ({"tokenizer": tokenizer} if "tokenizer" in _names(self._takes) else {})
        self._workers = None if source is None or not source.workers else Workers(source.function, source.workers)

    def __call__(self, asked: Asked) -> list[Any]:
        parts = list(asked.parts(self._size(len(asked.outputs))))
        calls = [self._arguments(part) for part in parts]
        found = results(self._function, calls) if self._workers is None else self._workers(calls)
        return [
            value
            for part, values in zip(parts, found, strict=True)
            for value in listed(values, len(part.outputs), self._name)
        ]

    def _size(self, number: int) -> int:
        """Samples of one call."""
        if self._source is None:
            return max(1, number)
        return self._source.batch_size or max(1, -(-number // max(1, self._source.workers)))

    def _arguments(self, asked: Asked) -> dict[str, Any]:
        given: Mapping[str, Any] = asked.texts()
        if self._takes is not None:
            takes_all = any(each.kind is each.VAR_KEYWORD for each in self._takes.values())
            given = {name: values for name, values in given.items() if takes_all or name in self._takes}
        return {**given, **self._fixed} | (
            {"response_ids": asked.response_ids} if "response_ids" in _names(self._takes) else {}
        )


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter] | None:
    """None where they cannot be known."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _names(takes: Mapping[str, inspect.Parameter] | None) -> Mapping[str, Any]:
    return {} if takes is None else takes


# --- built in ------------------------------------------------------------------------------------------------------


class RuleJudge:
    """Raises ConfigError, when it is made, for arguments that the rule refuses."""

    def __init__(self, source: RuleSource, name: str) -> None:
        self._name, self._rule = name, RULES[source.rule]
        self._arguments = bound(source.rule, source.arguments)
        self._columns = [source.columns.get(column, column) for column in columns_of(self._rule)]
        try:
            self._rule("", *["0" for _ in self._columns], **self._arguments)
        except (ValueError, re.error) as error:
            raise ConfigError(f"the rule {source.rule} refuses {source.arguments}: {error}") from error

    def __call__(self, asked: Asked) -> list[float]:
        for column in self._columns:
            if column not in asked.columns:
                raise TrainingError(
                    f"the reward {self._name} reads the prompts' column {column!r}, and they have "
                    f"{', '.join(asked.columns) or 'none'}",
                    hint="the rule's columns say under which name: columns={answer: solution}",
                )
        rows = zip(asked.outputs, *(asked.columns[column] for column in self._columns), strict=True)
        return [self._of(*row) for row in rows]

    def _of(self, text: str, *columns: Any) -> float:
        try:
            return self._rule(text, *columns, **self._arguments)
        except ValueError as error:
            raise TrainingError(f"the reward {self._name}: {error}, for the sample {sample(text)}") from error
