import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import fairlead.tracking
from fairlead.errors import RunError
from fairlead.tracking import RunDirectory, file_sha256, tree_sha256

SOURCE = str(Path(fairlead.tracking.__file__).parents[2])


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def test_create_writes_the_recipe_and_returns_a_run_of_the_same_recipe_untouched(tmp_path):
    run = RunDirectory.create(tmp_path / "runs" / "a", "seed: 0\n")
    run.append("metrics.jsonl", [{"step": 1}])
    assert run.recipe.read_text() == "seed: 0\n"
    assert RunDirectory.create(tmp_path / "runs" / "a", "seed: 0\n") == run
    assert run.read_jsonl("metrics.jsonl") == [{"step": 1}]


def test_create_takes_an_empty_folder_and_one_with_hidden_files_only(tmp_path):
    (tmp_path / ".DS_Store").touch()
    assert RunDirectory.create(tmp_path, "seed: 0\n").recipe.exists()


def test_create_refuses_a_run_of_another_recipe_and_says_what_can_be_done(tmp_path):
    RunDirectory.create(tmp_path / "a", "seed: 0\n")
    with pytest.raises(RunError, match=r"a run of another recipe: recipe\.yaml") as caught:
        RunDirectory.create(tmp_path / "a", "seed: 1\n")
    hint = f"another name, continue that run with `fairlead resume {tmp_path}/a`, or remove"
    assert hint in str(caught.value)


def test_create_refuses_a_folder_of_other_files_without_offering_to_resume(tmp_path):
    for name in "abcde":
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=r"files that are no run: a, b, c, d \.\.\.") as caught:
        RunDirectory.create(tmp_path, "seed: 0\n")
    assert "fairlead resume" not in str(caught.value)


@pytest.mark.parametrize("below", [".", "run"])
def test_create_where_a_file_stands_is_a_run_error(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot create .*\nhint: a .*file"):
        RunDirectory.create(tmp_path / "file" / below, "seed: 0\n")


def test_open_returns_an_existing_run_and_names_the_neighbours_of_a_missing_one(tmp_path):
    run = RunDirectory.create(tmp_path / "first", "seed: 0\n")
    assert RunDirectory.open(tmp_path / "first") == run
    with pytest.raises(RunError, match=r"is not a run") as caught:
        RunDirectory.open(tmp_path / "frist")
    assert caught.value.hint == f"runs there: {tmp_path / 'first'}"


def test_json_is_written_whole_in_utf8_with_null_for_what_is_not_finite(tmp_path):
    run = RunDirectory(tmp_path)
    value = {"a": float("nan"), "b": [float("inf"), 1.5, ("é", float("-inf"))], "c": {"d": 2}}
    run.write_json("evaluation/metrics.json", value)
    text = (run.evaluation / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": None, "b": [None, 1.5, ["é", None]], "c": {"d": 2}}
    assert "é" in text
    assert [file.name for file in run.evaluation.iterdir()] == ["metrics.json"]


def test_a_failing_replacement_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.write_json("summary.json", {"steps": 1})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="No space left on device\nhint: the disk is full"):
        run.write_json("summary.json", {"steps": 2})
    assert json.loads(run.summary.read_text()) == {"steps": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_rows_survive_line_separators_and_lone_surrogates(tmp_path):
    run = RunDirectory(tmp_path)
    rows = [{"step": 1, "response": "a\u0085b\u2028c\nd"}, {"step": 2, "response": "\ud800 é"}]
    run.append("samples.jsonl", rows)
    assert run.read_jsonl("samples.jsonl") == rows
    assert run.samples.read_bytes().count(b"\n") == 2
    run.truncate_after(1)
    assert run.read_jsonl("samples.jsonl") == rows[:1]


def test_reading_a_missing_file_gives_no_rows(tmp_path):
    assert RunDirectory(tmp_path).read_jsonl("alarms.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "text": "\xc3', b"\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    run = RunDirectory(tmp_path)
    whole = b'{"step": 1}\n{"step": 2}\n'
    run.metrics.write_bytes(whole + torn)
    assert run.read_jsonl("metrics.jsonl") == [{"step": 1}, {"step": 2}]
    run.truncate_after(9)
    assert run.metrics.read_bytes() == whole


def test_a_broken_line_before_the_last_is_an_error_that_names_it(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_bytes(b'{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is not JSON"):
        run.read_jsonl("metrics.jsonl")


def test_truncate_cuts_the_lines_after_the_step_and_leaves_the_others_byte_for_byte(tmp_path):
    run = RunDirectory(tmp_path)
    first = b'{"step": 1,"loss":0.10}\n{ "step": 2, "loss": 1e-1 }\n'
    run.metrics.write_bytes(first + b'{"step": 3}\n')
    run.append("samples.jsonl", [{"step": 3}])
    run.append("alarms.jsonl", [{"step": 2}])
    untouched = run.alarms.stat()
    run.truncate_after(2)
    assert run.metrics.read_bytes() == first
    assert run.samples.read_bytes() == b""
    assert run.alarms.stat() == untouched


def test_an_append_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path):
    run = RunDirectory(tmp_path)
    run.append("metrics.jsonl", [{"step": 1}])
    before = run.metrics.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 4, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl"):
            run.append("metrics.jsonl", [{"step": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.metrics.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left on device\nhint: the disk is full"):
        run.append("metrics.jsonl", [{"step": 1}])


def test_a_second_process_cannot_take_the_lock_until_the_first_is_dead(tmp_path):
    holder = run_python(
        "import sys; from fairlead.tracking import RunDirectory; from pathlib import Path\n"
        "with RunDirectory(Path(sys.argv[1])).lock():\n"
        "    print('locked', flush=True); sys.stdin.read()",
        tmp_path,
    )
    run = RunDirectory(tmp_path)
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid} on"), run.lock():
            pass
        holder.kill()
        holder.wait()
    with run.lock():
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")
    with run.lock():
        pass


def test_where_the_file_system_has_no_locks_a_warning_takes_their_place(tmp_path, monkeypatch, capsys):
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunDirectory(tmp_path).lock():
        assert "no locks on this file system" in capsys.readouterr().err


def test_the_lock_leaves_the_errors_of_the_run_alone(tmp_path):
    with pytest.raises(FileNotFoundError), RunDirectory(tmp_path).lock():
        raise FileNotFoundError("data.jsonl")


def test_file_and_tree_hashes_are_those_of_a_hand_computation(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert file_sha256(tmp_path / "b" / "x") == abc
    expected = hashlib.sha256(f"a\0{empty}\nb/x\0{abc}\n".encode()).hexdigest()
    assert tree_sha256(tmp_path) == expected
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert tree_sha256(tmp_path) != expected


def test_the_hash_of_a_missing_folder_is_an_error_and_not_that_of_an_empty_one(tmp_path):
    with pytest.raises(NotADirectoryError):
        tree_sha256(tmp_path / "none")


def test_reading_run_directories_needs_neither_torch_nor_rich():
    with run_python("import sys, fairlead.tracking; print({'torch', 'rich', 'wandb'} & set(sys.modules))") as process:
        assert process.communicate()[0] == "set()\n"


@pytest.mark.parametrize("content", ["{", "", "[1]"])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: str) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    (run.path / "manifest.json").write_text(content)

    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        run.read_json("manifest.json")


def test_what_killed_processes_were_writing_is_removed_and_nothing_else(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    kept = ["recipe.yaml", ".stage.json", "checkpoints/step-000001/manifest.json", "rounds/000/round.json"]
    torn = [".summary.json.1234.tmp", ".writing-model/config.json", "checkpoints/.writing-step-000002/state.json"]
    torn += ["rounds/001/.writing-chunk-000.json"]
    for name in (*kept, *torn):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    run.clear_leftovers()
    assert sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()) == sorted(kept)
