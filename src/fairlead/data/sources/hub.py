"""Reads what the library `datasets` reads: a folder it saved, a data set of the hub. Knows no fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from fairlead.data.sources.files import COMPRESSED, format_of, nearest
from fairlead.data.sources.readers import ARCHIVES, READERS
from fairlead.data.sources.rows import Row
from fairlead.data.sources.splits import choose_split
from fairlead.errors import DataError


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def saved_rows(path: Path, notes: Counter[str], *, heldout: bool, prefer: Iterable[str]) -> Iterator[Row]:
    """Rows of a Dataset (every row), or of the split wanted of a DatasetDict (`choose_split`)."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and Arrow raise a different class for each kind of damage
        raise _unreadable(str(path), error) from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {None: loaded}
    yield from _split_rows(splits, str(path), notes, heldout=heldout, prefer=prefer)


def could_be_hub_id(name: str) -> bool:
    """``owner/name`` (a dot in it is no suffix), or ``owner/name:configuration``, and not the name of a data file."""
    parts = name.split("/")
    suffix = format_of(Path(name)).lower()
    return (
        len(parts) == 2
        and all(parts)
        and not name.startswith((".", "/", "~"))
        and suffix not in (*READERS, *ARCHIVES, *COMPRESSED)
    )


def hub_rows(name: str, notes: Counter[str], *, heldout: bool, prefer: Iterable[str]) -> Iterator[Row]:
    """Rows of the split wanted (`choose_split`) of a data set of the hub, streamed.

    Raises DataError where there is none of this name, no such split, or no network.
    """
    import datasets

    path, _, configuration = name.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None, streaming=True)
    except Exception as error:  # a different class for each way a hub can fail
        near = nearest(Path(name))
        raise DataError(
            f"{name} is no local file, and as a data set of the hub it cannot be read: {error}",
            f"did you mean {near}?" if near else "check the name and the network; offline, give a local copy",
        ) from error
    yield from _split_rows(cast("dict[str, Any]", splits), name, notes, heldout=heldout, prefer=prefer)


def _split_rows(
    splits: Mapping[Any, Iterable[Any]], source: str, notes: Counter[str], *, heldout: bool, prefer: Iterable[str]
) -> Iterator[Row]:
    for split in [None] if None in splits else choose_split(list(splits), source, heldout=heldout, prefer=prefer):
        place = source if split is None else f"{source} {split}"
        try:
            for number, row in enumerate(splits[split], start=1):
                yield Row(dict(row), f"{place} row {number}")
        except Exception as error:
            raise _unreadable(place, error) from error


def _unreadable(source: str, error: Exception) -> DataError:
    return DataError(f"{source} cannot be read: {error}", "is it whole? fetch or save it again")
