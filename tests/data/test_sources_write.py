import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead.data.sources import read_rows, write_jsonl, write_parquet
from fairlead.errors import DataError


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row.data for row in read_rows(path)]


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- JSON lines ----------------------------------------------------------------------------------------------------

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, rows) == len(rows)
    assert rows_of(path) == rows
    array = saved(tmp_path / "a.json", json.dumps(rows, indent=1).encode())
    assert rows_of(array) == rows


def test_bytes_written_depend_on_the_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    assert write_jsonl(path, iter([{"b": "é\u2028", "a": 1.5}, {"c": None}])) == 2
    assert path.read_bytes() == '{"b": "é\u2028", "a": 1.5}\n{"c": null}\n'.encode()


def test_no_rows_make_an_empty_file(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "a.jsonl", []) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == b""


@pytest.mark.parametrize("value", ["\ud83d", float("nan"), {1, 2}])
def test_a_row_that_is_no_json_leaves_the_old_file(tmp_path: Path, value: object) -> None:
    path = saved(tmp_path / "a.jsonl", b"old")
    with pytest.raises(DataError, match="row 2 cannot be written"):
        write_jsonl(path, [{"a": 1}, {"a": value}])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"(?s)cannot be written: No space left.*free some space"):
        write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_rows_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def rows():
        yield {"a": 1}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "file", b"")
    with pytest.raises(DataError, match="cannot be written"):
        write_jsonl(tmp_path / "file" / "a.jsonl", [])


# --- parquet -------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "q", "turns": [{"role": "user", "content": "\u0085\u2028\0"}], "score": 1.5, "id": None},
    {"prompt": "", "turns": [], "score": None, "id": 2**40, "late": "a column the first row lacks"},
]
WHOLE = [ROWS[0] | {"late": None}, ROWS[1]]


def test_rows_written_as_parquet_are_read_by_pyarrow_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.parquet"
    assert write_parquet(path, iter(ROWS)) == 2
    assert pyarrow.parquet.read_table(path).to_pylist() == WHOLE
    assert rows_of(path) == WHOLE
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"


def test_equal_rows_give_equal_bytes_however_they_are_parted(tmp_path: Path) -> None:
    rows = [{"n": n, "text": f"row {n % 7}"} for n in range(20_000)]
    table = pyarrow.Table.from_pylist(rows)
    paths = [tmp_path / name for name in "abcd"]
    assert write_parquet(paths[0], rows) == 20_000
    assert write_parquet(paths[1], [table]) == 20_000
    assert write_parquet(paths[2], (table.slice(start, 333) for start in range(0, 20_000, 333))) == 20_000
    assert write_parquet(paths[3], iter(rows), schema=table.schema) == 20_000
    assert len({path.read_bytes() for path in paths}) == 1
    groups = pyarrow.parquet.ParquetFile(paths[0]).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [8192, 8192, 3616]


def test_no_rows_make_a_parquet_file_of_none(tmp_path: Path) -> None:
    schema = pyarrow.schema([("a", pyarrow.string())])
    assert write_parquet(tmp_path / "a.parquet", []) == 0
    assert write_parquet(tmp_path / "b.parquet", [], schema=schema) == 0
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").num_rows == 0
    assert pyarrow.parquet.read_schema(tmp_path / "b.parquet").equals(schema)


@pytest.mark.parametrize("values", [["x", ["y"]], [1, "x"], ["x", "\ud83d"], [{}, {}]])
def test_values_that_make_no_column_leave_the_old_file(tmp_path: Path, values: list[Any]) -> None:
    path = saved(tmp_path / "a.parquet", b"old")
    with pytest.raises(DataError, match="the rows cannot be written as parquet"):
        write_parquet(path, [{"a": value} for value in values])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]
    assert path.read_bytes() == b"old"


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to let a file grow beyond 10 kB: a write that fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, write: Any) -> None:
    path = saved(tmp_path / "a", b"old")
    with pytest.raises(DataError, match="a cannot be written: File too large"):
        write(path, ({"a": os.urandom(500).hex()} for _ in range(10_000)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"
