"""Records to trees at the size of a data set: in parallel processes, kept on disk under a hash of all they depend on.

What comes back is what the renderer would give.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fairlead.data.render import LengthCounts, Rendered, Renderer, Tree
from fairlead.data.sources import atomic_write
from fairlead.errors import DataError
from fairlead.types import Record

PARALLEL_FROM = 4000
"""Records below which processes cost more than they save."""
CHUNK = 500
CACHED_FROM = 1 << 20
"""Characters below which the user's cache folder is not used: they are rendered as fast as read."""
UNUSED_DAYS = 30
"""Files of the cache that nobody has read for so long are removed when another is written."""
_CODE = ("render.py", "templates.py", "chat.py", "tokenize.py")


def trees(renderer: Renderer, records: Sequence[Record], *, workers: int = 1, cache: str | None = "none") -> Rendered:
    """What ``renderer.trees(records)`` gives.

    ``workers`` processes, 0 for one a core. ``cache`` is a folder; None: the user's, for large sets; "none": none is
    used. A file of the cache that is damaged is made anew. Raises DataError as the renderer does, when a process dies,
    and when a folder that was named cannot be written.
    """
    path = None if cache == "none" else _path(renderer, records, cache)
    found = None if path is None else _read(path)
    if found is not None:
        return found
    made = _merged(_in_processes(renderer, records, workers or cores()))
    renderer.refuse_none(made[0], made[2])
    if path is not None:
        with suppress(*[] if cache else [DataError]):
            _write(path, made)
    return made


# --- processes -----------------------------------------------------------------------------------------------------

_inherited: tuple[Renderer, Sequence[Record]]


def _in_processes(renderer: Renderer, records: Sequence[Record], workers: int) -> Iterator[Rendered]:
    """The records part by part, in order. Processes are forks, which inherit the records; where a system has none that
    are safe, this process does the work."""
    if workers == 1 or len(records) < PARALLEL_FROM or sys.platform != "linux":
        yield renderer.limited(records)
        return
    size = max(CHUNK, -(-len(records) // (4 * workers)))
    starts = range(0, len(records), size)
    fork = multiprocessing.get_context("fork")
    with (
        _no_threads_of_tokenizers(),
        ProcessPoolExecutor(workers, fork, initializer=_inherit, initargs=(renderer, records)) as pool,
    ):
        try:
            for start, flat in zip(starts, pool.map(_part, [(start, size) for start in starts]), strict=True):
                made, kept, counts = _unflat(flat)
                yield made, [start + index for index in kept], counts
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenised the records was killed, perhaps for want of memory",
                hint="lower data.workers",
            ) from error


def _inherit(renderer: Renderer, records: Sequence[Record]) -> None:
    global _inherited
    _inherited = renderer, records


def _part(span: tuple[int, int]) -> dict[str, np.ndarray]:
    renderer, records = _inherited
    return _flat(renderer.limited(records[span[0] : span[0] + span[1]]))


@contextmanager
def _no_threads_of_tokenizers() -> Iterator[None]:
    """A fork that inherits the thread pool of `tokenizers` would wait for threads it does not have."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _merged(parts: Iterable[Rendered]) -> Rendered:
    made: list[Tree] = []
    kept: list[int] = []
    counts = LengthCounts()
    for part, indices, part_counts in parts:
        made += part
        kept += indices
        counts.kept += part_counts.kept
        counts.cut += part_counts.cut
        counts.dropped += part_counts.dropped
    return made, kept, counts


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# --- cache ---------------------------------------------------------------------------------------------------------


def default_folder() -> Path:
    """Where tokens are kept when no folder is named: below $XDG_CACHE_HOME, or ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fairlead" / "tokens"


def _path(renderer: Renderer, records: Sequence[Record], cache: str | None) -> Path | None:
    """The file that holds the trees of these records; none where they are few and no folder is named, and for
    tokenizers whose state cannot be written down."""
    if getattr(renderer.tokenizer, "backend_tokenizer", None) is None:
        return None
    digest, size = hashlib.sha256(), 0
    for record in records:
        text = repr(record).encode("utf-8", "surrogatepass")
        size += len(text)
        digest.update(len(text).to_bytes(8) + text)
    if cache is None and size < CACHED_FROM:
        return None
    digest.update(json.dumps(_ingredients(renderer)).encode())
    return (Path(cache).expanduser() if cache else default_folder()) / f"{digest.hexdigest()}.trees"


def _ingredients(renderer: Renderer) -> list[Any]:
    """What ids depend on besides the records."""
    import jinja2
    import tokenizers
    import transformers

    tokenizer = renderer.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["padding"], state["truncation"]  # set by whoever used the tokenizer last, and not by us
    here = Path(__file__).parent
    return [
        [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in _CODE],
        [jinja2.__version__, tokenizers.__version__, transformers.__version__],
        state,
        {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        tokenizer.chat_template,
        [renderer.template, renderer.max_length, renderer.max_prompt_length, renderer.loss_on],
    ]


def _write(path: Path, made: Rendered) -> None:
    from safetensors.numpy import save

    content = save(_flat(made))
    with atomic_write(path) as file:
        file.write(hashlib.sha256(content).digest() + content)
    for other in path.parent.glob("*.trees"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > UNUSED_DAYS * 86400:
                other.unlink()


def _read(path: Path) -> Rendered | None:
    """The trees in a file; none where there is no such file, or a damaged one."""
    from safetensors.numpy import load

    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    with suppress(OSError):
        os.utime(path)
    return _unflat(load(content[32:]))


def _flat(made: Rendered) -> dict[str, np.ndarray]:
    """Trees as a few long arrays."""
    held, kept, counts = made
    responses = [ids for tree in held for ids in tree.responses]
    said = json.dumps({"cut": counts.cut, "dropped": counts.dropped})
    return {
        "prompts": _joined([tree.prompt for tree in held], np.int32),
        "prompt_lengths": np.array([len(tree.prompt) for tree in held], np.int32),
        "masks": _joined([tree.prompt_mask for tree in held], np.uint8),
        "mask_lengths": np.array([len(tree.prompt_mask) for tree in held], np.int32),
        "responses": _joined(responses, np.int32),
        "response_lengths": np.array([len(ids) for ids in responses], np.int32),
        "num_responses": np.array([len(tree.responses) for tree in held], np.int32),
        "kept": np.array(kept, np.int64),
        "counts": np.frombuffer(said.encode(), np.uint8),
    }


def _joined(rows: Sequence[Sequence[int]], kind: type[np.generic]) -> np.ndarray:
    total = sum(map(len, rows))
    return np.fromiter((value for row in rows for value in row), kind, total)


def _unflat(flat: dict[str, np.ndarray]) -> Rendered:
    prompts = _parts(flat["prompts"], flat["prompt_lengths"])
    masks = _parts(flat["masks"].astype(bool), flat["mask_lengths"])
    responses = _parts(flat["responses"], flat["response_lengths"])
    held = [
        Tree(next(prompts), tuple(islice(responses, number)), next(masks)) for number in flat["num_responses"].tolist()
    ]
    counts = json.loads(flat["counts"].tobytes())
    return held, flat["kept"].tolist(), LengthCounts(len(held), counts["cut"], Counter(counts["dropped"]))


def _parts(values: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[Any, ...]]:
    flat, start = values.tolist(), 0
    for length in lengths.tolist():
        yield tuple(flat[start : start + length])
        start += length
