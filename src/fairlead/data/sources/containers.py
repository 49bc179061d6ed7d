"""Folders and archives as the same thing: named members that open one after the other. Knows no formats.

No member is ever written to disk, so a name that points outside of the archive does no harm.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fairlead.data.sources.files import open_bytes, reading, unpacked
from fairlead.errors import DataError

_BLOCK = 512

Opened = Iterator[tuple[str, io.BufferedReader]]


@dataclass(frozen=True, slots=True)
class Container:
    names: list[str]
    """Members that are files and not hidden, relative to the container; in its order."""
    open: Callable[[Collection[str]], Opened]
    """Opens the members of these names in turn, each until the next is asked for."""
    place: Callable[[str], str]
    """How messages name a member."""


def container_of(path: Path) -> Container | None:
    """The folder or archive (.tar, also compressed; .zip) at ``path``, told by content; None for any other file.

    An archive is read once to its end for its names, so that one that is cut off yields no row.
    """
    if path.is_dir():
        return _folder(path)
    with open_bytes(path) as file:
        head = file.peek(_BLOCK)
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    return _tar(path) if head[257:262] == b"ustar" else None


def _folder(path: Path) -> Container:
    with reading(path):
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())

    def opened(wanted: Collection[str]) -> Opened:
        for name in filter(wanted.__contains__, names):
            with open_bytes(path / name) as file:
                yield name, file

    return Container(list(filter(_is_shown, names)), opened, lambda name: str(path / name))


def _tar(path: Path) -> Container:
    def opened(wanted: Collection[str]) -> Opened:
        with open_bytes(path) as raw:
            for archive, member in _members(raw):
                file = archive.extractfile(member) if member.name in wanted else None
                if file is not None:
                    yield member.name, unpacked(file)

    with open_bytes(path) as raw:
        names = [member.name for _, member in _members(raw) if _is_shown(member.name)]
    return Container(names, opened, lambda name: f"{path}:{name}")


def _members(raw: io.BufferedReader) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The files in a tar, read once from start to end."""
    with tarfile.open(fileobj=raw, mode="r|") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  (it would keep them all)
            if member.isfile():
                yield archive, member
        end = archive.offset
    if isinstance(raw.raw, io.FileIO):  # tarfile takes a cut between members, or a damaged header, for the end
        raw.seek(end)
        if raw.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("it lacks the mark of its end")
    else:
        while raw.read(1 << 20):  # to the checksum
            pass


@contextmanager
def _unzipping(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            yield archive
    except NotImplementedError as error:  # of a later version or compression than zipfile knows
        raise DataError(f"{path} cannot be read: {error}", "unpack it yourself and name the folder") from error


def _zip(path: Path) -> Container:
    def opened(wanted: Collection[str]) -> Opened:
        with _unzipping(path) as archive:
            for name in filter(wanted.__contains__, archive.namelist()):
                with archive.open(name) as file:
                    yield name, unpacked(file)

    with _unzipping(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir() and _is_shown(info.filename)]
    if any(info.flag_bits & 1 for info in infos):
        raise DataError(f"{path} is encrypted", "unpack it yourself and name the folder")
    names = [info.filename for info in infos]
    return Container(names, opened, lambda name: f"{path}:{name}")


def _is_shown(name: str) -> bool:
    parts = [part for part in PurePosixPath(name).parts if part.strip(".")]
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)
