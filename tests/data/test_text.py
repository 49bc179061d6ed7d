import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.data.sources import Counts
from fairlead.data.text import decode, read_documents, split_text, strip_gutenberg, text_files
from fairlead.errors import DataError

BOOK = """The Project Gutenberg EBook of Sand, by A. Nobody

*** START OF THIS PROJECT GUTENBERG EBOOK SAND ***




Produced by Some Volunteer
and another


SAND

It was dry. *** A star.

End of the Project Gutenberg EBook of Sand, by
A. Nobody

*** END OF THIS PROJECT GUTENBERG EBOOK SAND ***

***** This file should be named 1.txt *****
*** START: FULL LICENSE ***
"""


def texts(path: Path, counts: Counts, limit: int = 4000) -> list[str]:
    return [row["text"] for row in read_documents(text_files(path), counts, max_characters=limit)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["THIS", "THE"])
def test_only_the_book_is_left_of_a_project_gutenberg_file(line_end: str, mark: str) -> None:
    book = BOOK.replace("OF THIS", f"OF {mark}").replace("\n", line_end)
    assert strip_gutenberg(book) == "SAND\n\nIt was dry. *** A star."


def test_text_that_only_speaks_of_project_gutenberg_stays() -> None:
    text = "Produced by me.\n\nEnd of the Project Gutenberg affair.\n"
    assert strip_gutenberg(text) == text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"caf\xc3\xa9", ("café", "utf-8")),
        (b"\xef\xbb\xbfcaf\xc3\xa9", ("café", "utf-8")),
        ("café".encode("utf-16"), ("café", "utf-16")),
        (b"caf\xe9 \x93so\x94", ("café “so”", "cp1252")),
        (b"caf\xe9 \x81", ("café \x81", "latin-1")),
    ],
)
def test_encodings_are_found_and_named(data: bytes, expected: tuple[str, str]) -> None:
    assert decode(data) == expected


def test_paragraphs_are_joined_while_they_fit() -> None:
    text = "aaaa\nbb\n\n\n \t\n  cc\n\ndddddd\n\neeeeeeee\n"
    assert list(split_text(text, 13)) == ["aaaa\nbb\n\n  cc", "dddddd", "eeeeeeee"]


def test_a_long_paragraph_is_cut_at_a_line_then_a_sentence_then_a_word() -> None:
    assert list(split_text("one two\nthree four", 12)) == ["one two", "three four"]
    assert list(split_text("One. Two three four", 8)) == ["One. Two", "three", "four"]
    assert list(split_text("It is. So it is", 10)) == ["It is.", "So it is"]
    assert list(split_text("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


@given(st.text(alphabet="ab. \n\t\u0085", max_size=200), st.integers(4, 40))
def test_no_document_is_too_long_or_empty_and_no_word_is_lost(text: str, limit: int) -> None:
    documents = list(split_text(text, limit))
    assert all(0 < len(document) <= limit and document.strip() for document in documents)
    assert "".join("".join(documents).split()) == "".join(text.split())


def test_a_folder_is_read_in_order_whatever_its_files_are(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\r\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "four\\r\\nfive"}\n{"text": " "}\n')
    (tmp_path / "c.txt").write_bytes(b"\xe9t\xe9\n")
    (tmp_path / "d.md").write_bytes(b"no")
    counts = Counts()
    assert texts(tmp_path, counts, limit=9) == ["four\nfive", "one", "two\nthree", "été"]
    assert counts.as_dict() == {
        "read": 4,
        "kept": 3,
        "dropped": {"empty text": 1},
        "notes": {"decoded as cp1252": 1, "decoded as utf-8": 1, "documents": 4},
    }


def test_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        text_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \.txt or \.jsonl files"):
        text_files(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": ["x"]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: text must be a string, got \['x'\]"):
        texts(tmp_path, Counts())


def test_seven_published_books_lose_their_licence() -> None:
    folder = Path(os.environ.get("FAIRLEAD_DATA", "")) / "text/gutenberg"
    if not os.environ.get("FAIRLEAD_DATA") or not folder.exists():
        pytest.skip("FAIRLEAD_DATA names no folder with text/gutenberg")
    counts = Counts()
    documents = texts(folder, counts)
    assert counts.notes["Project Gutenberg licence removed"] == 7
    assert (counts.notes["decoded as utf-8"], counts.notes["decoded as cp1252"]) == (6, 1)
    assert not any("gutenberg" in document.lower() for document in documents)
    assert not any("\r" in document for document in documents)
    assert documents[0].startswith("ALICE\u2019S ADVENTURES IN WONDERLAND\n\nLewis Carroll")
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert 0.9 < sum(len(document.encode()) for document in documents) / size < 0.97
