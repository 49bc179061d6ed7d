"""The committed lists of defects: each one exact replacement in one file of the package."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "src" / "fairlead"
LISTS = ("written", "drawn")
"""written: by hand; drawn: by `python -m tests.mutants.draw`."""


@dataclass(frozen=True, slots=True)
class Defect:
    name: str
    file: str
    """Below the package."""
    old: str
    new: str
    peers: int | None = None
    """The line of peers.yaml that it stands for."""
    equivalent: str = ""
    """Why no test can tell it from the code as it is."""
    drawn: bool = False

    def applied(self, text: str) -> str:
        """The text of its file with the defect in it. Raises ValueError where the code is no longer what it was."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {self.old!r} occurs {text.count(self.old)} times, not once ({self.name})")
        return text.replace(self.old, self.new)


def defects() -> list[Defect]:
    return [Defect(**row, drawn=name == "drawn") for name in LISTS for row in read(name)]


def peers() -> dict[int, str]:
    """Defects that were found in other toolkits, by number."""
    return read("peers")


def tier(file: str) -> list[str]:
    """The fast tier: the test files that import a module and take at most a minute together, the nearest first."""
    tiers: dict[str, list[str]] = read("tiers")
    return tiers[file]


@functools.cache
def read(name: str):
    return yaml.safe_load((HERE / f"{name}.yaml").read_text("utf-8"))
