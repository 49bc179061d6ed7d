"""Prepares a dump of any size, pass by pass, on all cores. Knows the order of the work; not what is done in it.

    scatter   stretches of Posts.xml    -> posts, parted by question          work/posts
    gather    a part of the posts       -> questions with answers, Markdown   work/questions
    resolve   hashes of all prompts     -> repeated questions, shared splits  work/resolved.npy
    emit      a part of the questions   -> rows of each output                work/rows
    join      the rows of an output     -> NAME.parquet

What a pass writes appears whole or not at all, and its counts after it, so a killed preparation goes on where it was.
Stretches and parts depend on the dump alone, so the number of processes does not change a byte.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairlead.data.sources import Counts, atomic_write, write_parquet

from .dump import find_sites, stretches
from .emit import SCHEMAS, emit
from .gather import gather
from .options import StackExchangeOptions
from .processes import processes
from .resolve import resolve
from .scatter import find_duplicates, scatter

VERSION = 1
PART_BYTES = (8 << 20, 64 << 20)
"""Least and most bytes of Posts.xml that a process holds in memory at once."""
_PARTS = 256
"""The most parts a dump is cut into, unless they would be larger than that."""
ALONE_BYTES = 8 << 20
"""A dump up to this size is prepared in this process: starting others would take longer."""

Say = Callable[[str], None]


def prepare(
    files: Sequence[Path], folder: Path, options: StackExchangeOptions, seed: int, say: Say, workers: int
) -> dict[str, Any]:
    """See ``write`` of the package; ``workers`` 0 is one a core."""
    work, passes = folder / ".work", folder / ".work" / "passes"
    sites = find_sites(files, work / "unpacked", say)
    size = sum(site.posts.stat().st_size for site in sites)
    at_once = min(max(size // _PARTS, PART_BYTES[0]), PART_BYTES[1])
    numbered = [(n, stretch) for n, site in enumerate(sites) for stretch in stretches(site.posts, at_once)]
    linked = [(n, s) for n, site in enumerate(sites) if site.links is not None for s in stretches(site.links, at_once)]
    parts = range(size // at_once + 1)
    plan = [[sites[n].name, stretch.path.name, stretch.end] for n, stretch in (*numbered, *linked)]
    _start(passes, [VERSION, asdict(options), seed, plan])
    posts, pairs = _targets(passes / "posts", numbered), _targets(passes / "links", linked)
    questions, rows, resolved = _targets(passes / "questions", parts), _targets(passes / "rows", parts), passes / "same"
    names, shards = [site.name for site in sites], [(n, t) for (n, _), t in zip(numbered, posts, strict=True)]

    with processes(1 if size <= ALONE_BYTES else workers or _cores(), passes) as run:
        scattering = [(scatter, t, s, n, len(parts), options) for t, (n, s) in zip(posts, numbered, strict=True)]
        linking = [(find_duplicates, t, s, n, options) for t, (n, s) in zip(pairs, linked, strict=True)]
        read = run("reading", [*scattering, *linking])
        asked = run("converting", [(gather, t, shards, names, part, options, seed) for part, t in enumerate(questions)])
        shutil.rmtree(passes / "posts", ignore_errors=True)
        same = run("comparing", [(resolve, resolved, questions, pairs)])
        written = run("sampling", [(emit, t, q, resolved, options, seed) for q, t in zip(questions, rows, strict=True)])
        shutil.rmtree(passes / "questions", ignore_errors=True)
        held = {name: [t for t, part in zip(rows, written, strict=True) if name in part["rows"]] for name in SCHEMAS}
        run("writing", [(join, passes / name, name, folder, found) for name, found in held.items() if found])
    shutil.rmtree(work)
    return _counts(read, asked, written) | {"moved_to_the_split_of_a_duplicate": sum(part["moved"] for part in same)}


def _cores() -> int:
    """Those this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _targets(folder: Path, things: Sequence[Any]) -> list[Path]:
    """A file name without suffix for each thing."""
    return [folder / f"{index:06d}" for index in range(len(things))]


def _start(passes: Path, plan: list[Any]) -> None:
    """Keeps what is there if it was made by this plan."""
    note = passes / "plan.json"
    found = json.dumps(plan).encode()
    if not note.exists() or note.read_bytes() != found:
        shutil.rmtree(passes, ignore_errors=True)
        with atomic_write(note) as file:
            file.write(found)


def join(target: Path, name: str, folder: Path, rows: Sequence[Path]) -> dict[str, Any]:
    """Writes the rows of all parts as one file, in their order."""
    import pyarrow

    def tables() -> Iterable[pyarrow.Table]:
        for path in rows:
            with pyarrow.memory_map(f"{path}-{name}.arrow") as source, pyarrow.ipc.open_file(source) as file:
                for index in range(file.num_record_batches):
                    yield pyarrow.Table.from_batches([file.get_batch(index)])

    return {"rows": write_parquet(folder / f"{name}.parquet", tables(), SCHEMAS[name])}


def _counts(*passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total, pairs = Counts(), Counts()
    splits, scores, merged = Counter[str](), Counter[str](), Counter[str]()
    for result in (result for results in passes for result in results):
        for sum_, part in ((total, result["counts"]), (pairs, result.get("pairs", Counts().as_dict()))):
            sum_.read += part["read"]
            sum_.kept += part["kept"]
            sum_.dropped.update(part["dropped"])
            sum_.notes.update(part["notes"])
        splits.update(result.get("splits", {}))
        scores.update(result.get("scores", {}))
        merged.update(result.get("merged", {}))
    assert total.read == total.kept + total.dropped.total()
    return total.as_dict() | {
        "splits": dict(sorted(splits.items())),
        "pairs": pairs.as_dict(),
        "scores": dict(sorted(scores.items(), key=lambda item: int(item[0]))),
        "equal_rows_merged": dict(sorted((+merged).items())),
    }
