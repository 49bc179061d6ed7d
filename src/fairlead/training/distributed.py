"""Several processes that train one run together, as torchrun or accelerate starts them. Knows no algorithm, and sends
tensors, safetensors and JSON alone: nothing is unpickled.

When one of them fails, dies or hangs, the others end with its name: each leaves a note in the store through which they
met, and who leaves none is the one.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from fairlead.errors import RanksError, TrainingError
from fairlead.training.budget import is_out_of_memory
from fairlead.types import Ranks

GRACE = 3.0
"""Seconds in which those that live say so."""
SHORT = 4096
"""Bytes of a message that goes in one exchange; a longer one takes a second."""
TOLD = "told_to_all_ranks"
"""Marks an error that all ranks have. Who kept the error would keep the tensors of its frames, too many as they are."""


@contextmanager
def start(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """The ranks of this run, by the environment that torchrun and accelerate set; one process where there is none.

    ``timeout`` is how many seconds they wait for one of them. Raises RanksError in those that waited in vain.
    """
    if device.type == "cuda" and device.index is not None:  # some kernels are started on the current one
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    store, rank, size = _meet()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart, addresses in it do not
    prefix = f"fairlead/{attempt}/{next(_runs)}"
    group = Group(PrefixStore(prefix, store), rank, size, device=device, timeout=timeout)
    try:
        yield group
    except BaseException as error:
        group.leave_note(f"{type(error).__name__}: {error}")
        raise
    finally:
        group.close()


_runs = itertools.count()
"""Of this process: each has keys of its own in the store."""


@functools.cache
def _meet() -> tuple[Store, int, int]:
    return next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))


def _is_of_the_network(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "peer"))


class Group(Ranks):
    """Ranks that meet through ``store``: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, store: Store, rank: int, size: int, *, device: torch.device, timeout: float) -> None:
        self.rank, self.size = rank, size
        self._store, self._timeout, self._has_note = store, timeout, False
        self._count = 0
        """Of what was exchanged; tells who has come here and who has not."""
        store.set(f"who/{rank}", f"process {os.getpid()} on {platform.node()}")
        backend, wait = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timedelta(seconds=timeout)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
        except RuntimeError as error:
            raise RanksError(
                f"rank {rank} of {size} could not meet the others: {str(error).splitlines()[0]}",
                hint="see whether all were started, and whether their machines reach one another",
            ) from error

    def close(self) -> None:
        with suppress(Exception):
            dist.destroy_process_group()

    # --- what all know afterwards ---

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(blob) for blob in self._all(json.dumps(value, default=str).encode())]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        return [load(each) for each in self._all(blob)]

    def from_leader(self, say: Callable[[], Any]) -> Any:
        return self.gather(say() if self.is_leader else None)[0]

    def tensors_from_leader(self, say: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        blob = save(say()) if self.is_leader else b""
        sent = torch.frombuffer(bytearray(blob.ljust(self.gather(len(blob))[0], b"\0")), dtype=torch.uint8)
        with self._sent():
            dist.broadcast(sent, 0)
        return load(sent.numpy().tobytes())

    def _all(self, blob: bytes, failure: Exception | None = None) -> list[bytes]:
        """The bytes of each rank. Raises the ``failure`` of any of them, and the same on all."""
        head = bytes([failure is not None]) + len(blob).to_bytes(8, "little") + blob[:SHORT]
        heads = self._exchange(head, 9 + SHORT)
        lengths = [int.from_bytes(each[1:9], "little") for each in heads]
        found = [each[9 : 9 + length] for each, length in zip(heads, lengths, strict=True)]
        failed: list[Any] = [(*json.loads(found[rank]), rank) for rank in range(self.size) if heads[rank][0]]
        if failed:
            memory, message, rank = min(failed)
            known = self._failure(memory, message, rank, failure)
            setattr(known, TOLD, True)
            raise known
        if (longest := max(lengths)) > SHORT:
            rest = self._exchange(blob[SHORT:], longest - SHORT)
            found = [
                head + each[: max(0, length - SHORT)] for head, each, length in zip(found, rest, lengths, strict=True)
            ]
        return found

    def _exchange(self, blob: bytes, length: int) -> list[bytes]:
        own = torch.frombuffer(bytearray(blob.ljust(length, b"\0")), dtype=torch.uint8)
        all_ranks = [torch.empty_like(own) for _ in range(self.size)]
        with self._sent():
            dist.all_gather(all_ranks, own)
        return [each.numpy().tobytes() for each in all_ranks]

    @torch.no_grad()
    def alike(self, parameters: Mapping[str, nn.Parameter]) -> None:
        shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        for rank, other in enumerate(self.gather(shapes)):
            if other != shapes:
                raise RanksError(f"rank {rank} has other parameters than rank {self.rank}", "the same model everywhere")
        for parameter in parameters.values():
            with self._sent():
                dist.broadcast(parameter.data, 0)

    # --- one step ---

    def begin_step(self, step: int) -> None:
        with self._sent():
            self._store.set(f"step/{self.rank}", str(step))

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.is_sharded:  # the others wait inside a forward, where nothing can be said
                if _is_of_the_network(error):
                    raise self._lost(0.0) from error
                raise
            if not hasattr(error, TOLD) and not isinstance(error, RanksError):
                # The others are where they next exchange something, inside or at the end.
                self._all(json.dumps([is_out_of_memory(error), str(error)[:300]]).encode(), error)
            raise
        self.gather(None)

    def _failure(self, memory: bool, message: str, rank: int, own: Exception | None) -> Exception:
        """What all ranks raise, as this one has it. Want of memory comes last: it alone can be mended."""
        if rank == self.rank and own is not None:
            return own
        return (torch.OutOfMemoryError if memory else TrainingError)(f"rank {rank}: {message}")

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """In one all-reduce for each type of gradient, with one number a parameter that says how many had one."""
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if hasattr(parameter, "to_local"):  # sharded: the backward pass has summed them
                continue
            by_type.setdefault(parameter.dtype, []).append(parameter)
        for group in by_type.values():
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            has = torch.tensor([float(p.grad is not None) for p in group], dtype=own[0].dtype, device=own[0].device)
            flat = torch.cat([has, *(gradient.flatten() for gradient in own)])
            with self._sent():
                dist.all_reduce(flat)
            known = flat[: len(group)].tolist()
            summed = flat[len(group) :].split([p.numel() for p in group])
            for parameter, values, ranks in zip(group, summed, known, strict=True):
                parameter.grad = values.view_as(parameter) if ranks else None

    # --- when one is gone ---

    def leave_note(self, text: str) -> None:
        """What the others are told of this rank's end."""
        if not self._has_note:
            self._has_note = True
            with suppress(Exception):  # the store may be gone with the one that kept it
                self._store.set(f"note/{self.rank}", text)

    @contextmanager
    def _sent(self) -> Iterator[None]:
        started = time.monotonic()
        self._count += 1
        try:
            self._store.set(f"at/{self.rank}", str(self._count))
            yield
        except RuntimeError as error:  # gloo's, NCCL's and the store's
            raise self._lost(time.monotonic() - started) from error

    def _lost(self, waited: float) -> RanksError:
        """Names who failed, or who says nothing."""
        self.leave_note("")
        notes: dict[int, str] = {self.rank: ""}
        deadline = time.monotonic() + GRACE
        while len(notes) < self.size and time.monotonic() < deadline:
            for rank in set(range(self.size)) - notes.keys():
                with suppress(Exception):
                    if self._store.check([f"note/{rank}"]):
                        notes[rank] = self._store.get(f"note/{rank}").decode()
            time.sleep(0.05)
        hint = "the same command continues the run from its last checkpoint"
        for rank, note in sorted(notes.items()):
            if note:
                return RanksError(f"{self._name(rank)} failed: {note}", hint)
        silent = sorted(set(range(self.size)) - notes.keys())
        if not silent:
            return RanksError(f"rank {self.rank} lost the others, and all of them live", f"look at the network; {hint}")
        behind = [rank for rank in silent if self._place(rank) < self._count]
        who = ", ".join(map(self._name, behind or silent))
        if waited < 0.9 * self._timeout:
            return RanksError(f"{who} died: no word of why", hint)
        return RanksError(f"{who} did not answer for {waited:.0f} s (train.timeout)", f"look at what it does; {hint}")

    def _place(self, rank: int) -> int:
        with suppress(Exception):
            return int(self._store.get(f"at/{rank}")) if self._store.check([f"at/{rank}"]) else 0
        return 0

    def _name(self, rank: int) -> str:
        who, step = f"rank {rank}", ""
        with suppress(Exception):
            who = f"rank {rank} ({self._store.get(f'who/{rank}').decode()})"
            step = f" in step {self._store.get(f'step/{rank}').decode()}" if self._store.check([f"step/{rank}"]) else ""
        return who + step
