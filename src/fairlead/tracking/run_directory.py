"""The folder that holds what a run was and did, and the only way between training and reports.

Files are replaced whole or appended to by line, so that a crash at any moment leaves them readable.
What stands in them is described in ``docs/reference/run-directory.md``; this module knows only that
a line bears its ``step``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fairlead.errors import RunError

_STEPPED = ("metrics.jsonl", "samples.jsonl", "eval_prompts.jsonl", "alarms.jsonl")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, then continue with `fairlead resume`",
    errno.EDQUOT: "your quota is used up: free some space, then continue with `fairlead resume`",
    errno.EROFS: "the file system is read-only: put the run where you may write",
    errno.EACCES: "you have no permission there: put the run where you may write",
    errno.EPERM: "you have no permission there: put the run where you may write",
    errno.EEXIST: "a file of that name is there: choose another name, or remove it",
    errno.ENOTDIR: "a part of the path is a file: put the run elsewhere",
}


@contextmanager
def _explained(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check that the folder exists and can be written to")
        raise RunError(f"cannot {verb} {path}: {error.strerror or error}", hint) from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encode(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # A lone surrogate has no UTF-8, but its backslash escape is valid JSON.
    return text.encode("utf-8", "backslashreplace") + b"\n"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run's folder. Every failure of the file system is a ``RunError`` that says what to do."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def alarms(self) -> Path:
        return self.path / "alarms.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def rounds(self) -> Path:
        return self.path / "rounds"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @classmethod
    def create(cls, path: Path | str, recipe: str) -> Self:
        """A new run of ``recipe``, or the run of the same recipe begun there earlier, untouched.

        ``recipe`` is the resolved recipe as YAML. Raises ``RunError`` when something else is there;
        hidden files do not count.
        """
        run = cls(Path(path))
        with _explained("create", run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            present = sorted(entry.name for entry in run.path.iterdir() if not entry.name.startswith("."))
            same = run.recipe.exists() and run.recipe.read_bytes() == recipe.encode("utf-8")
        if not present:
            run.write_text("recipe.yaml", recipe)
        elif not same:
            some = ", ".join(present[:4]) + (" ..." if len(present) > 4 else "")
            what = "a run of another recipe" if run.recipe.exists() else "files that are no run"
            resume = f"continue that run with `fairlead resume {path}`, " if run.recipe.exists() else ""
            raise RunError(f"{path} holds {what}: {some}", f"choose another name, {resume}or remove {path}")
        return run

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """A run that exists; raises ``RunError`` when there is none."""
        run = cls(Path(path))
        if not run.recipe.is_file():
            near = sorted(str(found.parent) for found in run.path.parent.glob("*/recipe.yaml"))
            raise RunError(
                f"{path} is not a run: it has no recipe.yaml",
                f"runs there: {', '.join(near) or 'none'}",
            )
        return run

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file whole: a reader, or a crash, sees the old file or the new one."""
        self._replace(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """As ``write_text``; a number that is not finite becomes ``null``."""
        self._replace(name, _encode(value, indent=2))

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds one line a row and hands them to the system at once: all of them, or none."""
        path = self.path / name
        data = b"".join(map(_encode, rows))
        with _explained("write", path), path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)  # half a line would spoil the next one
                raise

    def read_json(self, name: str) -> dict[str, Any]:
        """An object written by ``write_json``. Raises ``RunError`` when it is damaged."""
        path = self.path / name
        with _explained("read", path):
            data = path.read_bytes()
        hint = "restore it, or start again under another run.name"
        try:
            value = json.loads(data)
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}", hint) from error
        if not isinstance(value, dict):
            raise RunError(f"{path} is damaged: it holds no object", hint)
        return value

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file; none where it is missing. A last line torn by a crash is left out."""
        return [row for _, row in self._lines(name)]

    def truncate_after(self, step: int) -> None:
        """Cuts what was written after ``step``, that of the checkpoint a run is resumed from."""
        for name in _STEPPED:
            kept = b"".join(line + b"\n" for line, row in self._lines(name) if row["step"] <= step)
            path = self.path / name
            if path.exists() and path.read_bytes() != kept:
                self._replace(name, kept)

    def clear_leftovers(self) -> None:
        """Removes what killed processes were writing. Only with the lock held."""
        for pattern in (".*.tmp", ".writing-*", "checkpoints/.writing-*", "rounds/*/.writing-*"):
            for path in self.path.glob(pattern):
                with _explained("remove", path):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training here; ends with the process, however it ends."""
        path = self.path / ".lock"
        with _explained("lock", path):
            file = path.open("a+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RunError(
                    f"{self.path} is in use by process {file.read() or 'unknown'}",
                    "wait until it ends, stop it, or choose another name for this run",
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise RunError(f"cannot lock {path}: {error.strerror}") from error
                print(
                    f"warning: {self.path}: no locks on this file system; start no second process",
                    file=sys.stderr,
                )
            with _explained("lock", path):
                file.truncate(0)
                file.write(f"{os.getpid()} on {platform.node()}")
                file.flush()
            yield

    def _replace(self, name: str, data: bytes) -> None:
        path = self.path / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with _explained("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself must survive a power cut
            finally:
                os.close(folder)

    def _lines(self, name: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        path = self.path / name
        with _explained("read", path):
            # Not splitlines(): a text may hold U+0085 or U+2028.
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line else None
            except ValueError as error:
                if number < len(lines):
                    raise RunError(f"{path}, line {number} is not JSON: {error}", "mend or remove that line") from error
                row = None
            if row is not None:
                yield line, row


def file_sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a folder: its files' relative names, sorted, each with its SHA-256."""
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    digest = hashlib.sha256()
    for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()):
        digest.update(f"{name}\0{file_sha256(root / name)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
