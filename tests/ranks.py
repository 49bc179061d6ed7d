"""Several ranks for tests: forks of this process, which has the imports behind it, and gloo between them."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from fairlead.training.distributed import Group

TIMEOUT = 60.0


def forked(tasks: Sequence[Callable[[], Any]], folder: Path, wait: bool = True) -> list[Any]:
    """What each of the tasks returns, each in a fork of its own; with ``wait=False`` the forks' process ids."""
    folder.mkdir(parents=True, exist_ok=True)
    pids = [_fork(task, folder / f"{number}.pickle") for number, task in enumerate(tasks)]
    return ended(pids, folder) if wait else pids


def ended(pids: Sequence[int], folder: Path) -> list[Any]:
    """What forks have returned; of one that raised, the error as text; of one that was killed, minus the signal."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [
        pickle.loads((folder / f"{number}.pickle").read_bytes()) if code >= 0 else code
        for number, code in enumerate(codes)
    ]


def _fork(task: Callable[[], Any], path: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        torch.set_num_threads(1)
        result = task()
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
        if not type(error).__module__.startswith("fairlead"):
            traceback.print_exc()
    path.write_bytes(pickle.dumps(result))
    os._exit(0)


def on_ranks(size: int, folder: Path, work: Callable[[Group], Any], *, timeout: float = TIMEOUT) -> list[Any]:
    """What ``work`` returns on each of so many ranks."""
    folder.mkdir(parents=True, exist_ok=True)

    def task(rank: int) -> Any:
        store = FileStore(str(folder / "store"), size)
        group = Group(store, rank, size, device=torch.device("cpu"), timeout=timeout)
        try:
            return work(group)
        except BaseException as error:
            group.leave_note(str(error))
            raise
        finally:
            group.close()

    return forked([lambda rank=rank: task(rank) for rank in range(size)], folder)


def started(size: int, folder: Path, work: Callable[[], Any], wait: bool = True) -> list[Any]:
    """The same for what finds its ranks by the environment, as torchrun sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def task(rank: int) -> Any:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return work()

    return forked([lambda rank=rank: task(rank) for rank in range(size)], folder, wait)
