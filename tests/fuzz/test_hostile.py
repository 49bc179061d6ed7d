"""The watch over what is written sees what it should."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fairlead.errors import DataError
from tests.fuzz.hostile import nothing_outside, told


@pytest.mark.parametrize(
    "act",
    [
        lambda path: path.write_text("x"),
        lambda path: path.mkdir(),
        lambda path: os.symlink("x", path),
        lambda path: (path.parent / "inside" / "a").rename(path),
        lambda path: os.close(os.open(path, os.O_WRONLY | os.O_CREAT)),
        lambda path: shutil.rmtree(path.parent / "outside too"),
    ],
)
def test_whatever_is_written_outside_is_noticed(act, tmp_path: Path) -> None:
    for name in ("inside", "outside too"):
        (tmp_path / name).mkdir()
    (tmp_path / "inside" / "a").touch()
    with nothing_outside(tmp_path / "inside"):
        (tmp_path / "inside" / "b").write_text((tmp_path / "inside" / "a").read_text())
    with pytest.raises(AssertionError, match="outside"), nothing_outside(tmp_path / "inside"):
        act(tmp_path / "outside")


def test_an_error_without_a_message_or_of_another_kind_is_noticed() -> None:
    with told():
        raise DataError("the file is empty")
    with pytest.raises(AssertionError), told():
        raise DataError(" ")
    with pytest.raises(KeyError), told():
        raise KeyError("x")
