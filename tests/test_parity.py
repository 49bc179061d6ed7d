"""docs/parity.md: what it says is kept true by something that exists, or says what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fairlead.runner import resolve
from tests.end_to_end import test_readme as readme

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "src" / "fairlead" / "recipes"
PAGE = (ROOT / "docs" / "parity.md").read_text("utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| there |")
]
"""What is there, whether it is here, by what."""
COMMANDS = [words for code in re.findall(r"`([^`]+)`", PAGE) for words in readme.commands(code)]


def test_every_table_is_read_whole() -> None:
    assert {len(row) for row in ROWS} == {3} and len(ROWS) > 200
    assert PAGE.count("| there | here | by |") == PAGE.count("\n## ") == 6


def test_the_last_table_has_each_of_the_84_features_once() -> None:
    assert [int(number) for number in re.findall(r"^\| (\d+)\. ", PAGE, re.MULTILINE)] == [*range(1, 85)]


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


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_names_a_verb_or_target_a_recipe_and_settings_that_exist(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "fairlead" and len(words) == 2:
        assert words[1] in readme.TREE.commands
        return
    readme.test_a_command_in_a_code_block_parses_with_known_settings(words, monkeypatch)
    if words[:2] == ["fairlead", "inspect"]:
        _, given = readme.verb_and_parameters(words)
        resolve(given["target"], given["settings"] or [])


def test_recipes_named_without_a_command_exist() -> None:
    named = {name for _, _, by in ROWS for name in re.findall(r"`([a-z0-9.]+(?:[-/][a-z0-9.]+)+)`", by)}
    assert {"stack-llama/ppo", "dpo-qlora-llama2"} <= named
    assert [name for name in named if not (RECIPES / f"{name}.yaml").is_file()] == []
