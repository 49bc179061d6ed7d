"""Stack Exchange data dumps, of any size, as questions with scored answers. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .dump import posts_files
from .options import StackExchangeOptions
from .questions import Answer, Question, answer_score, sample_pairs

__all__ = ["Answer", "Question", "StackExchangeOptions", "answer_score", "posts_files", "sample_pairs", "write"]


def write(
    files: Sequence[Path],
    folder: Path,
    options: StackExchangeOptions,
    seed: int,
    say: Callable[[str], None],
    *,
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes the outputs that have rows, ``pretrain.parquet`` to ``heldout_prompts.parquet``, into ``folder``.

    ``files`` are those of ``posts_files``; ``workers`` processes share the work, one a core if not given, and their
    number does not change a byte. What a killed call has finished, in ``folder/.work``, is not done again. Returns the
    counts: posts ``read``, ``kept`` and ``dropped`` by reason, ``splits``, ``pairs``, ``scores`` of the answers kept.

    Raises DataError for archives and XML that do not serve (see ``options.on_error``) and for disks that are full.
    """
    from .run import prepare

    return prepare(files, folder, options, seed, say, workers or 0)
