import csv
import gzip
import io
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead.data.sources import read_rows
from fairlead.errors import DataError

ROWS = [
    {"prompt": "say \u201chi\u201d", "messages": [{"role": "user", "content": "x\u0085\u2028y\0"}], "score": 1.5},
    {"prompt": "", "messages": [], "score": None},
]


def rows_of(path: Path, notes: Counter[str] | None = None) -> list[dict[str, Any]]:
    return [row.data for row in read_rows(path, notes)]


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return str(caught.value)


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- CSV -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
def test_the_delimiter_is_recognised_and_may_stand_in_quotes(tmp_path: Path, mark: str) -> None:
    lines = ["prompt|response", '"a|b"|c', "", '"say ""hi""\n\nthere"|" d "', "|e"]
    path = saved(tmp_path / "a.csv", "\r\n".join(lines).replace("|", mark).encode())
    assert [(row.data, row.place) for row in read_rows(path)] == [
        ({"prompt": f"a{mark}b", "response": "c"}, f"{path}:2"),
        ({"prompt": 'say "hi"\n\nthere', "response": " d "}, f"{path}:4"),
        ({"prompt": "", "response": "e"}, f"{path}:7"),
    ]


def test_places_count_the_blank_lines_before_the_columns(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tsv", b"\n\na\tb\n1\t2\n")
    assert [(row.data, row.place) for row in read_rows(path)] == [({"a": "1", "b": "2"}, f"{path}:4")]


def test_a_table_of_one_column_is_read(tmp_path: Path) -> None:
    assert rows_of(saved(tmp_path / "a.csv", b'text\n"a, b"\nc;d\n')) == [{"text": "a, b"}, {"text": "c;d"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_csv_of_any_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    path = saved(tmp_path / "a.csv", "text,naïve\ncafé,\u201cso\u201d\n".encode(encoding))
    assert rows_of(path) == [{"text": "café", "naïve": "\u201cso\u201d"}]


def test_nul_characters_in_csv_are_dropped_and_noted(tmp_path: Path) -> None:
    notes = Counter[str]()
    assert rows_of(saved(tmp_path / "a.csv", b"a,b\nx\0y,z\n"), notes) == [{"a": "xy", "b": "z"}]
    assert notes == {"NUL characters dropped": 1}


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_table_written_by_pandas_is_read(tmp_path: Path, separator: str) -> None:
    frame = pandas.DataFrame({"text": ['a "quote"', "two\nlines", "a,b\tc", ""], "label": [0, 1, 1, 0]})
    frame.to_csv(tmp_path / "a.csv", sep=separator)
    assert rows_of(tmp_path / "a.csv") == [
        {"column 1": str(index), "text": text, "label": str(label)}
        for index, text, label in frame.itertuples(name=None)
    ]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=4), st.sampled_from(",\t;|"))
def test_whatever_is_quoted_as_it_should_be_is_read(
    tmp_path: Path, table: list[tuple[str, str]], delimiter: str
) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *table])
    path = saved(tmp_path / "a.csv", buffer.getvalue().encode())
    assert rows_of(path) == [{"a": first, "b": second} for first, second in table]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"a,b\n1,2\n3,4,5\n",
            ":3: 3 values for 2 columns: ['3', '4', '5']\nhint: the columns are ['a', 'b'], parted by",
        ),
        (b'a,b\n"x\ny",1\n3\n', ":4: 1 values for 2 columns"),
        (b'a,b\n1,2\n"3,4\n5,6\n', ":3: not CSV: unexpected end of data\nhint: "),
        (b'a,b\n"3"x,4\n', ":2: not CSV: ',' expected after '\"'"),
        (b"\r\x01", ":1: not CSV: new-line character seen in unquoted field"),
        (b"a,b\n1\r2,3\n", ":2: not CSV: new-line character seen in unquoted field"),
        (b"a,b,a\n1,2,3\n", ": two columns are named 'a'"),
    ],
)
def test_a_table_that_cannot_be_understood_is_located(tmp_path: Path, data: bytes, message: str) -> None:
    path = saved(tmp_path / "a.csv", data)
    assert error_of(path).startswith(f"{path}{message}")


@pytest.mark.parametrize("data", [b"", b"\n", b"a,b\n", b"a,b\r\n\r\n"])
def test_a_table_without_rows_is_an_error(tmp_path: Path, data: bytes) -> None:
    assert "holds no rows" in error_of(saved(tmp_path / "a.csv", data))


# --- parquet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_parquet_is_read_group_by_group(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist(ROWS * 3)
    pyarrow.parquet.write_table(table, path, compression=compression, row_group_size=2)
    assert [(row.data, row.place) for row in read_rows(path)] == [
        (row, f"{path}:row {number}") for number, row in enumerate(ROWS * 3, start=1)
    ]


def test_parquet_is_told_by_content_and_read_out_of_gzip(tmp_path: Path) -> None:
    pandas.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "table")
    assert rows_of(tmp_path / "table") == [{"text": "a"}, {"text": "b"}]
    packed = saved(tmp_path / "a.parquet.gz", gzip.compress((tmp_path / "table").read_bytes()))
    assert rows_of(packed) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_every_cut_of_a_binary_table_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    table = pyarrow.table({"text": [f"row {number}" for number in range(50)]})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=10)
    elif suffix == "feather":
        pyarrow.feather.write_feather(table, str(path), chunksize=10)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=10)
    whole = path.read_bytes()
    assert len(rows_of(path)) == 50
    for length in range(0, len(whole), 8):
        assert f"a.{suffix}" in error_of(saved(path, whole[:length]))


def test_a_column_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert "is no parquet file, or is cut off or damaged" in error_of(path)


def test_what_is_named_parquet_and_is_not_is_an_error(tmp_path: Path) -> None:
    assert "is no parquet file" in error_of(
        saved(tmp_path / "a.parquet", b"version https://git-lfs.github.com/spec/v1")
    )


def test_a_parquet_file_without_rows_is_an_error(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert "holds no rows" in error_of(tmp_path / "a.parquet")


# --- Arrow ---------------------------------------------------------------------------------------------------------


def test_arrow_files_and_streams_are_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=1)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=1)
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
    for name in ("file.arrow", "stream.arrow", "a.feather"):
        path = tmp_path / name
        assert [(row.data, row.place) for row in read_rows(path)] == [
            (ROWS[0], f"{path}:row 1"),
            (ROWS[1], f"{path}:row 2"),
        ]


def test_the_arrow_file_of_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path))
    (path,) = tmp_path.glob("*.arrow")
    assert rows_of(path) == ROWS
