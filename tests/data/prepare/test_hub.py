"""Fetching from the hub, without a network: what is in the hub's cache is taken, what is not is asked for."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tests.data.prepare.raw import rows

COMMIT = "dce01c9b08f87459cf36a430d809084718273017"


def fairlead(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", "from fairlead.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_cannot_be_fetched_is_named_with_its_licence_and_the_way_around(tmp_path: Path) -> None:
    done = fairlead("prepare", "imdb", "--out", str(tmp_path / "out"), cache=tmp_path / "cache")
    assert done.returncode == 3
    first, error, *_ = done.stderr.splitlines()
    assert first.startswith("imdb: https://huggingface.co/datasets/stanfordnlp/imdb, licence: none stated")
    assert first.endswith("(research only)")
    assert error.startswith("error: stanfordnlp/imdb cannot be fetched from https://huggingface.co/datasets/")
    assert "fairlead prepare imdb --from PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("stack-exchange", "it is published at https://archive.org/details/stackexchange"), ("text", "has no source")],
)
def test_a_kind_that_is_not_on_the_hub_says_where_it_is(tmp_path: Path, kind: str, words: str) -> None:
    done = fairlead("prepare", kind, "--out", str(tmp_path / "out"), cache=tmp_path / "cache")
    assert done.returncode == 3
    assert words in done.stderr
    assert f"fairlead prepare {kind} --from PATH --out DIR" in done.stderr


def cached(cache: Path) -> Path:
    """Alpaca as the hub's client keeps it: files named by their sha256, and links to them; returns the file."""
    home = cache / "datasets--tatsu-lab--alpaca"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (home / "blobs").mkdir()
    table = pyarrow.table({"instruction": ["Say hi."], "input": [""], "output": ["Hi."], "text": ["..."]})
    parquet.write_table(table, home / "blobs" / "new")
    digest = hashlib.sha256((home / "blobs" / "new").read_bytes()).hexdigest()
    (home / "blobs" / "new").rename(home / "blobs" / digest)
    folder = home / "snapshots" / COMMIT / "data"
    folder.mkdir(parents=True)
    (folder / "train-00000-of-00001-a09b74b3ef9c3b56.parquet").symlink_to(f"../../../blobs/{digest}")
    return home / "blobs" / digest


def test_what_is_in_the_cache_is_prepared_and_the_manifest_names_its_commit(tmp_path: Path) -> None:
    blob = cached(tmp_path / "cache")
    out = tmp_path / "out"
    done = fairlead("prepare", "alpaca", "heldout=0", "--out", str(out), "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["inputs"] == [
        {
            "path": f"{COMMIT}/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
            "sha256": blob.name,
            "bytes": blob.stat().st_size,
            "published": True,
        }
    ]
    assert manifest["source"] == "https://huggingface.co/datasets/tatsu-lab/alpaca"
    assert (manifest["licence"], manifest["research_only"]) == ("CC BY-NC 4.0", True)
    assert rows(out, "sft") == [{"prompt": "Say hi.", "response": "Hi."}]


def test_a_file_that_is_not_what_the_hub_says_is_refused(tmp_path: Path) -> None:
    blob = cached(tmp_path / "cache")
    blob.write_bytes(blob.read_bytes() + b"\0")
    done = fairlead("prepare", "alpaca", "--out", str(tmp_path / "out"), cache=tmp_path / "cache")
    assert done.returncode == 3
    assert f"is damaged: its sha256 is not {blob.name}" in done.stderr
    assert f"hint: remove {blob} and " in done.stderr


def test_the_list_of_kinds_is_printed_without_torch(tmp_path: Path) -> None:
    code = "import sys; from fairlead.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "prepare", "--list"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.endswith("False\n")
    assert "\ngsm8k: " in text and "  licence: CC BY-NC 4.0 (research only)\n" in text
    kinds = json.loads(fairlead("prepare", "--list", "--json", cache=tmp_path).stdout)
    (gsm8k,) = (kind for kind in kinds if kind["name"] == "gsm8k")
    assert (gsm8k["hub"], gsm8k["licence"]) == ("openai/gsm8k", "MIT")
    assert {k: gsm8k["options"][1][k] for k in ("name", "default")} == {"name": "calculations", "default": True}


def test_the_source_is_given_once_and_settings_need_none(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    for arguments in ((str(path), "heldout=0"), ("--from", str(path), "heldout=0")):
        out = tmp_path / str(len(arguments))
        done = fairlead("prepare", "gsm8k", *arguments, "--out", str(out), cache=tmp_path)
        assert done.stdout == f"{out}: 1 read, 1 kept; dropped: none\n"
        assert rows(out, "prompts") == [{"prompt": "1 + 1?", "answer": "2"}]
    twice = fairlead("prepare", "gsm8k", str(path), "--from", str(path), "--out", str(tmp_path / "x"), cache=tmp_path)
    assert twice.returncode == 2
    assert "given twice" in twice.stderr
    neither = fairlead("prepare", "gsm8k", cache=tmp_path)
    assert neither.returncode == 2
    assert "fairlead prepare KIND --out DIR" in neither.stderr


def test_seed_may_stand_among_the_settings_and_no_other_argument_may(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    command = ("prepare", "gsm8k", str(path), "--out", str(tmp_path / "out"), "--json")
    assert json.loads(fairlead(*command, "seed=7", cache=tmp_path).stdout)["seed"] == 7
    for setting in ("kind=hh-rlhf", "say=1", "out=x"):
        done = fairlead(*command, setting, cache=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert f"gsm8k has no option {setting.split('=')[0]!r}" in done.stderr
