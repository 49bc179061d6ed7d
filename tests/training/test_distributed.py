"""Several ranks do what one process does, and end together when one of them cannot go on."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import on_ranks
from tests.tiny import relative_error
from tests.training.parity import step

from fairlead.errors import RanksError, TrainingError
from fairlead.training.distributed import SHORT, Group
from fairlead.types import Ranks


class Seat(Ranks):
    """One of several ranks, of which only the sharing is asked."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_hold_every_item_once_and_differ_by_less_than_the_largest(size: int) -> None:
    draw = random.Random(size)
    for number in (0, 1, 5, 40):
        sizes = [draw.randint(1, 100) for _ in range(number)]
        shares = [Seat(rank, size).share(sizes) for rank in range(size)]
        parts = [list(Seat(rank, size).part(number)) for rank in range(size)]
        assert sorted(i for share in shares for i in share) == list(range(number))
        assert [i for part in parts for i in part] == list(range(number))
        loads = [sum(sizes[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes, default=0)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_one_rank_says_all_know(tmp_path: Path) -> None:
    def say(ranks: Group) -> Any:
        long = "é" * (SHORT * ranks.rank)
        tensors = {"a": torch.arange(3.0), "b": torch.tensor(True)} if ranks.rank else {}
        return [
            ranks.gather([ranks.rank, float("inf"), long]),
            ranks.gather_tensors(tensors),
            ranks.from_leader(lambda: "leader"),
            ranks.sums({"both": 0.5, f"only {ranks.rank}": 2.0}),
            ranks.whole([torch.full((2,), float(ranks.rank)), torch.tensor([7.0])] if ranks.rank else []),
        ]

    first, second = on_ranks(2, tmp_path, say)
    for said, tensors, leader, sums, whole in (first, second):
        assert said == [[0, float("inf"), ""], [1, float("inf"), "é" * SHORT]]
        assert tensors[0] == {} and tensors[1]["a"].tolist() == [0, 1, 2] and bool(tensors[1]["b"])
        assert leader == "leader" and sums == {"both": 1.0, "only 0": 2.0, "only 1": 2.0}
        assert whole.tolist() == [1, 1, 7]


OFFLINE: list[tuple[str, dict[str, Any]]] = [
    ("pretrain", {}),
    ("sft", {}),
    ("sft", {"train.batch_size": 1}),
    ("reward", {}),
    ("dpo", {}),
    ("dpo", {"dpo.loss": {"aot": 1.0, "sft": 0.5}, "train.batch_size": 5}),
    ("kto", {}),
    ("bco", {"train.batch_size": 3}),
]


ONLINE: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {"ppo.reward_scaling": "running", "ppo.num_samples": 2}),
    ("grpo", {"grpo.kl_in": "loss", "grpo.kl_coef": 0.1, "grpo.top_k": 40}),
    ("raft", {"raft.num_samples": 4, "raft.clean": ["strip"], "raft.discard": [{"contains": {"part": "b"}}]}),
    ("rft", {"rft.num_samples": 3}),
    ("online_dpo", {"online_dpo.rollout_rows": 6}),
]


def differences(size: int, cases: list[tuple[str, dict[str, Any]]], folder: Path) -> dict[str, float]:
    """Largest relative difference of a gradient on so many ranks from that of one process, by case."""

    def work(ranks: Ranks) -> list[Any]:
        return [
            step(algorithm, ranks, folder / f"{ranks.size}-{number}", more)
            for number, (algorithm, more) in enumerate(cases)
        ]

    alone, several = on_ranks(1, folder / "one", lambda _: work(Ranks())), on_ranks(size, folder / "several", work)
    assert not any(isinstance(each, str) for each in (*alone, *several)), (alone, several)
    found: dict[str, float] = {}
    for (algorithm, more), wanted, *got in zip(cases, alone[0], *several, strict=True):
        name = f"{algorithm} {more}"
        assert len({tuple(each["micro_batches"]) for each in got}) == 1 and len(got[0]["micro_batches"]) == size, name
        for each in got:
            assert each["metrics"] == pytest.approx(wanted["metrics"], rel=1e-9, abs=1e-12, nan_ok=True), name
            assert each["texts"] == wanted["texts"], name
            found[name] = max(found.get(name, 0.0), relative_error(each["gradients"], wanted["gradients"]))
        for tensors in zip(*(each["gradients"].values() for each in got), strict=True):
            assert all(torch.equal(tensors[0], other) for other in tensors), name
    return found


def test_two_ranks_have_the_gradients_of_one(tmp_path: Path) -> None:
    found = differences(2, OFFLINE, tmp_path)
    assert len(found) == len(OFFLINE) and max(found.values()) <= 1e-12, found


def test_two_ranks_sample_the_texts_of_one_and_have_its_gradients(tmp_path: Path) -> None:
    found = differences(2, ONLINE, tmp_path)
    assert len(found) == len(ONLINE) and max(found.values()) <= 1e-12, found


@pytest.mark.slow
def test_four_ranks_have_the_texts_and_gradients_of_one(tmp_path: Path) -> None:
    found = differences(4, OFFLINE + ONLINE, tmp_path)
    assert max(found.values()) <= 1e-12, found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_in_fp32_they_agree_within_one_in_a_hundred_thousand(size: int, tmp_path: Path) -> None:
    found = differences(size, [(name, {**more, "model.dtype": "float32"}) for name, more in OFFLINE], tmp_path)
    assert max(found.values()) <= 1e-5, found


# --- when one cannot go on ---


def test_the_error_of_one_is_the_error_of_all(tmp_path: Path) -> None:
    def work(ranks: Group) -> Any:
        seen = list[str]()
        for error in (TrainingError("no loss"), torch.OutOfMemoryError("CUDA out of memory")):
            try:
                with ranks.together():
                    if ranks.rank == 1:
                        raise error
                    ranks.gather("the others are still busy")
            except Exception as found:
                seen.append(f"{type(found).__name__}: {found}")
        return [*seen, ranks.gather("and go on")]

    first, second = on_ranks(2, tmp_path, work)
    assert first[:2] == [
        "TrainingError: rank 1: no loss",
        "OutOfMemoryError: rank 1: CUDA out of memory",
    ]
    assert second[:2] == ["TrainingError: no loss", "OutOfMemoryError: CUDA out of memory"]
    assert first[2] == second[2] == ["and go on"] * 2


def test_a_step_that_ran_out_of_memory_gives_its_memory_back(tmp_path: Path) -> None:
    def work(ranks: Group) -> bool:
        held: list[Any] = []

        def fail() -> None:
            activations = torch.zeros(3)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")

        with contextlib.suppress(torch.OutOfMemoryError), ranks.together():
            fail()
        gc.collect()
        return held[0]() is None

    assert on_ranks(2, tmp_path, work) == [True, True]


@pytest.mark.parametrize("way", ["fails", "dies", "hangs"])
def test_when_one_rank_is_gone_the_others_stop_and_name_it_and_its_step(way: str, tmp_path: Path) -> None:
    def work(ranks: Group) -> None:
        ranks.begin_step(7)
        if ranks.rank == 1:
            if way == "fails":
                raise ValueError("the shelf is bare")
            if way == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(15)
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.begin_step(8)
        ranks.gather(None)

    found = on_ranks(3, tmp_path, work, timeout=5.0)
    wanted = {
        "fails": r"RanksError: rank 1 \(process \d+ on .*\) in step 7 failed: .*the shelf is bare",
        "dies": r"RanksError: rank 1 \(process \d+ on .*\) in step 7 died",
        "hangs": r"RanksError: rank 1 \(process \d+ on .*\) in step 7 did not answer for \d+ s",
    }
    for each in (found[0], found[2]):
        assert re.match(wanted[way], each), each
    assert RanksError.exit_code == 8
