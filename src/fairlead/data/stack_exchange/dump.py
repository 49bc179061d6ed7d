"""Finds the sites of a dump, unpacks them, and cuts their files into stretches of whole rows. Knows no rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fairlead.data.sources import find_files
from fairlead.errors import DataError

ROW = b"<row "
_POSTS, _LINKS = "Posts.xml", "PostLinks.xml"
_OTHER_TABLES = ("Badges", "Comments", "PostHistory", "Tags", "Users", "Votes")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Site:
    name: str
    posts: Path
    links: Path | None
    """PostLinks.xml, where the dump has one."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes ``start`` to ``end`` of a file: whole rows, each belonging to one stretch."""

    path: Path
    start: int
    end: int
    is_last: bool


def posts_files(path: str | Path) -> list[Path]:
    """The dump at ``path``: a ``Posts.xml``, a ``.7z``, a site folder, or a folder of these at any depth.

    Folders also give the ``PostLinks.xml`` beside each ``Posts.xml``. Raises DataError where there is none.
    """

    def accepts(file: Path) -> bool:
        return file.name in (_POSTS, _LINKS) or (
            file.suffix == ".7z" and file.stem.rpartition("-")[2] not in _OTHER_TABLES
        )

    wanted = "Posts.xml, and no .7z of a dump"
    files = find_files(path, accepts, wanted)
    if all(file.name == _LINKS for file in files):
        raise DataError(f"{path} holds no {wanted}", "name the folder the files stand in, or one file")
    return files


def find_sites(files: Sequence[Path], unpacked: Path, say: Callable[[str], None]) -> list[Site]:
    """The sites of ``files``, in their order. Archives are unpacked into the folder ``unpacked``, once.

    A site is named after its folder, or its archive; StackOverflow is published as an archive a table.
    """
    found: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in files:
        if file.suffix == ".7z":
            name = file.stem.removesuffix("-Posts").removesuffix("-PostLinks")
            tables = {table.name: table for table in _unpack(file, unpacked / file.stem, say)}
        else:
            name, tables = file.resolve().parent.name, {_LINKS if file.name == _LINKS else _POSTS: file}
        found.setdefault((file.parent, name), {}).update(tables)
    return [Site(name, tables[_POSTS], tables.get(_LINKS)) for (_, name), tables in found.items() if _POSTS in tables]


def _unpack(archive: Path, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """The tables needed, unpacked; the folder appears whole or not at all."""
    try:
        import py7zr
    except ImportError as error:
        raise DataError(
            f"{archive} is packed, and py7zr is not installed",
            "pip install 'fairlead[data]', or unpack it with 7z x",
        ) from error
    if not folder.exists():
        say(f"unpacking {archive.name}")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with py7zr.SevenZipFile(archive) as file:
                wanted = [name for name in file.getnames() if PurePosixPath(name).name in (_POSTS, _LINKS)]
                if wanted:
                    file.extract(path=partial, targets=wanted)
        except Exception as error:  # py7zr lets through what its many decoders raise
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{archive} cannot be unpacked: {error.strerror}") from error
            raise DataError(
                f"{archive} is cut off, damaged, or no 7z archive: {error or type(error).__name__}",
                "fetch it again, and compare its size or checksum",
            ) from error
        partial.rename(folder)
    tables = [file for file in folder.rglob("*.xml") if file.name in (_POSTS, _LINKS)]
    if not tables:
        raise DataError(f"{archive} holds no {_POSTS}", "is it an archive of the Stack Exchange data dump?")
    return tables


def stretches(path: Path, size: int) -> list[Stretch]:
    """The file as stretches of about ``size`` bytes, each from the start of a row to that of another."""
    end = path.stat().st_size
    starts = [0]
    with path.open("rb") as file:
        for goal in range(size, end, size):
            if goal <= starts[-1]:
                continue  # a row longer than a stretch
            file.seek(goal)
            tail, place = b"", goal
            while block := file.read(_BLOCK):
                found = (tail + block).find(ROW)
                if found >= 0:
                    starts.append(place - len(tail) + found)
                    break
                place += len(block)
                tail = (tail + block)[1 - len(ROW) :]
            else:
                break
    return [Stretch(path, a, b, b == end) for a, b in zip(starts, [*starts[1:], end], strict=True)]
