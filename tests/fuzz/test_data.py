"""Every reader of data on any bytes and any values: rows and records, or an error that names the place."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from pyarrow import feather, parquet

from fairlead.data.formats import FORMATS, RecordType
from fairlead.data.prepare import KINDS, prepare
from fairlead.data.records import load_records, parse_row
from fairlead.data.sources import Row, read_source
from fairlead.rollout.samples import read_samples
from tests.fuzz.hostile import bytes_near, nothing_outside, texts, told, tried, values

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
RECORDS = [get_args(each)[0] for each in get_args(RecordType)]
FIELDS = sorted({name for format in FORMATS.values() for names in format.fields for name in names.split("|")})
TURN = {"role": "user", "content": "why?", "from": "human", "value": "why?"}
LINES = b'{"prompt": "a", "response": "b"}\n{"messages": [{"role": "user", "content": "\\u00e9"}]}\n'
TABLE = pyarrow.table({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]})


def _packed(write: Any) -> bytes:
    sink = io.BytesIO()
    write(sink)
    return sink.getvalue()


def _tar(sink: io.BytesIO, *names: str) -> None:
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(LINES)
            archive.addfile(member, io.BytesIO(LINES))


def _zip(sink: io.BytesIO, *names: str) -> None:
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, LINES)


SAMPLES = {
    "jsonl": LINES,
    "json": json.dumps({"type": "text2text", "instances": [{"input": "a", "output": "b"}]}).encode(),
    "csv": b'prompt,response\n"a ""b""",c\n',
    "tsv": b"prompt\tresponse\na\tb\n",
    "txt": "a\nü\x85\n".encode(),
    "pos": b"good\n",
    "parquet": _packed(lambda sink: parquet.write_table(TABLE, sink)),
    "arrow": _packed(lambda sink: feather.write_feather(TABLE, sink, compression="uncompressed")),
    "jsonl.gz": gzip.compress(LINES, mtime=0),
    "tar": _packed(lambda sink: _tar(sink, "train.jsonl", "test.jsonl")),
    "zip": _packed(lambda sink: _zip(sink, "train.jsonl")),
}


@pytest.mark.parametrize("suffix", SAMPLES)
def test_any_bytes_are_rows_or_an_error(suffix: str, times: int, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"

    @tried(40 * times, bytes_near(SAMPLES[suffix], LINES), st.sampled_from(RECORDS))
    def holds(content: bytes, record: RecordType) -> None:
        path.write_bytes(content)
        with told(), nothing_outside(tmp_path):
            for row in read_source(str(path), notes=Counter()):
                parse_row(row, record)
        with told():
            read_samples(path)


@pytest.mark.parametrize("name", FORMATS)
def test_any_values_of_a_formats_fields_are_a_record_or_an_error(name: str, times: int) -> None:
    turns = st.lists(st.dictionaries(st.sampled_from(sorted(TURN)), texts | values, max_size=4) | values, max_size=3)
    own = [part for names in FORMATS[name].fields for part in names.split("|")]
    row = st.dictionaries(st.sampled_from(own) | st.sampled_from(FIELDS), texts | turns | values, max_size=5)

    @tried(30 * times, row, st.sampled_from(RECORDS), st.booleans())
    def holds(data: dict[str, Any], record: RecordType, is_named: bool) -> None:
        with told():
            parse_row(Row(data, "rows.jsonl:1"), record, format=name if is_named else "auto")


def test_any_rows_in_memory_are_records_or_an_error(times: int) -> None:
    rows = st.lists(st.dictionaries(st.sampled_from(FIELDS), texts | values, max_size=4) | values, max_size=3)
    columns = st.dictionaries(st.sampled_from(FIELDS) | texts, st.sampled_from(FIELDS) | texts, max_size=2)

    @tried(80 * times, rows, st.sampled_from(RECORDS), columns)
    def holds(given: list[Any], record: RecordType, named: dict[str, str]) -> None:
        assume(not any(isinstance(each, str) and Path(each).is_absolute() for each in given))  # "/" is all of a disk
        with told():
            load_records(given, record, columns=named)


# --- published sets ------------------------------------------------------------------------------------------------

HH = json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}).encode()
POSTS = (
    b'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n  <row Id="1" PostTypeId="1" Title="Why?" Body="&lt;p&gt;a" '
    b'Score="1" CreationDate="2020-01-01T00:00:00.000" />\n  <row Id="2" PostTypeId="2" ParentId="1" Body="b" '
    b'Score="3" CreationDate="2020-01-01T00:00:00.000" />\n</posts>\n'
)
PAIR = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1, "prompt": "a", "chosen": "b"}
RAW = {
    "hh-rlhf": ("test.jsonl", HH),
    "stack-exchange": ("beer.example/Posts.xml", POSTS),
    "stack-exchange-paired": ("data/rl/a.jsonl", b'{"qid": 1, "question": "a", "response_j": "b", "response_k": "c"}'),
    "ultrafeedback": ("train_prefs-0.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1}'),
    "alpaca-eval": ("annotations.json", json.dumps([PAIR]).encode()),
    "alpaca": ("alpaca_data.json", b'[{"instruction": "a", "input": "", "output": "b"}]'),
    "gsm8k": ("train.jsonl", b'{"question": "1 + 1?", "answer": "it is <<1+1=2>>2\\n#### 2"}'),
}


def test_every_kind_that_reads_rows_of_files_is_tried() -> None:
    """imdb and rt-polarity are folders of texts, of which any bytes are some; text takes any."""
    assert RAW.keys() <= {name for name, kind in KINDS.items() if kind.find is not None}
    assert {name for name, kind in KINDS.items() if kind.find is not None} - RAW.keys() <= {
        "imdb", "rt-polarity", "text", "guanaco", "lmflow",
    }  # fmt: skip


@pytest.mark.parametrize("kind", RAW)
def test_any_bytes_of_a_published_set_are_prepared_or_refused(kind: str, times: int, tmp_path: Path) -> None:
    name, sample = RAW[kind]
    path, number = tmp_path / "raw" / name, 0
    path.parent.mkdir(parents=True)

    @tried(8 * times, bytes_near(sample))
    def holds(content: bytes) -> None:
        nonlocal number
        number += 1
        path.write_bytes(content)
        with told(), nothing_outside(tmp_path):
            prepare(kind, tmp_path / "raw", tmp_path / f"out-{number}", say=lambda _: None)


# --- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside.jsonl", "/outside.jsonl", "a/../../outside.jsonl"])
@pytest.mark.parametrize("pack", [_tar, _zip])
def test_a_member_that_points_outside_of_its_archive_writes_nothing(pack: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / "rows.archive"
    path.parent.mkdir()
    path.write_bytes(_packed(lambda sink: pack(sink, name)))
    with nothing_outside(path.parent):
        assert len(list(read_source(str(path)))) == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in"]


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    secret, path = tmp_path / "secret.jsonl", tmp_path / "rows.tar"
    secret.write_text('{"text": "secret"}\n')
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"link-{kind.decode()}.jsonl")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        member = tarfile.TarInfo("train.jsonl")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES))
    assert all("secret" not in json.dumps(row.data) for row in read_source(str(path)))


@pytest.mark.timeout(60)
def test_json_and_xml_that_nest_or_grow_without_end_are_refused(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{n} "&e{n - 1};&e{n - 1};">' for n in range(1, 40))
    bomb = f'<?xml version="1.0"?><!DOCTYPE posts [<!ENTITY e0 "x">{entities}]><posts><row Id="&e39;"/></posts>'
    outer = (
        '<?xml version="1.0"?><!DOCTYPE posts [<!ENTITY e SYSTEM "file:///etc/passwd">]><posts><row Id="&e;"/></posts>'
    )
    for number, text in enumerate((bomb, outer)):
        path = tmp_path / f"dump-{number}" / "Posts.xml"
        path.parent.mkdir()
        path.write_text(text)
        with told():
            prepare("stack-exchange", path.parent, tmp_path / f"out-{number}", say=lambda _: None)
    for number, text in enumerate(("[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}")):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with told():
            list(read_source(str(path)))
