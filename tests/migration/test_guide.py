"""docs/guides/migrate.md: every setting on the right of its tables exists, and they say what `fairlead import` does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from fairlead.algorithms import REGISTRY, find
from fairlead.config import Recipe
from fairlead.migration.trlx_keys import COMMON, PEFT, PPO, RFT, SAMPLING
from fairlead.runner import resolve

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "migrate.md"
SECTIONS = re.split(r"^## ", GUIDE.read_text("utf-8"), flags=re.MULTILINE)[1:]
ROWS = [
    (section.splitlines()[0], *(cell.strip() for cell in line.strip("|").split("|")))
    for section in SECTIONS
    for line in section.splitlines()
    if line.startswith("| ") and not line.startswith("| trlX |") and not line.startswith("| TRL |")
]
"""Heading, theirs, ours, remark."""
SETTING = re.compile(r"((?:[a-z_]+\.)+[a-z_]+|seed)(?:=(\S+))?")


def settings(cell: str) -> Iterator[tuple[str, str | None]]:
    """Settings in backquotes, each with its value where one is given."""
    for code in re.findall(r"`([^`]+)`", cell):
        for word in code.split():
            found = SETTING.fullmatch(word)
            if found and (found[1].split(".")[0] in {*REGISTRY, *Recipe.model_fields}):
                yield found[1], found[2]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def exists(setting: str) -> bool:
    first, *rest = setting.split(".")
    models: list[type[BaseModel]] = [find(first).settings] if first in REGISTRY else [Recipe]
    for name in rest if first in REGISTRY else [first, *rest]:
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        if not fields:
            return False
        models = [inner for field in fields for inner in models_in(field.annotation)]
    return True


def test_the_walk_through_the_schema_finds_what_is_there_and_nothing_else() -> None:
    assert exists("ppo.adaptive_kl.target") and exists("model.adapter.rank") and exists("seed")
    assert not exists("ppo.adaptive_kl.goal") and not exists("ppo.target") and not exists("model.rank")


def test_all_tables_were_read() -> None:
    counts = [sum(row[0] == section.splitlines()[0] for row in ROWS) for section in SECTIONS]
    assert len(SECTIONS) == 4 and all(count > 15 for count in counts)
    assert {len(row) for row in ROWS} == {4}


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0][:12]}: {row[1][:40]}" for row in ROWS])
def test_the_settings_on_the_right_exist(row: tuple[str, str, str, str]) -> None:
    _, _, right, remark = row
    named = list(settings(right))
    assert len(named) == len(re.findall(r"`[^`]+`", right)), "the middle column holds settings alone"
    assert [setting for setting, _ in [*named, *settings(remark)] if not exists(setting)] == []
    for code in re.findall(r"`([^`]+)`", remark):
        given = {setting: value for setting, value in settings(f"`{code}`") if value is not None}
        if given:
            resolve("rloo" if "rloo." in code else "ppo", [f"{key}={value}" for key, value in given.items()])


def test_the_table_of_trlx_says_what_the_import_does() -> None:
    rules = {key.rpartition(".")[2]: rule.key for key, rule in {**COMMON, **PPO, **RFT, **SAMPLING, **PEFT}.items()}
    missing = [
        (theirs, ours)
        for theirs, ours in rules.items()
        if ours and ours != "model.adapter.method" and not theirs.startswith(("lr", "betas", "eps", "weight_decay"))
        if not any(row[0] == "trlX" and re.search(rf"\b{theirs}\b", row[1]) and f"`{ours}`" in row[2] for row in ROWS)
    ]
    assert missing == []
