"""Log-probabilities of the reference for a data set: computed once, before the first step, and kept on disk where that
saves time, under a hash of all they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairlead.algorithms.stage import Stage
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import by_response, token_batch
from fairlead.data.render import Tree
from fairlead.data.sources import atomic_write
from fairlead.data.tokenize import default_folder
from fairlead.errors import DataError
from fairlead.models.roles import Models
from fairlead.types import TokenBatch

SHARD = 4096
"""Examples of one file: what an interrupted run computes again at most."""
CACHED_FROM = 1e14
"""Operations (2 a parameter and token) below which the user's cache folder is not used."""
OP_VERSION = 1
"""Of how log-probabilities are computed; a new one makes old files useless."""


def reference_logprobs(stage: Stage, trees: Sequence[Tree], read: Sequence[int] | None = None) -> list[list[Tensor]]:
    """For each tree one tensor [counted tokens] a response, on the CPU, in max(fp32, the model's type). ``read``: the
    trees that are wanted; the others have none.

    ``data.cache`` names the folder; null: the user's, for what takes long; none: nothing is kept. Raises DataError for
    a file that holds those of another model or of other data.
    """
    if read is not None and len(read) < len(trees):
        wanted = dict(zip(read, reference_logprobs(stage, [trees[i] for i in read]), strict=True))
        return [wanted.get(i, []) for i in range(len(trees))]
    cache = stage.recipe.data.cache
    work = 2.0 * stage.models.parameter_counts()["total"] * sum(tree.num_tokens for tree in trees)
    folder = None
    if cache != "none" and (cache is not None or work >= CACHED_FROM):
        facts = {"op_version": OP_VERSION, **_numerics(stage), **_weights(stage.models), "rows": _rows(trees)}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        parent = default_folder().parent if cache is None else Path(cache).expanduser()
        folder = parent / "reference" / key
        _agree(folder, facts)
    source = stage.dataset_source(
        [tree.num_tokens for tree in trees],
        lambda chosen: token_batch([trees[i] for i in chosen], packed=stage.packed, pad_id=stage.pad_id),
    )
    found: list[list[Tensor]] = []
    for first in range(0, len(trees), SHARD):
        last = min(first + SHARD, len(trees))
        path = None if folder is None else folder / f"{first:09d}.safetensors"
        numbers = [len(tree.responses) for tree in trees[first:last]]
        shard = None if path is None else _read(path, numbers)
        if not all(stage.ranks.gather(shard is not None)):
            shard = _measured(stage, source, trees, range(first, last), numbers)
            if path is not None and stage.ranks.is_leader:
                _write(path, shard)
        assert shard is not None
        found += shard
    return found


def _measured(
    stage: Stage, source: DatasetSource, trees: Sequence[Tree], which: range, numbers: Sequence[int]
) -> list[list[Tensor]]:
    """Those of a stretch of trees, of which each rank computes a part."""
    part = stage.ranks.part(len(which))
    own = which[part.start : part.stop]
    with stage.models.whole():
        made = list(measure(stage.models, source.in_order(own.start, own.stop), trees[own.start : own.stop]))
    if stage.ranks.size == 1:
        return made
    parts = stage.ranks.gather_tensors(_tensors(made) if made else {})
    flat = [values for part in parts if part for values in _split(part)]
    return _by_tree(flat, numbers)


@torch.no_grad()
def measure(models: Models, batches: Iterator[TokenBatch], trees: Sequence[Tree]) -> Iterator[list[Tensor]]:
    """The same, computed: one list for each of ``trees``, whose responses are the batches' sequences in order."""
    models.eval()
    flat: list[Tensor] = []
    try:
        with models.use("reference"):
            for batch in batches:
                flat += by_response(models(batch.to(models.device), _NEEDS).logprobs.cpu(), batch)
    finally:
        models.train()
    start = 0
    for tree in trees:
        yield flat[start : start + len(tree.responses)]
        start += len(tree.responses)


_NEEDS = frozenset({"logprobs"})


class MovingSource:
    """A source that moves the reference to the policy before every step that follows ``every`` others."""

    def __init__(self, source: DatasetSource, models: Models, every: int, mix: float) -> None:
        self._source, self._models, self._every, self._mix = source, models, every, mix
        self.num_steps = source.num_steps

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        for micro_batches in self._source:
            done = self._source.state_dict()["step"] - 1
            if done and done % self._every == 0:
                self._models.move_reference(self._mix)
            yield micro_batches

    def remake(self) -> list[TokenBatch]:
        return self._source.remake()

    def after_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return self._source.after_step(metrics)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state)


# --- what they depend on -------------------------------------------------------------------------------------------


def _numerics(stage: Stage) -> dict[str, Any]:
    model = stage.recipe.model
    return {
        "packed": stage.packed,
        "dtype": model.dtype,
        "device": stage.models.device.type,
        "quantize": None if model.quantize is None else model.quantize.model_dump(mode="json"),
        "attention": model.attention,
        "kernels": model.kernels,
    }


def _weights(models: Models) -> dict[str, str]:
    """The SHA-256 of what the reference computes with, as it lies in memory."""
    digest = hashlib.sha256()
    for name, tensor in models.reference_tensors():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"weights": digest.hexdigest()}


def _rows(trees: Sequence[Tree]) -> str:
    digest = hashlib.sha256()
    for tree in trees:
        digest.update(repr((tree.prompt, tree.responses, tree.prompt_mask)).encode())
    return digest.hexdigest()


# --- files ---------------------------------------------------------------------------------------------------------


def _agree(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / "facts.json"
    if path.is_file():
        before: dict[str, Any] = {}
        with suppress(ValueError):
            before = dict(json.loads(path.read_text("utf-8")))
        if before != facts:
            odd = sorted(name for name in facts if before.get(name) != facts[name])
            raise DataError(
                f"{folder} holds log-probabilities of another reference: {', '.join(odd)} differ",
                hint=f"remove {folder}, or set data.cache to another folder",
            )
        return
    with atomic_write(path) as file:
        file.write(json.dumps(facts, indent=1).encode())


def _write(path: Path, shard: Sequence[Sequence[Tensor]]) -> None:
    from safetensors.torch import save

    content = save(_tensors(shard))
    with atomic_write(path) as file:
        file.write(hashlib.sha256(content).digest() + content)


def _read(path: Path, numbers: Sequence[int]) -> list[list[Tensor]] | None:
    """A shard; none where there is none, or a damaged one."""
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    flat = _split(load(content[32:]))
    return _by_tree(flat, numbers) if len(flat) == sum(numbers) else None


def _tensors(shard: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    flat = [values for each in shard for values in each]
    return {"logprobs": torch.cat(flat), "lengths": torch.tensor([len(values) for values in flat])}


def _split(stored: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return torch.split(stored["logprobs"], [int(length) for length in stored["lengths"]])


def _by_tree(flat: Sequence[Tensor], numbers: Sequence[int]) -> list[list[Tensor]]:
    return [list(flat[end - number : end]) for end, number in zip(accumulate(numbers), numbers, strict=True)]
