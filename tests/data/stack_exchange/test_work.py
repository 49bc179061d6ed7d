"""Large dumps, archives, kills: how the work is done changes nothing of what comes out."""

import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import py7zr
import pytest
from tests.data.stack_exchange.dumps import (
    contents,
    dump,
    duplicates,
    many,
    prepared,
    rows,
    thread,
)

from fairlead.data.stack_exchange import StackExchangeOptions, posts_files, processes, run
from fairlead.errors import ConfigError, DataError


def test_bytes_and_counts_do_not_depend_on_processes_or_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None
) -> None:
    monkeypatch.setattr(run, "ALONE_BYTES", 0)
    folder = many(tmp_path / "one" / "site", 12)
    counts = prepared(folder, tmp_path / "out-1", workers=1)
    (tmp_path / "two").mkdir()
    folder.rename(tmp_path / "two" / "site")
    assert prepared(tmp_path / "two" / "site", tmp_path / "out-3", workers=3) == counts
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-3")


def test_rows_do_not_depend_on_the_size_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found = many(tmp_path / "site", 20), []
    for size in (10**6, 2000, 900):
        monkeypatch.setattr(run, "PART_BYTES", (size, size))
        counts, out = prepared(folder, tmp_path / str(size)), tmp_path / str(size)
        found.append((counts, {p.name: sorted(map(str, rows(out, p.stem))) for p in out.iterdir()}))
    assert found[0] == found[1] == found[2]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from fairlead.data.stack_exchange import processes, run
    from tests.data.stack_exchange.dumps import prepared
    done, call = 0, processes._run
    def kill_at(what):
        global done
        if done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        call(what)
        done += 1
    processes._run, run.PART_BYTES = kill_at, (700, 700)
    prepared(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("finished", [0, 3, 12, 22, 30])
def test_a_killed_preparation_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None, finished: int
) -> None:
    folder, calls, call = many(tmp_path / "site", 20), Counter[str](), processes._run
    duplicates(folder, (4, 10))

    def counted(what: processes.Call) -> None:
        calls[what[0].__name__] += 1
        call(what)

    monkeypatch.setattr(processes, "_run", counted)
    counts = prepared(folder, tmp_path / "whole")
    total = calls.total()
    assert total > 30 and len(calls) == 6
    calls.clear()

    code = textwrap.dedent(KILLED)
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out"), str(finished)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert prepared(folder, tmp_path / "out") == counts
    assert calls.total() == total - finished
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_another_plan_left_is_not_used(tmp_path: Path) -> None:
    folder = many(tmp_path / "site", 4)
    code = textwrap.dedent(KILLED)
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "out"), "5"], check=False)
    assert (tmp_path / "out" / ".work").exists()
    many(folder, 5)
    counts = prepared(folder, tmp_path / "out", seed=3)
    assert counts == prepared(folder, tmp_path / "other", seed=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_a_process_that_is_killed_is_an_error_not_a_hang(tmp_path: Path) -> None:
    calls = [(_killed, tmp_path / str(number)) for number in range(3)]
    with (
        pytest.raises(DataError, match="a process was killed while reading\nhint: was memory short"),
        processes.processes(2, tmp_path) as run_pass,
    ):
        run_pass("reading", calls)


def _killed(target: Path) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_an_error_in_a_process_is_that_of_the_first_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_small_parts: None
) -> None:
    monkeypatch.setattr(run, "ALONE_BYTES", 0)
    path = many(tmp_path / "site", 12) / "Posts.xml"
    path.write_bytes(path.read_bytes().replace(b'Title="T7"', b'Title="<"').replace(b'Title="T31"', b'Title="<"'))
    with pytest.raises(DataError, match=r"Posts\.xml:9: not the XML of a data dump: Unescaped '<'"):
        prepared(path.parent, tmp_path / "out", workers=2)
    counts = prepared(path.parent, tmp_path / "out", workers=2, on_error="skip")
    assert counts["dropped"] == {"answer without its question": 4, "broken XML": 2}
    assert counts["notes"]["broken XML in site/Posts.xml"] == 2


@pytest.mark.parametrize("names", [("site.7z",), ("site-Posts.7z", "site-PostLinks.7z", "site-Votes.7z")])
def test_archives_are_unpacked_in_the_work_folder(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = many(tmp_path / "plain" / "site")
    duplicates(folder, (4, 10), (7, 13), (16, 19), (22, 25))
    counts = prepared(folder, tmp_path / "expected")
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in names:
        with py7zr.SevenZipFile(packed / name, "w") as archive:
            for file in folder.iterdir():
                if len(names) == 1 or file.stem in name:
                    archive.write(file, file.name)
    assert [file.name for file in posts_files(packed)] == sorted(set(names) - {"site-Votes.7z"})
    assert prepared(packed, tmp_path / "out") == counts
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    if len(names) == 1:
        assert prepared(packed / "site.7z", tmp_path / "again") == counts


def test_archives_that_do_not_serve_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "site.7z"
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.write(dump(tmp_path / "site", *thread(1, 0, 1)) / "Posts.xml", "Other.xml")
    with pytest.raises(DataError, match=r"site\.7z holds no Posts\.xml"):
        prepared(path, tmp_path / "out")
    whole = path.read_bytes()
    for data in (b"", b"no archive", whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"site\.7z is cut off, damaged, or no 7z archive"):
            prepared(path, tmp_path / "out2")
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(DataError, match=r"py7zr is not installed\nhint: pip install 'fairlead\[data\]'"):
        prepared(path, tmp_path / "out3")


def test_a_folder_without_posts_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no Posts\.xml, and no \.7z of a dump"):
        posts_files(tmp_path)
    duplicates(tmp_path / "site", (1, 2))
    with pytest.raises(DataError, match=r"holds no Posts\.xml, and no \.7z of a dump"):
        posts_files(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        posts_files(tmp_path / "nowhere")


def test_options_that_do_not_serve_are_refused() -> None:
    for options in ({"sft": "best"}, {"on_error": "ignore"}, {"max_pairs": 0}, {"finetune": 0.5}, {"rl": -0.15}):
        with pytest.raises(ConfigError):
            StackExchangeOptions(**options)  # type: ignore[arg-type]


def test_nothing_heavy_is_imported_before_the_work_begins() -> None:
    code = (
        "import sys, fairlead.data.stack_exchange; print(*({'numpy', 'pyarrow', 'lxml', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
