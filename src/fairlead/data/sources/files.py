"""Paths and bytes: finds files and opens them, whatever they are packed with. Knows nothing of rows."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import IO, cast

from fairlead.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def format_of(path: PurePath) -> str:
    """The suffix that names the format of a file, whether or not one of a compression follows it."""
    return PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def require_file(path: Path) -> None:
    """Raises DataError unless ``path`` is a file."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())[:5]
        raise DataError(
            f"{path} is a folder where a file was expected",
            f"name a file in it: {', '.join(names)}",
        )
    require(path)


def require(path: Path) -> None:
    """Raises DataError when nothing stands at ``path``."""
    if not path.exists():
        near = nearest(path)
        raise DataError(f"{path} does not exist", f"did you mean {near}?" if near else "check the path")


def nearest(path: Path) -> str | None:
    """The name beside ``path`` that is most like its own."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return next(iter(get_close_matches(path.name, siblings, n=1)), None)


def find_files(path: str | Path, accepts: Callable[[Path], bool], wanted: str) -> list[Path]:
    """The file at ``path``, or the accepted ones of the folder there, at any depth, sorted.

    Raises DataError where there is none; ``wanted`` says in words what was looked for.
    """
    path = Path(path)
    require(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and accepts(file))
    if not files:
        raise DataError(f"{path} holds no {wanted}", "name the folder the files stand in, or one file")
    return files


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """A file, unpacked where its content is gzip, bzip2, xz or zstd. Every failure to read is a DataError."""
    with reading(path), path.open("rb") as raw:
        yield unpacked(raw)


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Makes every failure to read a DataError that names the file, a file that was cut off included."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise _damaged(name, error) from error
    except OSError as error:
        if error.errno is None:  # bz2 and zstd: no error of the system
            raise _damaged(name, error) from error
        raise DataError(f"{error.filename or name} cannot be read: {error.strerror or error}") from error


def unpacked(raw: IO[bytes]) -> io.BufferedReader:
    """The content of a stream, which begins here, without its compression."""
    file = raw if isinstance(raw, io.BufferedReader) else _buffered(raw)
    head = file.peek(6)
    if head.startswith(b"\x1f\x8b"):
        inner = gzip.GzipFile(fileobj=file)
    elif head.startswith(b"BZh"):
        inner = bz2.BZ2File(file)
    elif head.startswith(b"\xfd7zXZ\x00"):
        inner = lzma.LZMAFile(file)  # noqa: SIM115  (closed with the file)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        # unlike the module zstandard, it reports a frame that was cut off
        inner = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    else:
        return file
    return _buffered(inner)


def _buffered(stream: object) -> io.BufferedReader:
    return cast(io.BufferedReader, io.BufferedReader(cast(io.RawIOBase, stream), 1 << 16))


def _damaged(name: str | Path, error: Exception) -> DataError:
    return DataError(
        f"{name} is cut off or damaged: {error or type(error).__name__}",
        "fetch it again, and compare its size or checksum",
    )
