import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fairlead.data.render import Tree
from fairlead.errors import CheckpointError
from fairlead.rollout import store as store_module
from fairlead.rollout.experience import Experience
from fairlead.rollout.store import RolloutStore
from fairlead.types import Prompt, Rollout

PROMPTS = [Prompt("one", {"gold": 1}), Prompt(({"role": "user", "content": "two"},))]


def rollouts() -> list[Rollout]:
    return [
        Rollout(PROMPTS[0], (1, 2), (3, 4, 5), (-0.1, -1e-17, -1 / 3), True, "good\u2028 \U0001f600 day"),
        Rollout(PROMPTS[1], (6,), (7,), (-2.0,), False, ""),
    ]


def refuse() -> list[Rollout]:
    raise AssertionError("sampled again")


def tensors() -> dict[str, Tensor]:
    return {
        "token/values": torch.arange(6.0).view(2, 3).T,  # not contiguous
        "ids": torch.tensor([1, 2, 3]),
        "finished": torch.tensor([True, False]),
    }


ROWS = [{"prompt": "one", "score": 0.5}, {"prompt": "zwölf\n", "score": -1.0}]
TEXTS = {"samples": [{"prompt": "one"}], "scored": ROWS}
FILES = ["round.json", "round.safetensors", "samples.jsonl", "scored.jsonl"]


# --- chunks --------------------------------------------------------------------------------------------------------


def test_a_chunk_sampled_before_is_read_back_and_not_sampled_again(tmp_path: Path) -> None:
    assert RolloutStore(tmp_path).chunk(3, 0, PROMPTS, rollouts) == rollouts()
    again = RolloutStore(tmp_path).chunk(3, 0, PROMPTS, refuse)
    assert again == rollouts()
    assert [type(row.response_ids) for row in again] == [tuple, tuple]
    assert [row.prompt is prompt for row, prompt in zip(again, PROMPTS, strict=True)] == [True, True]


def test_rounds_and_chunks_are_kept_apart(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    for round_number, number in ((0, 0), (0, 1), (1, 0)):
        store.chunk(
            round_number,
            number,
            PROMPTS[:1],
            lambda text=f"{round_number}.{number}": [dataclasses.replace(rollouts()[0], text=text)],
        )
    for round_number, number in ((1, 0), (0, 1), (0, 0)):
        (row,) = store.chunk(round_number, number, PROMPTS[:1], refuse)
        assert row.text == f"{round_number}.{number}"


def test_a_rollout_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollouts()[0].text = "better"  # type: ignore[misc]


def test_an_interrupted_chunk_is_sampled_again_in_full(tmp_path: Path) -> None:
    def interrupted() -> list[Rollout]:
        raise KeyboardInterrupt

    store = RolloutStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.chunk(0, 0, PROMPTS, interrupted)
    assert store.chunk(0, 0, PROMPTS, rollouts) == rollouts()


@pytest.mark.parametrize("bit", [0x20])
def test_a_chunk_in_which_any_byte_changed_is_sampled_again(tmp_path: Path, bit: int) -> None:
    store, path = RolloutStore(tmp_path), tmp_path / "000" / "chunk-000.json"
    store.chunk(0, 0, PROMPTS, rollouts)
    data, sampled = path.read_bytes(), list[int]()

    def sample() -> list[Rollout]:
        sampled.append(1)
        return rollouts()

    for at in range(len(data)):
        path.write_bytes(bytes([*data[:at], data[at] ^ bit, *data[at + 1 :]]))
        assert store.chunk(0, 0, PROMPTS, sample) == rollouts()
        assert path.read_bytes() == data
    assert len(sampled) == len(data)
    path.write_bytes(data[: len(data) // 2])
    assert store.chunk(0, 0, PROMPTS, sample) == rollouts()


# --- rounds --------------------------------------------------------------------------------------------------------


def test_a_finished_round_comes_back_bit_for_bit_and_its_chunks_go(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.chunk(3, 0, PROMPTS, rollouts)
    assert not store.has(3)
    digest = store.save(3, tensors(), TEXTS)
    assert store.has(3)
    assert not store.has(4)
    found, again = RolloutStore(tmp_path).load(3)
    assert again == digest
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert sorted(os.listdir(tmp_path / "003")) == FILES
    lines = (tmp_path / "003" / "scored.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert "zwölf" in lines[1]


def test_the_hash_is_that_of_the_tensors_alone(tmp_path: Path) -> None:
    store, changed = RolloutStore(tmp_path), tensors()
    changed["ids"][0] += 1
    digests = [store.save(0, tensors(), TEXTS), store.save(1, tensors(), {}), store.save(2, changed, TEXTS)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["round.safetensors", "samples.jsonl", "scored.jsonl"])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(bytes([*path.read_bytes()[:-1], path.read_bytes()[-1] ^ 1])),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        lambda path: path.unlink(),
    ],
    ids=["a bit", "cut", "longer", "gone"],
)
def test_a_round_whose_file_was_changed_is_an_error_that_names_it(
    tmp_path: Path, name: str, change: Callable[[Path], object]
) -> None:
    store = RolloutStore(tmp_path)
    for number in (0, 1):
        store.save(number, tensors(), TEXTS)
    change(tmp_path / "000" / name)
    with pytest.raises(CheckpointError, match=rf"000/{name} was changed after it was written\nhint: "):
        store.load(0)
    store.load(1)


def test_no_byte_of_the_checksums_can_change_to_a_crash_or_to_other_rows(tmp_path: Path) -> None:
    store, path = RolloutStore(tmp_path), tmp_path / "000" / "round.json"
    digest, data, noticed = store.save(0, tensors(), TEXTS), path.read_bytes(), 0
    for at in range(len(data)):
        for bit in (1, 0x20):
            path.write_bytes(bytes([*data[:at], data[at] ^ bit, *data[at + 1 :]]))
            try:
                assert store.load(0)[1] == digest  # a blank that became another
            except CheckpointError as error:
                noticed += 1
                assert "was changed after it was written\nhint: " in str(error)
    assert noticed > 1.9 * len(data)


def test_chunks_that_a_kill_left_beside_a_whole_round_go_when_it_is_read(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.save(0, tensors(), TEXTS)
    store.chunk(0, 0, PROMPTS, rollouts)
    store.load(0)
    assert sorted(os.listdir(tmp_path / "000")) == FILES


def test_the_scored_rows_that_are_kept_get_a_file_of_their_own(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.save(0, tensors(), TEXTS)
    store.select(0, [False, True])
    found = (tmp_path / "000" / "selected.jsonl").read_text("utf-8")
    assert [json.loads(line) for line in found.splitlines()] == [ROWS[1]]
    store.load(0)


def test_text_that_is_half_a_surrogate_pair_can_be_kept(tmp_path: Path) -> None:
    store, broken = RolloutStore(tmp_path), dataclasses.replace(rollouts()[0], text="cut \ud83d")
    store.chunk(0, 0, PROMPTS[:1], lambda: [broken])
    assert store.chunk(0, 0, PROMPTS[:1], refuse) == [broken]
    store.save(0, tensors(), {"scored": [{"response": "cut \ud83d"}]})
    store.load(0)


# --- a full disk ---------------------------------------------------------------------------------------------------


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_chunk_that_could_be_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RolloutStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"chunk-000\.json could not be written: .*No space.*\nhint: make room"
        ):
            store.chunk(0, 0, PROMPTS, rollouts)
    assert os.listdir(tmp_path / "000") == []
    assert store.chunk(0, 0, PROMPTS, rollouts) == rollouts()


@pytest.mark.parametrize("written", range(len(FILES)))
def test_a_round_is_final_only_when_all_its_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    store, calls = RolloutStore(tmp_path), iter(range(len(FILES)))
    store.chunk(0, 0, PROMPTS, rollouts)
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", lambda number: full(number) if next(calls) == written else None)
        with pytest.raises(CheckpointError, match="could not be written"):
            store.save(0, tensors(), TEXTS)
    assert not store.has(0)
    assert not [name for name in os.listdir(tmp_path / "000") if name.startswith(".")]
    assert store.chunk(0, 0, PROMPTS, refuse) == rollouts()
    digest = store.save(0, tensors(), TEXTS)
    assert store.load(0)[1] == digest


def test_a_folder_that_cannot_be_made_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        RolloutStore(tmp_path / "file").save(0, tensors(), TEXTS)


def test_what_was_measured_of_a_round_has_one_order_however_it_is_read() -> None:
    tree = Tree((5, 6), ((7, 1), (8, 1)))
    made = Experience([tree], {}, torch.tensor([0.5, 1.0]), torch.tensor([True, True]))
    made.measured.update({"unique_1": 1.0, "finished": 0.5, "distinct_2": 0.25})
    tensors = made.tensors()
    ways = [Experience.from_tensors({name: tensors[name] for name in order}) for order in (tensors, [*tensors][::-1])]
    assert list(ways[0].measured) == list(ways[1].measured)
    assert ways[0].measured == made.measured
