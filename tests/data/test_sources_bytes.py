import bz2
import gzip
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from fairlead.data.sources import decode, read_rows
from fairlead.errors import DataError


def rows_of(path: Path, notes: Counter[str] | None = None) -> list[dict[str, Any]]:
    return [row.data for row in read_rows(path, notes)]


def texts_of(path: Path, notes: Counter[str] | None = None) -> list[str]:
    return [row["text"] for row in rows_of(path, notes)]


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


# --- compression ---------------------------------------------------------------------------------------------------

PACKERS = [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
LINES = b"".join(b'{"a": %d}\n' % number for number in range(200))


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_compression_is_told_by_content(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    wanted = [{"a": number} for number in range(200)]
    assert rows_of(saved(tmp_path / f"a.jsonl.{suffix}", pack(LINES))) == wanted
    assert rows_of(saved(tmp_path / "b.jsonl", pack(LINES))) == wanted
    assert rows_of(saved(tmp_path / f"c.jsonl.{suffix}", LINES)) == wanted
    two_parts = pack(LINES[:700]) + pack(LINES[700:])
    assert rows_of(saved(tmp_path / f"d.jsonl.{suffix}", two_parts)) == wanted


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_every_cut_of_a_compressed_file_is_an_error_that_names_it(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    whole = pack(LINES)
    path = tmp_path / f"a.jsonl.{suffix}"
    for length in range(6, len(whole), 7):
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} is cut off or damaged"):
            rows_of(saved(path, whole[:length]))


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_a_damaged_compressed_file_is_an_error(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    whole = bytearray(pack(LINES))
    whole[len(whole) // 4 : -len(whole) // 4] = b"\xff" * len(whole[len(whole) // 4 : -len(whole) // 4])
    with pytest.raises(DataError):
        rows_of(saved(tmp_path / f"a.jsonl.{suffix}", bytes(whole)))


def test_a_gzip_file_with_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(LINES))
    whole[-8] ^= 1
    with pytest.raises(DataError, match="is cut off or damaged"):
        rows_of(saved(tmp_path / "a.jsonl.gz", bytes(whole)))


# --- encodings of text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "lines", "notes"),
    [
        ("café\nnaïve\n".encode(), ["café", "naïve"], {}),
        ("café\n".encode("utf-8-sig"), ["café"], {}),
        ("café\r\n\u4f60\n".encode("utf-16"), ["café", "\u4f60"], {}),
        (b"\xfe\xff" + "caf\u0a0a\n\u4f60".encode("utf-16-be"), ["caf\u0a0a", "\u4f60"], {}),
        (b"caf\xe9 \x93so\x94\nplain", ["café \u201cso\u201d", "plain"], {"lines decoded as cp1252": 1}),
        (b"caf\xe9 \x81\n", ["café \x81"], {"lines decoded as latin-1": 1}),
        (b"caf\xc3\xa9\ncaf\xe9\n", ["café", "café"], {"lines decoded as cp1252": 1}),
        (b"a\0b\0\nc\n\0\n", ["ab", "c"], {"NUL characters dropped": 3}),
        ("x\u0085y\rz\u2028\r\n\f\n".encode(), ["x\u0085y\rz\u2028", "\f"], {}),
    ],
)
def test_text_of_any_encoding_is_read_line_by_line(
    tmp_path: Path, data: bytes, lines: list[str], notes: dict[str, int]
) -> None:
    counted = Counter[str]()
    assert texts_of(saved(tmp_path / "a.txt", data), counted) == lines
    assert counted == notes


def test_a_whole_text_of_mixed_encodings_is_decoded_line_by_line() -> None:
    assert decode("café\n".encode() + b"caf\xe9\r\n\n\x93so\x94") == ("café\ncafé\r\n\n\u201cso\u201d", "cp1252")
    assert decode(b"\x93so\x94\n\x81") == ("\u201cso\u201d\n\x81", "latin-1")


def test_places_of_text_count_blank_lines(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.txt", b"\n \r\nx\n\ny")
    assert [(row.data["text"], row.place) for row in read_rows(path)] == [("x", f"{path}:3"), ("y", f"{path}:5")]


def test_utf16_that_is_cut_inside_a_character_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is marked as UTF-16 and is not, or is cut off"):
        texts_of(saved(tmp_path / "a.txt", "ab\n".encode("utf-16")[:-1]))


def test_text_streams(tmp_path: Path) -> None:
    rows = read_rows(saved(tmp_path / "a.txt.gz", gzip.compress(b"word\n" * 1_000_000)[:-1000]))
    assert next(rows).data == {"text": "word"}
    with pytest.raises(DataError, match="cut off"):
        list(rows)
