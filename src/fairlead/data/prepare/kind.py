"""What a kind of raw data is: where it is published, under which licence, and how its files become rows. Knows none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
"""Takes one line of progress."""

OUTPUTS = (
    "pretrain", "sft", "preference", "ranking", "labelled", "prompts",
    "heldout_pretrain", "heldout_sft", "heldout_preference", "heldout_ranking", "heldout_labelled", "heldout_prompts",
)  # fmt: skip
"""Files of a prepared folder, each ``.jsonl`` or ``.parquet``; those without rows are left out."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a set is published. ``files`` are the patterns to fetch from the hub data set ``hub``."""

    url: str
    hub: str | None = None
    files: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict[str, str])
    """File name -> ``md5:...`` or ``sha256:...`` of the file as first published."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of raw data, or of data made here.

    ``find(path)`` lists the input files; it raises DataError where there are none. It is none where the rows are made
    from options and seed alone: then no path is given. ``write(files, folder, options, seed, say)`` writes the outputs
    into ``folder`` and returns what became of the rows: ``read``, ``kept`` and ``dropped`` by reason, and whatever else
    is worth knowing. The folder survives a kill and is handed to the next call with the same request, so a kind may
    leave finished work there under names of its own.
    """

    name: str
    about: str
    source: Source
    licence: str
    options: type
    """A frozen dataclass with a default for every field; its fields' docstrings are the help."""
    find: Callable[[Path], list[Path]] | None
    write: Callable[[Sequence[Path], Path, Any, int, Say], dict[str, Any]]
    research_only: bool = False
    """The licence forbids commercial use, or there is none."""
