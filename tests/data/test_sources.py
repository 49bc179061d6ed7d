from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fairlead.data.sources import read_rows, read_source, write_jsonl
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


def test_a_json_file_holds_an_array_an_object_or_lines(tmp_path: Path) -> None:
    array = saved(tmp_path / "array.json", b'[\n  {"a": [1,\n 2]},\n\n  {"b": "],"}, {"c": {}}\n]\n')
    assert [(row.data, row.place) for row in read_rows(array)] == [
        ({"a": [1, 2]}, f"{array}:2"),
        ({"b": "],"}, f"{array}:5"),
        ({"c": {}}, f"{array}:5"),
    ]
    whole = saved(tmp_path / "object.json", b'\n{"type": "x",\n "instances": {}}')
    assert [(row.data, row.place) for row in read_rows(whole)] == [({"type": "x", "instances": {}}, f"{whole}:2")]
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
        read_rows(saved(tmp_path / "a.xls", b"a,b"))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    assert "holds no rows" in error_of(saved(tmp_path / name, data))


@pytest.mark.parametrize(
    ("name", "data", "place"),
    [
        ("a.jsonl", b'{"a": "ok"}\n{"a": "caf\xe9"}\n', ":2: byte 0xe9 at offset 22 "),
        ("a.json", b'[{"a": "ok"},\n {"a": "caf\xe9"}]\n', ":2: byte 0xe9 at offset 25 "),
        ("a.ndjson", b'\xef\xbb\xbf{"a": "ok"}\n{"a": "caf\xe9"}\n', ":2: byte 0xe9 at offset 25 "),
    ],
)
def test_json_that_is_not_utf8_is_located(tmp_path: Path, name: str, data: bytes, place: str) -> None:
    message = error_of(saved(tmp_path / name, data))
    assert place in message
    assert "iconv -f WINDOWS-1252" in message


def test_utf16_json_says_how_to_convert_it(tmp_path: Path) -> None:
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


# --- LMFlow --------------------------------------------------------------------------------------------------------


def test_an_object_of_instances_is_a_row_an_instance_with_the_files_type(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", b'{"type": "text2text",\n "instances": [{"input": "a"}, {"input": "b"}]}')
    assert [(row.data, row.kind, row.place) for row in read_rows(path)] == [
        ({"input": "a"}, "text2text", f"{path}:1 instance 1"),
        ({"input": "b"}, "text2text", f"{path}:1 instance 2"),
    ]
    one_line = saved(tmp_path / "b.json", b'{"instances": [{"text": "c"}], "type": "text_only"}\n')
    assert [(row.data, row.kind) for row in read_rows(one_line)] == [({"text": "c"}, "text_only")]
    assert [row.kind for row in read_rows(saved(tmp_path / "c.jsonl", b'{"type": "x"}'))] == [None]


def test_an_object_without_instances_holds_no_rows(tmp_path: Path) -> None:
    assert "holds no rows" in error_of(saved(tmp_path / "a.json", b'{"type": "text_only", "instances": []}'))


def test_an_instance_that_is_no_object_is_located(tmp_path: Path) -> None:
    message = error_of(saved(tmp_path / "a.json", b'{"type": "text_only", "instances": [{}, "b"]}'))
    assert ":1 instance 2: expected a JSON object, got str 'b'" in message


def test_a_folder_of_instances_reads_as_all_of_them_sorted(tmp_path: Path) -> None:
    for name in ("b", "a"):
        saved(
            tmp_path / f"{name}.json", b'{"type": "%s", "instances": [{"text": "%s"}]}' % (b"t" + name.encode(), b"x")
        )
    assert [row.kind for row in read_source(str(tmp_path))] == ["ta", "tb"]


# --- dirt ----------------------------------------------------------------------------------------------------------


def test_nul_characters_in_json_are_kept_and_noted(tmp_path: Path) -> None:
    notes = Counter[str]()
    path = saved(tmp_path / "a.jsonl", b'{"a": "x\\u0000y"}\n{"a": "x\0y"}\n{"a": "\\\\u0000"}\n')
    assert [row.data["a"] for row in read_rows(path, notes)] == ["x\0y", "x\0y", "\\u0000"]
    assert notes == {"rows with NUL characters, kept": 2, "rows with raw control characters in JSON strings, kept": 1}


def test_raw_control_characters_in_json_are_kept_and_noted(tmp_path: Path) -> None:
    notes = Counter[str]()
    path = saved(tmp_path / "a.json", b'[{"a": "x\ty"},\n {"a": "x\ny"}]')
    assert [row.data["a"] for row in read_rows(path, notes)] == ["x\ty", "x\ny"]
    assert notes == {"rows with raw control characters in JSON strings, kept": 2}


def test_a_block_of_nul_bytes_is_no_row(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", b'{"a": 1}\n' + bytes(64) + b"\n")
    assert error_of(path).startswith(f"{path}:2: not JSON")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_a_row_of_ten_megabytes_is_read(tmp_path: Path, name: str) -> None:
    text = "ab c" * 2_500_000
    data = {"a.txt": text, "a.csv": f'"text"\n"{text}"', "a.json": f'[{{"text": "{text}"}}]'}
    path = saved(tmp_path / name, data.get(name, f'{{"text": "{text}"}}\n').encode())
    (row,) = rows_of(path)
    assert row == {"text": text}


def test_an_array_in_a_file_named_as_lines_is_an_array(tmp_path: Path) -> None:
    assert rows_of(saved(tmp_path / "a.jsonl", b'[\n {"a": 1},\n {"a": 2}\n]')) == [{"a": 1}, {"a": 2}]


def test_json_is_told_by_content_where_the_name_says_nothing(tmp_path: Path) -> None:
    assert rows_of(saved(tmp_path / "part-00000", b'{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert rows_of(saved(tmp_path / "a.JSON", b'{"a":\n 1}')) == [{"a": 1}]
    assert rows_of(saved(tmp_path / "object", b'{\n "a": 1\n}')) == [{"a": 1}]
    assert rows_of(saved(tmp_path / "data.v1", b'\xef\xbb\xbf [{"a": 1}]')) == [{"a": 1}]
