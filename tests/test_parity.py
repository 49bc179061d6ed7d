"""docs/parity.md: what it says is kept true by something that exists, or says what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "parity.md").read_text("utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| there |")
]
"""What is there, whether it is here, by what."""


def test_every_table_is_read_whole() -> None:
    assert {len(row) for row in ROWS} == {3} and len(ROWS) > 80
    assert PAGE.count("| there | here | by |") == PAGE.count("\n## ") == 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_names_tests_that_exist_or_what_is_missing(row: tuple[str, str, str]) -> None:
    there, here, by = row
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", by)
    missing = [
        f"{file}::{name}"
        for file, name in tests
        if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text("utf-8")
    ]
    assert missing == []
    assert by.count("::") == len(tests)
    assert here in ("yes", "partly", "no")
    if here == "yes":
        assert tests or "`fairlead " in by
    else:
        assert re.sub(r"`[^`]*`", "", by).strip(" ,:"), f"{there}: what is missing?"
