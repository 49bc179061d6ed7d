import errno
import gzip
import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest

from fairlead.data.sources import Row, read_source
from fairlead.data.sources.hub import hub_rows
from fairlead.errors import DataError


def read(source: Path | str, **options: Any) -> list[Row]:
    return list(read_source(str(source), **options))


def data_of(source: Path | str, **options: Any) -> list[dict[str, Any]]:
    return [row.data for row in read(source, **options)]


def error_of(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **options)
    return str(caught.value)


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shared(name: str) -> Path:
    path = Path(os.environ.get("FAIRLEAD_DATA", "")) / name
    if not os.environ.get("FAIRLEAD_DATA") or not path.exists():
        pytest.skip(f"FAIRLEAD_DATA names no folder with {name}")
    return path


# --- folders and archives of data files ----------------------------------------------------------------------------


def test_the_files_of_a_folder_are_read_sorted_and_others_left_aside(tmp_path: Path) -> None:
    files = {
        "b.jsonl": b'{"n": 2}\n',
        "a/deep.json.gz": gzip.compress(b'[{"n": 1}]'),
        "LICENSE.txt": b"x",
        "README.md": b"x",
        "plot.png": b"x",
        ".cache/c.jsonl": b"x",
    }
    notes = Counter[str]()
    rows = read(folder(tmp_path, files), notes=notes)
    assert [(row.data["n"], row.place) for row in rows] == [
        (1, f"{tmp_path / 'a/deep.json.gz'}:1"),
        (2, f"{tmp_path / 'b.jsonl'}:1"),
    ]
    assert notes == {"files left aside: no data": 3}


def test_a_folder_of_several_formats_lists_them(tmp_path: Path) -> None:
    folder(tmp_path, {"a.jsonl": b'{"n": 1}', "b.csv": b"n\n1\n", "c.csv": b"n\n1\n"})
    assert "mixes formats (CSV: b.csv; JSON: a.jsonl)" in error_of(tmp_path)


def test_a_folder_without_data_names_what_it_holds(tmp_path: Path) -> None:
    folder(tmp_path, {"Posts.xml": b"<posts/>", "README": b"x"})
    assert error_of(tmp_path) == f"{tmp_path} holds no data files\nhint: name a file: Posts.xml, README"
    folder(tmp_path, {"data.tar.gz": b""})
    assert error_of(tmp_path).endswith("hint: name a file: data.tar.gz")


def test_a_folder_of_empty_files_is_an_error_and_one_empty_file_among_others_is_not(tmp_path: Path) -> None:
    folder(tmp_path, {"a.jsonl": b"", "b.jsonl": b"\n"})
    assert "holds no rows" in error_of(tmp_path)
    folder(tmp_path, {"c.jsonl": b'{"n": 1}'})
    assert data_of(tmp_path) == [{"n": 1}]


def test_damage_in_a_file_of_a_folder_names_the_file(tmp_path: Path) -> None:
    folder(tmp_path, {"a.jsonl": b'{"n": 1}\n', "b.jsonl.gz": gzip.compress(b'{"n": 2}\n' * 99)[:-9]})
    assert error_of(tmp_path).startswith(f"{tmp_path / 'b.jsonl.gz'} is cut off or damaged")


FILES = {
    "d/a.jsonl": b'{"n": 1}\n\n{"n": 2}\n',
    "d/b.jsonl.gz": gzip.compress(b'{"n": 3}\n'),
    "d/README": b"x",
    "../evil.jsonl": b'{"n": 4}\n',
    "d/._a.jsonl": b"x",
}


@pytest.mark.parametrize(
    "name", ["a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.tar.zst", "a.zip", "named-otherwise"]
)
def test_an_archive_is_a_folder_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = home / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in FILES.items():
                archive.writestr(member, data)
    elif name == "a.tar.zst":
        path.write_bytes(pyarrow.compress(tar(path, FILES).read_bytes(), codec="zstd", asbytes=True))
    else:
        tar(path, FILES, "w:" + name.partition(".tar.")[2] if ".tar." in name else "w")
    assert [(row.data["n"], row.place.removeprefix(f"{path}:")) for row in read(path)] == [
        (1, "d/a.jsonl:1"),
        (2, "d/a.jsonl:3"),
        (3, "d/b.jsonl.gz:1"),
        (4, "../evil.jsonl:1"),
    ]
    assert [entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*")] == ["home", f"home/{name}"]


def test_a_table_in_an_archive_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pandas.DataFrame({"text": ["a"]}).to_parquet(buffer)
    assert data_of(tar(tmp_path / "a.tar", {"a.parquet": buffer.getvalue()})) == [{"text": "a"}]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_cut_of_an_archive_is_an_error_before_any_row(tmp_path: Path, mode: str) -> None:
    path = tar(tmp_path / "a.tar", {f"{n}.jsonl": b'{"n": %d}\n' % n * 100 for n in range(4)}, mode)
    whole = path.read_bytes()
    step, end = (256, 4 * (512 + 1024) + 512) if mode == "w" else (7, len(whole))
    for length in range(512 if mode == "w" else 20, end, step):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.tar is cut off or damaged"):
            next(read_source(str(path)))
    path.write_bytes(whole)
    assert len(read(path)) == 400


def test_an_encrypted_zip_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", b'{"n": 1}')
    whole = bytearray(path.read_bytes())
    whole[6] |= 1  # the flags of the member, and of its entry in the directory
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(whole))
    assert "a.zip is encrypted" in error_of(path)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_zip_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", b'{"n": 1}\n' * 99)
    whole = bytearray(path.read_bytes())
    whole[14] ^= damage == "changed"  # a byte of the checksum
    whole[whole.index(b"PK\x01\x02") + 16] ^= damage == "changed"
    path.write_bytes(bytes(whole[:-9] if damage == "cut" else whole))
    assert "is cut off or damaged" in error_of(path)


@pytest.mark.parametrize("kind", ["version", "compression"])
def test_a_zip_of_a_later_kind_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", b'{"n": 1}\n')
    whole = bytearray(path.read_bytes())
    entry = whole.index(b"PK\x01\x02")
    if kind == "version":
        whole[entry + 6] = 99
    else:
        whole[8] = whole[entry + 10] = 97
    path.write_bytes(bytes(whole))
    assert "a.zip cannot be read: " in error_of(path) and "unpack it yourself" in error_of(path)


def test_a_folder_that_holds_what_may_not_be_looked_at_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n')

    plain = Path.stat

    def refused(self: Path, **given: bool) -> os.stat_result:
        if self.name == "a.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return plain(self, **given)

    monkeypatch.setattr(Path, "stat", refused)
    assert error_of(tmp_path).startswith(f"{tmp_path / 'a.jsonl'} cannot be read: Permission denied")


def test_damage_inside_a_tar_is_an_error(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {f"{n}.jsonl": b'{"n": 1}\n' for n in range(4)})
    whole = bytearray(path.read_bytes())
    whole[2048:2148] = b"\xff" * 100  # the header of the third
    path.write_bytes(bytes(whole))
    assert "a.tar is cut off or damaged" in error_of(path)


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "train", "heldout"),
    [
        ("train test extra", "train", "test"),
        ("train-00000-of-00002 train-00001-of-00002 valid test", "train-00000-of-00002 train-00001-of-00002", "test"),
        ("data/train/a data/validation/a", "data/train/a", "data/validation/a"),
        ("TinyStories-train TinyStories-valid", "TinyStories-train", "TinyStories-valid"),
        ("a b", "a b", "a b"),
        ("a eval", "a", "eval"),
        ("harmless/test", "harmless/test", "harmless/test"),
        ("latest contrast", "contrast latest", "contrast latest"),
        ("train", "train", None),
        ("test dev", None, "test"),
    ],
)
def test_the_split_is_chosen_by_name(tmp_path: Path, names: str, train: str | None, heldout: str | None) -> None:
    folder(tmp_path, {f"{name}.jsonl": json.dumps({"name": name}).encode() for name in names.split()})
    for wanted, is_heldout in ((train, False), (heldout, True)):
        if wanted is None:
            assert "has no split for" in error_of(tmp_path, heldout=is_heldout)
        else:
            assert " ".join(row["name"] for row in data_of(tmp_path, heldout=is_heldout)) == wanted


def test_of_several_splits_the_preferred_one_is_read(tmp_path: Path) -> None:
    names = ["train_sft.jsonl", "train_prefs.jsonl", "test_sft.jsonl", "test_prefs.jsonl"]
    folder(tmp_path, {name: json.dumps({"name": name}).encode() for name in names})
    assert data_of(tmp_path, prefer=["preference", "prefs", "sft"]) == [{"name": "train_prefs.jsonl"}]
    assert data_of(tmp_path, prefer=["sft"], heldout=True) == [{"name": "test_sft.jsonl"}]
    assert len(data_of(tmp_path, prefer=["gen"])) == 2


# --- labels by name ------------------------------------------------------------------------------------------------

REVIEWS = {
    "aclImdb/README": b"x",
    "aclImdb/imdb.vocab": b"x",
    "aclImdb/imdbEr.txt": b"0.1",
    "aclImdb/test/neg/0_2.txt": b"Bad.",
    "aclImdb/train/pos/0_9.txt": "Good.<br />\u0085\nYes\r\n".encode(),
    "aclImdb/train/neg/7_1.txt": b"caf\xe9\0",
    "aclImdb/train/unsup/0_0.txt": b"",
    "aclImdb/train/urls_pos.txt": b"http://x",
}
GOOD = {
    "text": "Good.<br />\u0085\nYes\r\n",
    "label": 1,
    "rating": 9,
    "split": "train",
    "path": "aclImdb/train/pos/0_9.txt",
}
BAD = {"text": "café", "label": 0, "rating": 1, "split": "train", "path": "aclImdb/train/neg/7_1.txt"}
UNSUP = {"text": "", "label": None, "split": "train", "path": "aclImdb/train/unsup/0_0.txt"}
TEST = {"text": "Bad.", "label": 0, "rating": 2, "split": "test", "path": "aclImdb/test/neg/0_2.txt"}


def test_reviews_are_rows_whether_packed_or_unpacked(tmp_path: Path) -> None:
    notes = Counter[str]()
    packed = tar(tmp_path / "aclImdb_v1.tar.gz", REVIEWS, "w:gz")
    assert data_of(packed, notes=notes) == [GOOD, BAD, UNSUP]
    assert notes == {
        "files left aside: no data": 4,
        "files left aside: another split": 1,
        "files decoded as cp1252": 1,
        "NUL characters dropped": 1,
    }
    assert data_of(packed, heldout=True) == [TEST]
    unpacked = folder(tmp_path / "unpacked", REVIEWS)
    assert data_of(unpacked) == [BAD, GOOD, UNSUP]
    assert [row.place for row in read(unpacked, heldout=True)] == [f"{unpacked}/aclImdb/test/neg/0_2.txt"]


def test_any_folder_with_pos_and_neg_holds_labelled_texts(tmp_path: Path) -> None:
    folder(tmp_path, {"neg/cv000_29416.txt": b"no", "pos/x.txt": b"yes"})
    assert data_of(tmp_path) == [
        {"text": "no", "label": 0, "path": "neg/cv000_29416.txt"},
        {"text": "yes", "label": 1, "path": "pos/x.txt"},
    ]


def test_lines_of_a_pair_of_files_are_labelled_by_its_names(tmp_path: Path) -> None:
    folder(tmp_path, {"rt.pos": b"caf\xe9 .\n", "rt.neg": b"no\n\nnone\n"})
    assert data_of(tmp_path) == [
        {"text": "no", "label": 0},
        {"text": "none", "label": 0},
        {"text": "café .", "label": 1},
    ]
    assert data_of(tmp_path / "rt.pos") == [{"text": "café .", "label": 1}]


def test_every_review_of_the_published_archive_is_read() -> None:
    path = shared("imdb/aclImdb_v1.tar.gz")
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout.split("\n")
    parts = Counter(tuple(name.split("/")[1:3]) for name in listed if name.count("/") == 3 and name.endswith(".txt"))
    assert sum(parts.values()) == 6100
    for heldout in (False, True):
        rows = data_of(path, heldout=heldout)
        found = Counter((row["split"], {1: "pos", 0: "neg", None: "unsup"}[row.get("label")]) for row in rows)
        assert found == {key: number for key, number in parts.items() if key[0] == ("test" if heldout else "train")}
        assert all((row["rating"] > 5) == row["label"] for row in rows if row["label"] is not None)


def test_every_snippet_of_rt_polarity_is_read() -> None:
    path = shared("rt-polarity")
    assert Counter(row["label"] for row in data_of(path)) == {0: 4000, 1: 4000}
    bytes_read = (path / "rt-polarity.pos").read_bytes()
    rows = data_of(path / "rt-polarity.pos")
    assert "\n".join(row["text"] for row in rows) == bytes_read.decode("cp1252").rstrip("\n")


# --- datasets ------------------------------------------------------------------------------------------------------

TRAIN = [{"messages": [{"role": "user", "content": "\u0085"}], "n": 1}, {"messages": [], "n": None}]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(TRAIN).save_to_disk(str(tmp_path))
    assert [(row.data, row.place) for row in read(tmp_path)] == [
        (TRAIN[0], f"{tmp_path} row 1"),
        (TRAIN[1], f"{tmp_path} row 2"),
    ]
    assert data_of(tmp_path, heldout=True) == TRAIN


def saved_splits(path: Path, *names: str) -> Path:
    splits = {name: datasets.Dataset.from_list([{"name": name}]) for name in names}
    datasets.DatasetDict(**splits).save_to_disk(str(path))
    return path


def test_the_split_of_a_saved_dataset_is_chosen_by_name(tmp_path: Path) -> None:
    both = saved_splits(tmp_path / "both", "train", "validation", "test")
    assert [(row.data, row.place) for row in read(both)] == [({"name": "train"}, f"{both} train row 1")]
    assert data_of(both, heldout=True) == [{"name": "test"}]
    assert data_of(saved_splits(tmp_path / "valid", "train", "validation"), heldout=True) == [{"name": "validation"}]
    assert "has no split for evaluation: it has train" in error_of(
        saved_splits(tmp_path / "one", "train"), heldout=True
    )
    many = saved_splits(tmp_path / "many", "train_sft", "train_prefs", "test_sft", "test_prefs")
    assert data_of(many, prefer=["prefs"]) == [{"name": "train_prefs"}]


def test_a_damaged_saved_dataset_is_an_error(tmp_path: Path) -> None:
    path = saved_splits(tmp_path, "train")
    (arrow,) = path.rglob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{path} cannot be read" in error_of(path)


def test_a_data_set_is_streamed_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network: `datasets` takes an id that exists as a folder for that folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder(
        tmp_path / "owner/name-v1.0",
        {
            "train.jsonl": b'{"n": 1, "text": "a\\u0085b"}\n{"n": 2, "text": ""}\n',
            "test.jsonl": b'{"n": 3, "text": "c"}\n',
        },
    )
    notes = Counter[str]()
    rows = list(hub_rows("owner/name-v1.0", notes, heldout=False, prefer=()))
    assert [(row.data, row.place) for row in rows] == [
        ({"n": 1, "text": "a\u0085b"}, "owner/name-v1.0 train row 1"),
        ({"n": 2, "text": ""}, "owner/name-v1.0 train row 2"),
    ]
    assert [row.data["n"] for row in hub_rows("owner/name-v1.0", notes, heldout=True, prefer=())] == [3]


@pytest.mark.parametrize("name", ["owner/name", "owner/name-v1.0", "owner/name.v2:main"])
def test_what_is_no_file_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(name)
    assert message.startswith(
        f"{name} is no local file, and as a data set of the hub it cannot be read: Couldn't reach"
    )
    assert message.endswith("hint: check the name and the network; offline, give a local copy")


def test_a_folder_that_exists_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path, {"owner/name-v1.0/a.csv": b"n\n1\n"})
    assert data_of("owner/name-v1.0") == [{"n": "1"}]
    assert error_of("owner/nam-v1.0").endswith("did you mean name-v1.0?")


@pytest.mark.parametrize(
    "name", ["data/train.jsonl", "data/a.tar.gz", "data/a.txt.zst", "a.b/c/d", "./x/y", "name", "/x/y"]
)
def test_what_cannot_be_a_hub_id_is_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(name).startswith(f"{name.removeprefix('./')} does not exist")
