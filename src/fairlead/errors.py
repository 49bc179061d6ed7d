"""Every error a user can cause, each with an exit code of its own. Knows nothing of what raises them.

FairleadError           1
├── ConfigError         2   a recipe, a key, a value, an argument
├── DataError           3   a file, a row, a template
├── ModelError          4   weights, tokenizer, adapter, head, family
├── TrainingError       5   a step that cannot be taken (non-finite gradient, nothing to learn from)
├── CheckpointError     6   a checkpoint that is torn, of another version, or cannot be written
├── RunError            7   a run directory that exists, is missing or belongs to another recipe
├── RanksError          8   another process of the run that failed, died or hangs
└── Interrupted       130   stopped by the user (SIGINT); the run can be continued
    └── Terminated    143   the same by the system (SIGTERM)
"""

from __future__ import annotations

from typing import ClassVar


class FairleadError(Exception):
    """A mistake that can be mended by the user: what was wrong, the value got, and a hint what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(FairleadError):
    exit_code = 2


class DataError(FairleadError):
    exit_code = 3


class ModelError(FairleadError):
    exit_code = 4


class TrainingError(FairleadError):
    exit_code = 5


class CheckpointError(FairleadError):
    exit_code = 6


class RunError(FairleadError):
    exit_code = 7


class RanksError(FairleadError):
    exit_code = 8


class Interrupted(FairleadError):
    exit_code = 130


class Terminated(Interrupted):
    exit_code = 143
