"""The lists of defects fit the code as it is; running them is `make mutants`."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutants.__main__ import ROOT
from tests.mutants.defects import PACKAGE, Defect, defects, peers, tier
from tests.mutants.draw import changes

ALL = defects()


def test_there_are_sixty_defects_and_no_two_alike() -> None:
    assert len(ALL) >= 60
    assert max(Counter(defect.name for defect in ALL).values()) == 1
    assert max(Counter((defect.file, defect.old, defect.new) for defect in ALL).values()) == 1


@pytest.mark.parametrize("file", sorted({defect.file for defect in ALL}))
def test_every_defect_still_finds_its_place_and_can_be_read(file: str) -> None:
    text = (PACKAGE / file).read_text("utf-8")
    for defect in (defect for defect in ALL if defect.file == file):
        changed = defect.applied(text)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), defect.name


def test_a_defect_whose_place_is_gone_or_ambiguous_is_an_error() -> None:
    defect = Defect("a", "ops/kl.py", "x = 1", "x = 2")
    for text in ("x = 3", "x = 1\nx = 1"):
        with pytest.raises(ValueError, match="not once"):
            defect.applied(text)


def test_every_file_with_a_defect_has_tests() -> None:
    for defect in ALL:
        assert all((ROOT / test).is_file() for test in tier(defect.file)), defect.file


def test_every_known_defect_of_others_is_seeded_or_says_why_not() -> None:
    seeded = {defect.peers for defect in ALL}
    assert {number for number, words in peers().items() if "none seeded" not in words} <= seeded


def test_operators_are_swapped_where_they_stand() -> None:
    line = "    return (a + b) * 2 if not x < 3 else False"
    tree = ast.parse(f"def f(a, b, x):\n{line}\n")
    made = {line[:start] + put + line[end:] for _, start, end, put in changes(tree, ["", line])}
    assert made == {
        "    return (a - b) * 2 if not x < 3 else False",
        "    return (a + b) / 2 if not x < 3 else False",
        "    return (a + b) * 3 if not x < 3 else False",
        "    return (a + b) * 2 if x < 3 else False",
        "    return (a + b) * 2 if not x <= 3 else False",
        "    return (a + b) * 2 if not x < 4 else False",
        "    return (a + b) * 2 if not x < 3 else True",
    }
