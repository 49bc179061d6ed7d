"""docs/guides/memory.md shows what its commands print; how much memory is free is another matter each time."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "memory.md"
EXAMPLES = re.findall(r"```sh\n(fairlead [^\n]+)\n```\n\n```text\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)


def lasting(text: str) -> list[str]:
    """From the tree on: above it stands what is free on this machine."""
    return [line.rstrip() for line in text[text.index("Tree\n") :].strip().splitlines()]


def test_the_guide_has_both_models_of_the_sources() -> None:
    assert [shlex.split(command)[2] for command, _ in EXAMPLES] == ["llama-2-7b", "opt-1.3b"]


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=["llama-2-7b", "opt-1.3b"])
def test_the_guide_shows_what_is_printed(command: str, shown: str) -> None:
    arguments = [sys.executable, "-m", "fairlead", *shlex.split(command)[1:]]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert lasting(shown) == lasting(printed)
