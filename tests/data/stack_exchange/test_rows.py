"""Rows of a table, compared with what ElementTree and lxml read."""

from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.data.sources import Counts
from fairlead.data.stack_exchange.dump import Stretch, stretches
from fairlead.data.stack_exchange.rows import read_table
from fairlead.errors import DataError


def read(path: Path, on_error: str = "stop", size: int = 1 << 30) -> tuple[list[dict[str, str]], Counts]:
    counts = Counts()
    rows = [
        row
        for stretch in stretches(path, size)
        for row in read_table(stretch, "posts", counts, on_error)  # type: ignore[arg-type]
    ]
    assert counts.read == len(rows) + counts.dropped.total()
    return rows, counts


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "Posts.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = '<row Id="1" Body="a" />\n<row Id="2" Body="b" />\n<row Id="3" Body="c" />\n'

characters = st.characters(codec="utf-8", exclude_characters="\ufffe\uffff", exclude_categories=["Cc", "Cs"])
values = st.lists(st.one_of(characters, st.sampled_from([*"&<>\"'\n\r\t;", "&amp;", "&#xA;", "$"])), max_size=12).map(
    "".join
)
tables = st.lists(st.dictionaries(st.sampled_from(["Id", "Body", "Title", "Tags"]), values, min_size=1), max_size=6)


@settings(deadline=None)
@given(tables, st.integers(1, 400), st.sampled_from(["\n", "\r\n", "", "\n\t "]), st.sampled_from([" ", "\n"]))
def test_rows_are_those_that_elementtree_reads_wherever_the_file_is_cut(
    table: list[dict[str, str]], size: int, end: str, between: str
) -> None:
    lines = (between.join(f"{name}={quoteattr(value)}" for name, value in row.items()) for row in table)
    text = "<posts>" + end + "".join(f"<row {line} />{end}" for line in lines) + "</posts>" + end
    with TemporaryDirectory() as folder:
        path = written(Path(folder), "\ufeff" + text)
        rows, counts = read(path, size=size)
    assert rows == [row.attrib for row in ElementTree.fromstring(text)] == table
    assert counts.as_dict() == {"read": len(table), "kept": 0, "dropped": {}, "notes": {}}


@pytest.mark.parametrize(
    "row",
    [
        "<row Id='1' Body='it&apos;s \"a\" > b'/>",
        '<row  Id = "1"\n\tBody="x &#65;&#x42; &#xA;y">\n</row>',
        '<row Id="1" Body="a\nb\tc"></row>',
        '<row Id="1" Body="é&#x1F600;" /> <!-- <b> --> <row Id="2"/><row\nId="3"/>',
    ],
)
def test_other_spellings_of_xml_are_read_too(tmp_path: Path, row: str) -> None:
    text = f"<?xml version='1.0'?><!-- a dump --><posts>{row}</posts>"
    assert read(written(tmp_path, text))[0] == [row.attrib for row in ElementTree.fromstring(text)]


def test_characters_that_xml_forbids_are_removed_and_noted(tmp_path: Path) -> None:
    path = written(tmp_path, f'<posts>{ROWS}<row Id="4" Body="a\0b&#x1F;c&#0;d&#xD800;\x07" /></posts>')
    rows, counts = read(path)
    assert rows[-1] == {"Id": "4", "Body": "abcd"}
    assert counts.notes == {"row with characters that XML forbids, which were removed": 1}


def test_a_table_may_be_empty(tmp_path: Path) -> None:
    for text in ("<posts></posts>", "<posts />\n", "\ufeff<?xml version='1.0'?>\r\n<posts>\r\n</posts>\r\n"):
        assert read(written(tmp_path, text))[0] == []


BROKEN = [
    '<row Id="4" Body="a < b" />',
    '<row Id="4" Body="cut of',
    '<row Id="4" Body="x" Body="y" />',
    '<row Id="4" Body="&nbsp;" />',
    '<row Id="4" Body="&#xZZ;" />',
    '<row Id="4" />\ngarbage </b>',  # the row itself is whole
    "<row Id=4 />",
    b'<row Id="4" Body="\xff" />'.decode("latin-1"),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_xml_in_the_middle_stops_with_its_line_or_is_skipped(tmp_path: Path, broken: str) -> None:
    data = f"<posts>\n{ROWS}".encode() + broken.encode("latin-1") + f"\n{ROWS}</posts>".encode()
    path = written(tmp_path, data)
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring(data)
    with pytest.raises(DataError, match=r"Posts\.xml:[56]: not the XML of a data dump: .*\nhint: .*on_error=skip"):
        read(path)
    for size in (1 << 30, 40):
        rows, counts = read(path, "skip", size)
        assert [row["Id"] for row in rows] == ["1", "2", "3", *["4"] * ("garbage" in broken), "1", "2", "3"]
        assert counts.dropped == {"broken XML": 1}
        assert counts.notes == {f"broken XML in {tmp_path.name}/Posts.xml": 1}


def test_a_file_that_is_cut_off_is_an_error_or_read_to_its_last_whole_row(tmp_path: Path) -> None:
    whole = f"<posts>\n{ROWS}</posts>".encode()
    for length in range(len(whole) - 1):
        path = written(tmp_path, whole[:length])
        with pytest.raises(DataError, match=r"Posts\.xml:\d: not the XML of a data dump"):
            read(path)
        if b"<row " in whole[:length]:
            rows, counts = read(path, "skip")
            assert len(rows) == whole[:length].count(b"/>")
            assert counts.notes[f"{tmp_path.name}/Posts.xml is cut off"] == 1


@pytest.mark.parametrize("text", ["", "{}", "<html><row /></html>", "<postlinks></postlinks>", "\x1f\x8b"])
def test_what_is_no_table_of_posts_is_an_error_even_when_broken_xml_is_skipped(tmp_path: Path, text: str) -> None:
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match="it does not begin with <posts>"):
            read(written(tmp_path, text), on_error)


def test_stretches_tile_the_file_and_begin_with_rows(tmp_path: Path) -> None:
    path = written(tmp_path, f"<posts>\n{ROWS * 50}</posts>")
    data = path.read_bytes()
    for size in (1, 7, 100, 1000, 10**6):
        found = stretches(path, size)
        assert [s.start for s in found] == [0, *(s.end for s in found[:-1])]
        assert found[-1] == Stretch(path, found[-1].start, len(data), True)
        assert all(data[s.start :].startswith(b"<row ") for s in found[1:])
        assert len(found) <= max(1, len(data) // size + 1)
