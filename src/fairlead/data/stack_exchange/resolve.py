"""Between the passes: which questions are asked twice, and which must share a split. Knows keys, not texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from fairlead.data.sources import atomic_write

from .gather import KEYS

_KEYS_AT_ONCE = 1 << 21
REPEATED = -1
RESOLVED = numpy.dtype([("place", "i8"), ("split", "i1")])
"""Questions whose split is not that of their prompt, by place; ``split`` is REPEATED for those to leave out."""

Places = NDArray[numpy.int64]


def resolve(target: Path, questions: Sequence[Path], links: Sequence[Path]) -> dict[str, Any]:
    """Writes ``TARGET.npy``: the questions that are repeated, and those whose split is that of another question.

    Of equal prompts the first by site and id stays. Questions joined by links between duplicates, through any number
    of others, take the split of the first of them that is kept; so do those joined through an equal prompt. Memory
    grows with the number of duplicates (some 300 bytes each), not with that of the questions.
    """
    keys = [path.with_suffix(".npy") for path in questions]
    edges = [numpy.load(path.with_suffix(".npy")) for path in links]
    repeated = [numpy.empty(0, numpy.int64)]
    for first, later in _equal_prompts(keys):
        repeated.append(later)
        edges.append(numpy.stack([first, later], axis=1))
    gone = numpy.concatenate(repeated)
    resolved = numpy.empty(len(gone), RESOLVED)
    resolved["place"], resolved["split"] = gone, REPEATED
    moved = _moved(numpy.concatenate([numpy.empty((0, 2), numpy.int64), *edges]), keys, gone)
    resolved = numpy.concatenate([resolved, moved])
    with atomic_write(target.with_suffix(".npy")) as sink:
        numpy.save(sink, resolved[numpy.argsort(resolved["place"])])
    return {"moved": len(moved)}


def _equal_prompts(keys: Sequence[Path]) -> Iterator[tuple[Places, Places]]:
    """Of the questions with one prompt, the first, and beside it each of the others."""
    total = sum(len(numpy.load(path, mmap_mode="r")) for path in keys)
    buckets = numpy.uint64(total // _KEYS_AT_ONCE + 1)
    for bucket in range(int(buckets)):
        found = [numpy.empty(0, KEYS)]
        for path in keys:
            part = numpy.load(path, mmap_mode="r")
            found.append(part[part["key"] % buckets == bucket])
        rows = numpy.concatenate(found)
        rows = rows[numpy.lexsort((rows["place"], rows["key"]))]
        is_first = numpy.ones(len(rows), bool)
        is_first[1:] = rows["key"][1:] != rows["key"][:-1]
        group = numpy.cumsum(is_first) - 1
        yield rows["place"][is_first][group[~is_first]], rows["place"][~is_first]


def _moved(edges: NDArray[numpy.int64], keys: Sequence[Path], gone: Places) -> NDArray[Any]:
    """The questions kept whose split is not that of the first kept one they are joined to."""
    nodes, ends = numpy.unique(edges, return_inverse=True)
    groups = numpy.array(union(len(nodes), ends.reshape(-1, 2).tolist()), numpy.int64)
    found = [numpy.empty(0, KEYS)]
    for path in keys:
        part = numpy.load(path, mmap_mode="r")
        found.append(part[numpy.isin(part["place"], nodes) & ~numpy.isin(part["place"], gone)])
    kept = numpy.concatenate(found)
    kept = kept[numpy.argsort(kept["place"])]
    group = groups[numpy.searchsorted(nodes, kept["place"])]
    _, first, of_group = numpy.unique(group, return_index=True, return_inverse=True)
    split = kept["split"][first][of_group]
    moved = numpy.empty(len(kept), RESOLVED)
    moved["place"], moved["split"] = kept["place"], split
    return moved[split != kept["split"]]


def union(number: int, edges: Sequence[Sequence[int]]) -> list[int]:
    """For each of ``number`` nodes, one node of its connected component, the same for all of them."""
    parents = list(range(number))

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for one, other in edges:
        parents[root(one)] = root(other)
    return [root(node) for node in range(number)]
