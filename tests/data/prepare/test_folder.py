import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tests.data.prepare.raw import contents, hh_file, many_hh, question, rows

from fairlead.data.prepare import KINDS, MANIFEST, Kind, Source, prepare
from fairlead.data.sources import atomic_write, write_jsonl
from fairlead.errors import ConfigError, DataError


def test_text_joins_what_is_pretrained_on(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_bytes(b"Once\r\nupon a time.\r\n")
    path = hh_file(tmp_path / "hh.jsonl.gz", (question("Hi"), "Hello", "Go"))
    manifest = prepare("hh-rlhf", path, tmp_path / "out", text=tmp_path / "books", heldout=0.0)
    assert rows(tmp_path / "out", "pretrain") == [
        {"text": "Human: Hi\n\nAssistant: Hello"},
        {"text": "Once\nupon a time."},
    ]
    assert [entry["path"] for entry in manifest["inputs"]] == ["hh.jsonl.gz", "books/a.txt"]
    assert manifest["counts"]["text"] == {
        "read": 1,
        "kept": 1,
        "dropped": {},
        "notes": {"decoded as utf-8": 1, "documents": 1},
        "equal_rows_merged": 0,
    }


def test_bytes_do_not_depend_on_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many_hh(tmp_path / "one" / "hh.jsonl.gz")
    prepare("hh-rlhf", path, tmp_path / "out")
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deep")
    monkeypatch.chdir(tmp_path / "two" / "deep")
    prepare("hh-rlhf", "hh.jsonl.gz", "out")
    assert contents(Path("out")) == contents(tmp_path / "out")


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    path = many_hh(tmp_path / "hh.jsonl.gz")
    first = prepare("hh-rlhf", path, tmp_path / "out")
    inode = (tmp_path / "out").stat().st_ino
    assert prepare("hh-rlhf", path, tmp_path / "out") == first
    assert (tmp_path / "out").stat().st_ino == inode


@pytest.mark.parametrize("change", ["seed", "option", "input", "output", "missing", "manifest"])
def test_any_difference_prepares_again(tmp_path: Path, change: str) -> None:
    path, out = many_hh(tmp_path / "hh.jsonl.gz"), tmp_path / "out"
    prepare("hh-rlhf", path, out)
    before = contents(out)
    if change == "input":
        hh_file(path, (question("Hi"), "Hello", "Go"))
    elif change == "output":
        (out / "sft.jsonl").write_text("{}")
    elif change == "missing":
        (out / "sft.jsonl").unlink()
    elif change == "manifest":
        (out / MANIFEST).write_text("[1")
    options: dict[str, Any] = {"seed": {"seed": 1}, "option": {"heldout": 0.3}}.get(change, {})
    prepare("hh-rlhf", path, out, **options)
    assert (contents(out) == before) == (change in ("output", "missing", "manifest"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hh.jsonl.gz", "out"]


@pytest.mark.parametrize("already", [False, True])
def test_a_failure_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already: bool) -> None:
    path, out = many_hh(tmp_path / "hh.jsonl.gz"), tmp_path / "out"
    if already:
        prepare("hh-rlhf", path, out)
    before = contents(out) if already else {}
    calls = iter(range(100))

    def full_after_three(_: int) -> None:
        if next(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_after_three)
    with pytest.raises(DataError, match="No space left"):
        prepare("hh-rlhf", path, out, seed=1)
    assert sorted(e.name for e in tmp_path.iterdir()) == ["hh.jsonl.gz"] + ["out"] * already
    assert (contents(out) if already else {}) == before


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = many_hh(tmp_path / "hh.jsonl.gz"), tmp_path / "out"
    prepare("hh-rlhf", path, out)
    before = contents(out)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "done":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DataError, match="cannot be written"):
        prepare("hh-rlhf", path, out, seed=1)
    assert contents(out) == before


def chunks(files: Sequence[Path], folder: Path, options: Any, seed: int, say: Any) -> dict[str, Any]:
    """A kind that takes up its own work: five pieces, then the output, all from the file's text."""
    (text,) = (file.read_text() for file in files)
    for number in range(5):
        piece = folder / f"piece-{number}"
        if not piece.exists():
            say(f"piece {number}")
            with atomic_write(piece) as file:
                file.write(json.dumps({"text": f"{text} {seed} {number}"}).encode() + b"\n")
    with atomic_write(folder / "pretrain.jsonl") as file:
        file.writelines((folder / f"piece-{number}").read_bytes() for number in range(5))
    return {"read": 5, "kept": 5, "dropped": {}}


@dataclass(frozen=True)
class NoOptions:
    pass


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind ``pieces`` is known."""
    kind = Kind("pieces", "", Source(""), "", NoOptions, lambda path: [path], chunks)
    monkeypatch.setitem(KINDS, kind.name, kind)


def in_a_process_of_its_own(call: Callable[[], object]) -> int:
    """Runs ``call`` in a fork and returns how it ended: minus the number of the signal that killed it."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        try:
            call()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(word: str) -> Callable[[str], None]:
    def say(text: str) -> None:
        if text == word:
            os.kill(os.getpid(), signal.SIGKILL)

    return say


@pytest.mark.usefixtures("pieces")
def test_a_killed_preparation_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("word")
    (tmp_path / "more.txt").write_text("added")
    source, out, text = tmp_path / "in.txt", tmp_path / "out", tmp_path / "more.txt"
    prepare("pieces", source, tmp_path / "whole", text=text)
    kill = killed_at("piece 3")
    assert in_a_process_of_its_own(lambda: prepare("pieces", source, out, text=text, say=kill)) == -signal.SIGKILL
    assert not out.exists()
    said: list[str] = []
    prepare("pieces", source, out, text=text, say=said.append)
    assert said == ["piece 3", "piece 4"]
    assert contents(out) == contents(tmp_path / "whole")
    assert [row["text"] for row in rows(out, "pretrain")] == [*(f"word 0 {number}" for number in range(5)), "added"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("pieces")
def test_what_another_request_left_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("word")
    source, out = tmp_path / "in.txt", tmp_path / "out"
    assert in_a_process_of_its_own(lambda: prepare("pieces", source, out, say=killed_at("piece 3"))) == -signal.SIGKILL
    said: list[str] = []
    prepare("pieces", source, out, seed=1, say=said.append)
    assert said == [f"piece {number}" for number in range(5)]
    assert rows(out, "pretrain")[0] == {"text": "word 1 0"}


@pytest.mark.usefixtures("pieces")
def test_a_failure_keeps_the_work_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("word")

    def stop(text: str) -> None:
        said.append(text)
        if text == "piece 2":
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        prepare("pieces", tmp_path / "in.txt", tmp_path / "out", say=stop)
    assert said[-1] == f"what is done is kept in {tmp_path / '.out.partial'}; the same command continues from there"


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("call", ["fsync", "link", "rename", "rmtree"])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, already: bool
) -> None:
    path, out = many_hh(tmp_path / "hh.jsonl.gz"), tmp_path / "out"
    prepare("hh-rlhf", path, tmp_path / "new", seed=1)
    new, old = contents(tmp_path / "new"), {}
    if already:
        prepare("hh-rlhf", path, out)
        old = contents(out)
    owner = {"fsync": os, "link": os, "rename": Path, "rmtree": shutil}[call]
    real, steps, ends = getattr(owner, call), 0, list[int]()
    while not ends or ends[-1]:
        allowed = iter(range(steps))

        def step(*arguments: Any, _allowed: Any = allowed, **named: Any) -> Any:
            if next(_allowed, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, step)
            ends.append(in_a_process_of_its_own(lambda: prepare("hh-rlhf", path, out, seed=1)))
        assert ends[-1] in (0, -signal.SIGKILL)
        assert not out.exists() or contents(out) in (old, new)
        steps += 1
    assert contents(out) == new
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hh.jsonl.gz", "new", "out"]
    assert ends[0] == -signal.SIGKILL


@pytest.mark.usefixtures("pieces")
def test_two_processes_do_not_prepare_one_folder(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("word")
    source, out, refused = tmp_path / "in.txt", tmp_path / "out", list[str]()

    def meanwhile(text: str) -> None:
        if text == "piece 1":
            with pytest.raises(DataError) as caught:
                prepare("pieces", source, out)
            refused.append(str(caught.value))

    prepare("pieces", source, out, say=meanwhile)
    (message,) = refused
    assert message.startswith(f"{out} is being prepared by process {os.getpid()} on ")
    assert "\nhint: wait until it ends" in message
    assert len(rows(out, "pretrain")) == 5


def test_text_joins_a_parquet_file_and_the_other_columns_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(files: Sequence[Path], folder: Path, options: Any, seed: int, say: Any) -> dict[str, Any]:
        table = pyarrow.table({"text": ["a", "b"], "author": [1, 2]})
        parquet.write_table(table, folder / "pretrain.parquet")
        return {"read": 2, "kept": 2, "dropped": {}}

    kind = Kind("table", "", Source(""), "", NoOptions, lambda path: [path], write)
    monkeypatch.setitem(KINDS, kind.name, kind)
    (tmp_path / "in.txt").write_text("c")
    manifest = prepare("table", tmp_path / "in.txt", tmp_path / "out", text=tmp_path / "in.txt")
    assert parquet.read_table(tmp_path / "out" / "pretrain.parquet").to_pydict() == {
        "text": ["a", "b", "c"],
        "author": [1, 2, None],
    }
    assert manifest["outputs"]["pretrain.parquet"]["rows"] == 3


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    path = many_hh(tmp_path / "hh.jsonl.gz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(DataError, match=r"holds other files: 'thesis\.tex'"):
        prepare("hh-rlhf", path, tmp_path / "mine")
    with pytest.raises(DataError, match="is a file"):
        prepare("hh-rlhf", path, path)
    assert contents(tmp_path / "mine") == {"thesis.tex": b"years"}


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = many_hh(tmp_path / "hh.jsonl.gz")
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"unknown kind of data 'hh'\nhint: known are hh-rlhf"):
        prepare("hh", path, out)
    with pytest.raises(ConfigError, match=r"no option 'heldouts'\nhint: did you mean heldout\?"):
        prepare("hh-rlhf", path, out, heldouts=0.1)
    with pytest.raises(ConfigError, match=r"heldout: .* less than or equal to 1, got 1\.5"):
        prepare("hh-rlhf", path, out, heldout=1.5)
    with pytest.raises(ConfigError, match=r"heldout: .* valid number.*, got 'half'"):
        prepare("hh-rlhf", path, out, heldout="half")
    with pytest.raises(ConfigError, match=r"sft: .*'all' or 'accepted_or_best', got 'best'"):
        prepare("stack-exchange", path, out, sft="best")
    with pytest.raises(ConfigError, match="max_pairs must be at least 1, got 0"):
        prepare("stack-exchange", path, out, max_pairs=0)
    for kind in ("hh-rlhf", "stack-exchange"):
        with pytest.raises(DataError, match="does not exist"):
            prepare(kind, tmp_path / "nowhere", out)
    with pytest.raises(DataError, match="does not exist"):
        prepare("hh-rlhf", path, out, text=tmp_path / "nowhere")
    write_jsonl(tmp_path / "no.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"1 read, dropped \{'no turn markers': 1\}\nhint: is this"):
        prepare("hh-rlhf", tmp_path / "no.jsonl", out)
    assert not out.exists()
