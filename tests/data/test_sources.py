import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead.data.sources import read_rows, write_jsonl
from fairlead.errors import DataError


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row.data for row in read_rows(path)]


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return str(caught.value)


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_json_lines_carry_their_file_and_line(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", b'{"a": 1}\n\n  \r\n{"a": 2}')
    assert [(row.data, row.place) for row in read_rows(path)] == [
        ({"a": 1}, f"{path}:1"),
        ({"a": 2}, f"{path}:4"),
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_no_data(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n')
    assert rows_of(path) == [{"a": "x"}, {"a": "y"}]
    assert rows_of(saved(tmp_path / "b.json", b'\xef\xbb\xbf[{"a": "x"}]\r\n')) == [{"a": "x"}]


def test_unicode_line_separators_inside_a_string_end_no_row(tmp_path: Path) -> None:
    text = "one\u0085two\u2028three\u2029four\u000b\u000c\u001c"
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, [{"a": text}]) == 1
    assert rows_of(path) == [{"a": text}]
    assert rows_of(saved(tmp_path / "a.txt", "x\u0085\ry\r\nz\u2028\n".encode())) == [
        {"text": "x\u0085\ry"},
        {"text": "z\u2028"},
    ]


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    data = gzip.compress(b'{"a": 1}\n')
    assert rows_of(saved(tmp_path / "a.jsonl.gz", data)) == [{"a": 1}]
    assert rows_of(saved(tmp_path / "b.jsonl", data)) == [{"a": 1}]
    assert rows_of(saved(tmp_path / "c.jsonl.gz", b'{"a": 1}\n')) == [{"a": 1}]


def test_a_json_file_holds_an_array_an_object_or_lines(tmp_path: Path) -> None:
    array = saved(tmp_path / "array.json", b'[\n  {"a": [1,\n 2]},\n\n  {"b": "],"}, {"c": {}}\n]\n')
    assert [(row.data, row.place) for row in read_rows(array)] == [
        ({"a": [1, 2]}, f"{array}:2"),
        ({"b": "],"}, f"{array}:5"),
        ({"c": {}}, f"{array}:5"),
    ]
    whole = saved(tmp_path / "object.json", b'\n{"type": "text_only",\n "instances": []}')
    assert [(row.data, row.place) for row in read_rows(whole)] == [
        ({"type": "text_only", "instances": []}, f"{whole}:2")
    ]
    assert rows_of(saved(tmp_path / "lines.json", b'{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    rows = read_rows(saved(tmp_path / "a.jsonl", b'{"a": 1}\nbroken'))
    assert next(rows).data == {"a": 1}
    with pytest.raises(DataError):
        next(rows)


def test_a_missing_file_is_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    saved(tmp_path / "train.jsonl", b"{}")
    with pytest.raises(DataError, match=r"tran\.jsonl does not exist\nhint: .*train\.jsonl"):
        read_rows(tmp_path / "tran.jsonl")


def test_a_folder_names_what_it_holds(tmp_path: Path) -> None:
    saved(tmp_path / "train.jsonl", b"{}")
    with pytest.raises(DataError, match=r"is a folder where a file was expected\n.*train\.jsonl"):
        read_rows(tmp_path)


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no known format.*\.jsonl"):
        read_rows(saved(tmp_path / "a.csv", b"a,b"))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    assert "holds no rows" in error_of(saved(tmp_path / name, data))


@pytest.mark.parametrize(
    ("name", "data", "place"),
    [
        ("a.jsonl", b'{"a": "ok"}\n{"a": "caf\xe9"}\n', ":2: byte 0xe9 at offset 22 "),
        ("a.json", b'[{"a": "ok"},\n {"a": "caf\xe9"}]\n', ":2: byte 0xe9 at offset 25 "),
        ("a.txt", b"\xef\xbb\xbfok\ncaf\xe9\n", ":2: byte 0xe9 at offset 9 "),
    ],
)
def test_bytes_that_are_not_utf8_are_located(tmp_path: Path, name: str, data: bytes, place: str) -> None:
    message = error_of(saved(tmp_path / name, data))
    assert place in message
    assert "iconv -f WINDOWS-1252" in message


def test_utf16_is_recognised(tmp_path: Path) -> None:
    message = error_of(saved(tmp_path / "a.jsonl", '{"a": 1}\n'.encode("utf-16")))
    assert ":1: byte 0xff at offset 0 " in message
    assert "iconv -f UTF-16" in message


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', 2),
        ("a.jsonl", b"{'a': 1}\n", 1),
        ("a.json", b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', 2),
        ("a.json", b'[{"a": 1},\n {"a": 2}', 2),
        ("a.json", b'[{"a": 1},\n {"a":\n tru}]', 3),
        ("a.json", b'{"a":\n 1', 2),
        ("a.json", b"\n\nnonsense", 3),
    ],
)
def test_malformed_json_is_located(tmp_path: Path, name: str, data: bytes, line: int) -> None:
    path = saved(tmp_path / name, data)
    assert error_of(path).startswith(f"{path}:{line}: ")


def test_text_after_an_array_is_an_error(tmp_path: Path) -> None:
    assert "after the end" in error_of(saved(tmp_path / "a.json", b'[{"a": 1}]\n[{"a": 2}]'))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"a": 1}\n["x"]\n'),
        ("a.json", b'[{"a": 1},\n["x"]]'),
    ],
)
def test_a_row_that_is_no_object_says_what_it_is(tmp_path: Path, name: str, data: bytes) -> None:
    path = saved(tmp_path / name, data)
    assert error_of(path).startswith(f"{path}:2: expected a JSON object, got list '[\"x\"]'")


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", rb'{"a": "\ud83d\ude00", "b": "\\ud83d"}')
    assert rows_of(path) == [{"a": "😀", "b": "\\ud83d"}]


def test_half_a_surrogate_pair_is_located(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": ["x\\uD83D y"]}\n')
    assert error_of(path).startswith(f"{path}:2: half a surrogate pair, '\\ud83d'")


def test_every_cut_of_a_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(200)))
    for length in range(3, len(whole), 7):
        path = saved(tmp_path / "a.jsonl.gz", whole[:length])
        assert "is cut off or damaged" in error_of(path)


def test_a_damaged_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b'{"a": 1}\n' * 50))
    whole[-8] ^= 1  # the checksum
    assert "is cut off or damaged" in error_of(saved(tmp_path / "a.jsonl.gz", bytes(whole)))


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
