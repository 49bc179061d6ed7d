"""The table of formats, and how it is asked."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.data.convert import PLURALS
from fairlead.data.formats import FORMATS, REFUSED, Format, best_fit, recognise
from fairlead.data.records import load_records, parse_row
from fairlead.data.sources import Row
from fairlead.errors import DataError
from fairlead.types import Demonstration, Preference, Prompt, Text

DOCS = Path(__file__).parents[3] / "docs/reference/data-formats.md"


def test_every_format_stands_in_the_docs_with_its_fields() -> None:
    lines = DOCS.read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    table = {row[0].strip("`"): row for row in rows if len(row) == 4}
    assert list(table) == list(FORMATS)
    for name, format in FORMATS.items():
        fields = ", ".join(f"`{names}`" for names in format.fields).replace("|", "` or `")
        assert table[name][1:] == [fields, format.about, PLURALS[format.record]]


@pytest.mark.parametrize("kind", list(REFUSED))
def test_lmflow_types_without_text_are_refused_with_the_reason(kind: str) -> None:
    row = Row({"value": 1.5, "text": "a"}, "a.json:1 instance 1", kind)
    with pytest.raises(DataError, match=rf"a\.json:1 instance 1: LMFlow's type {kind} is not read: its rows"):
        recognise(row)


def test_among_the_formats_that_fit_the_wanted_kind_goes_first() -> None:
    row = Row({"text": "\n\nHuman: q\n\nAssistant: a", "prompt": "p"}, "x")
    names = [best_fit(row, kinds).name for kinds in ((Demonstration,), (Text,), (Prompt,), (Preference,), None)]  # type: ignore[union-attr]
    assert names == ["transcript", "text", "prompt", "transcript", "transcript"]


def test_a_description_of_files_is_no_data() -> None:
    row = Row({"a": {"file_name": "a.json"}, "b": {"hf_hub_url": "x/y", "ranking": True}}, "i.json:1")
    with pytest.raises(DataError, match=r"description of data files and no data\nhint: give one .*: a, b"):
        recognise(row)


_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "messages", "solution", "is_correct"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
_fields = sorted({name for format in FORMATS.values() for names in format.fields for name in names.split("|")})
_rows = st.dictionaries(
    st.sampled_from([*_fields, "system", "tools", "margin", "metadata", "history", "scores", "preference"]), _values
)


@given(_rows, st.sampled_from(list(PLURALS)))
def test_whatever_a_row_holds_it_is_read_dropped_or_named(row: dict[str, Any], kind: Any) -> None:
    try:
        outcomes = parse_row(Row(row, "a.jsonl:7"), kind)
    except DataError as error:
        assert str(error).startswith("a.jsonl:7: ")
    else:
        assert outcomes
        assert all(isinstance(outcome, str | kind) for outcome in outcomes)


@given(st.text(), st.text())
def test_texts_come_through_unchanged(prompt: str, response: str) -> None:
    row = {"prompt": prompt, "response": response}
    if prompt.lstrip().startswith(("Human:", "###")):
        return
    try:
        (record,), _ = load_records([row], Demonstration)
    except DataError:
        assert not response.strip()
    else:
        assert record == Demonstration(prompt, response)


def test_a_format_is_known_by_one_name() -> None:
    assert all(name == format.name for name, format in FORMATS.items())
    assert all(isinstance(format, Format) and format.about[0].islower() for format in FORMATS.values())
