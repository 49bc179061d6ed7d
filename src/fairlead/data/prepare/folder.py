"""The folder being prepared: built beside its place, kept through a kill, and moved there whole. Knows no rows."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from fairlead.data.prepare.kind import OUTPUTS, Say
from fairlead.data.sources import atomic_write, clip
from fairlead.errors import DataError

MANIFEST = "manifest.json"
SUFFIXES = (".jsonl", ".parquet")
_FILES = {name + suffix for name in OUTPUTS for suffix in SUFFIXES} | {MANIFEST}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def finished(out: Path, request: dict[str, Any], say: Say) -> dict[str, Any] | None:
    """The manifest in ``out``, if it answers this request and every file is as it says."""
    try:
        manifest = cast("dict[str, Any]", json.loads((out / MANIFEST).read_bytes()))
        if any(manifest[name] != value for name, value in request.items()):
            return None
        outputs = cast("dict[str, dict[str, Any]]", manifest["outputs"])
        whole = all(digests(out / name, say)["sha256"] == output["sha256"] for name, output in outputs.items())
        return manifest if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def refuse_strangers(out: Path) -> None:
    """Raises DataError where writing ``out`` would destroy what was not made here."""
    if out.is_dir():
        strangers = sorted({entry.name for entry in out.iterdir()} - _FILES)
        if not strangers:
            return
        what = f"{out} holds other files: {', '.join(map(clip, strangers[:5]))}"
    elif not out.exists():
        return
    else:
        what = f"{out} is a file"
    raise DataError(what, "name a folder that does not exist yet, or one made by an earlier preparation")


@contextmanager
def building(out: Path, request: dict[str, Any], say: Say) -> Iterator[tuple[Path, Path]]:
    """A folder to work in, and one that takes the place of ``out`` when the block ends without an error.

    Both stand in ``.NAME.partial`` beside ``out``. What a killed or failed process left in the first is still there
    for the same request, and gone for another. Raises DataError while another process works there.
    """
    partial, old = _beside(out)
    work, done = partial / "work", partial / "done"
    try:
        with _locked(partial, out):
            if old.exists():  # killed while one folder took the place of the other
                shutil.rmtree(old) if out.exists() else old.rename(out)
            shutil.rmtree(done, ignore_errors=True)
            note = partial / "request.json"
            if _read(note) != request:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                with atomic_write(note) as file:
                    file.write(_encode(request))
            done.mkdir()
            try:
                yield work, done
                _take_place(done, out, old)
            except BaseException:
                if any(work.iterdir()):
                    say(f"what is done is kept in {partial}; the same command continues from there")
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}", "check the place and run again"
        ) from error


def sweep(out: Path) -> None:
    """Removes what a process killed at the very end left beside the finished ``out``."""
    partial, old = _beside(out)
    if partial.exists():
        with suppress(DataError, OSError), _locked(partial, out):
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(partial)


def _beside(out: Path) -> tuple[Path, Path]:
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")


def once(note: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, or what it returned before a kill, as ``note`` says."""
    if (made := _read(note)) is None:
        made = make()
        with atomic_write(note) as file:
            file.write(_encode(made))
    return made


def publish(work: Path, done: Path, manifest: dict[str, Any], rows: dict[str, int], say: Say) -> None:
    """Puts the outputs of ``work`` that ``done`` lacks there, and a manifest that lists them all."""
    for name in rows:
        if not (done / name).exists():
            try:
                os.link(work / name, done / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(work / name, done / name)
    manifest["outputs"] = {
        name: {"rows": number, "sha256": digests(done / name, say)["sha256"]} for name, number in rows.items()
    }
    with atomic_write(done / MANIFEST) as file:
        file.write(_encode(manifest))


def outputs(folder: Path) -> dict[str, int]:
    """The outputs in ``folder``, in the order of OUTPUTS, with their numbers of rows."""
    found = [folder / (name + suffix) for name in OUTPUTS for suffix in SUFFIXES]
    return {file.name: num_rows(file) for file in found if file.is_file()}


def num_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(file).num_rows
    with file.open("rb") as lines:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(1 << 20), b""))


def digests(path: Path, say: Say, algorithms: Iterable[str] = ("sha256",)) -> dict[str, str]:
    """Hexadecimal digests of a file, read once; a long reading says how far it is."""
    hashes = {name: hashlib.new(name) for name in algorithms}
    size, done, told = path.stat().st_size, 0, time.monotonic()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for value in hashes.values():
                value.update(chunk)
            done += len(chunk)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                say(f"checksum of {path.name}: {done / size:.0%} of {size / 1e9:.1f} GB")
    return {name: value.hexdigest() for name, value in hashes.items()}


def _take_place(done: Path, out: Path, old: Path) -> None:
    if not out.exists():
        done.rename(out)
        return
    out.rename(old)
    try:
        done.rename(out)
    except OSError:
        with suppress(OSError):
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Keeps other processes out of ``partial``; ends with the process, however it ends."""
    path = partial / ".lock"
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise DataError(
                    f"{out} is being prepared by process {file.read() or 'unknown'}",
                    "wait until it ends, stop it, or name another folder",
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                print(f"warning: {partial}: no locks on this file system; start no second process", file=sys.stderr)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                continue  # the process that held it has just removed the folder
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
            yield
            return


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"
