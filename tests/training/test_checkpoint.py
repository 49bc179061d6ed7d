import errno
import json
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as real_save_file
from torch import Tensor, nn

from fairlead.config import OptimSection
from fairlead.errors import CheckpointError, Interrupted
from fairlead.training import checkpoint, stored
from fairlead.training.checkpoint import Checkpointer, RunState, load_weights, newest, sealed, verify
from fairlead.training.optim import Optimizer
from fairlead.types import Progress


class Part:
    """A part of the run whose state is one value."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.value = state["value"]


def fresh(seed: int = 0, part: Any = None) -> RunState:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "weight": nn.Parameter(torch.randn(4, 3, generator=generator).T),  # not contiguous
        "half": nn.Parameter(torch.randn(5, generator=generator).bfloat16()),
        "scale": nn.Parameter(torch.randn((), generator=generator)),
    }
    return RunState(parameters, Optimizer(OptimSection(learning_rate=0.05), parameters, 100), {"part": Part(part)})


def train(state: RunState, *steps: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in state.parameters.values():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        state.optimizer.clip()
        state.optimizer.step(step)


def tensors(state: RunState) -> dict[str, Tensor]:
    weights = {name: parameter.detach() for name, parameter in state.parameters.items()}
    return {name: value.clone() for name, value in (weights | state.optimizer.tensors()).items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def saved(folder: Path, step: int) -> Path:
    """A whole checkpoint of ``step``; the weights say which."""
    state = fresh(seed=step, part=step)
    train(state, 1)
    path = folder / f"step-{step:06d}"
    state.save(path, step)
    return path


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(sealed(manifest | changes))


# --- there and back ------------------------------------------------------------------------------------------------


def test_a_checkpoint_brings_weights_optimizer_and_parts_back_bit_for_bit(tmp_path: Path) -> None:
    state = fresh(part={"cursor": 3, "float": 0.1 + 0.2, "none": None})
    train(state, 1, 2, 3)
    state.save(tmp_path / "step-000003", 3)
    restored = fresh(seed=9)
    restored.load(tmp_path / "step-000003")
    assert_equal(tensors(restored), tensors(state))
    assert restored.parts["part"].state_dict() == {"value": {"cursor": 3, "float": 0.1 + 0.2, "none": None}}
    for each in (state, restored):
        train(each, 4, 5)
    assert_equal(tensors(restored), tensors(state))


def test_a_checkpoint_holds_tensors_and_json_and_the_checksum_of_every_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, 7)
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert (manifest["step"], manifest["threads"]) == (7, torch.get_num_threads())
    assert os.listdir(tmp_path) == ["step-000007"]


def test_the_weights_can_be_loaded_alone(tmp_path: Path) -> None:
    folder, state = saved(tmp_path, 2), fresh(seed=5)
    before = state.optimizer.tensors()
    load_weights(folder, state.parameters)
    wanted = load_file(folder / "model.safetensors")
    assert_equal({name: parameter.detach() for name, parameter in state.parameters.items()}, wanted)
    assert state.optimizer.tensors() == before == {}


def test_parameters_of_another_model_are_an_error(tmp_path: Path) -> None:
    folder, state = saved(tmp_path, 1), fresh()
    other = RunState({**state.parameters, "more": nn.Parameter(torch.zeros(1))}, state.optimizer, state.parts)
    with pytest.raises(CheckpointError, match=r"holds other parameters than this model: more"):
        other.load(folder)


def test_another_number_of_threads_is_an_error_that_says_which_to_set(tmp_path: Path) -> None:
    folder, state = saved(tmp_path, 1), fresh(seed=8)
    before = tensors(state)
    rewrite_manifest(folder, threads=77)
    with pytest.raises(CheckpointError, match=r"trained with 77 CPU threads.*\nhint: set threads=77") as caught:
        state.load(folder)
    assert caught.value.exit_code == 6
    assert_equal(tensors(state), before)


# --- torn, damaged, foreign ----------------------------------------------------------------------------------------


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)

    return damage


DAMAGES = {
    "no manifest": remove_manifest,
    "empty manifest": lambda folder: os.truncate(folder / "manifest.json", 0),
    "cut manifest": cut("manifest.json"),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest without files": lambda folder: (folder / "manifest.json").write_text('{"format_version": 2}'),
    "cut weights": cut("model.safetensors"),
    "cut state": cut("state.json"),
    "flipped weights": flip("model.safetensors"),
    "flipped optimizer": flip("optimizer.safetensors"),
    "flipped state": flip("state.json"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    whole, damaged = saved(tmp_path, 1), saved(tmp_path, 2)
    said: list[str] = []
    assert newest(tmp_path, said.append) == damaged
    assert said == []
    damage(damaged)
    assert newest(tmp_path, said.append) == whole
    assert len(said) == 1
    assert "step-000002" in said[0]


def test_no_checkpoint_is_none_and_no_word_is_lost_about_it(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest(tmp_path / "checkpoints", said.append) is None
    remove_manifest(saved(tmp_path, 1))
    (tmp_path / ".writing-step-000002").mkdir()
    assert said == []
    assert newest(tmp_path, said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("bit", [1, 0x20])
def test_any_byte_that_changes_in_any_file_is_noticed_and_the_checkpoint_before_is_used(
    tmp_path: Path, bit: int
) -> None:
    before, folder = saved(tmp_path, 1), saved(tmp_path, 2)
    for path in folder.iterdir():
        data = path.read_bytes()
        for at in range(0, len(data), 1 if path.name == "manifest.json" else 7):
            path.write_bytes(bytes([*data[:at], data[at] ^ bit, *data[at + 1 :]]))
            said: list[str] = []
            assert newest(tmp_path, said.append) == before, f"{path.name}, byte {at}"
            assert len(said) == 1 and "the checkpoint before it is used" in said[0]
        path.write_bytes(data)
    assert newest(tmp_path, print) == folder


def test_a_manifest_written_before_manifests_had_a_checksum_is_of_another_version(tmp_path: Path) -> None:
    path = saved(tmp_path, 1) / "manifest.json"
    old = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(json.dumps(old | {"format_version": 1}, indent=1) + "\n")
    with pytest.raises(CheckpointError, match="has format version 1, this Fairlead reads 2"):
        verify(path.parent)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version_is_an_error_and_not_passed_over(tmp_path: Path, version: Any) -> None:
    saved(tmp_path, 1)
    folder = saved(tmp_path, 2)
    rewrite_manifest(folder, format_version=version)
    for act in (lambda: verify(folder), lambda: newest(tmp_path, print), lambda: fresh().load(folder)):
        with pytest.raises(
            CheckpointError, match=rf"has format version {version}, this Fairlead reads 2\nhint: "
        ) as caught:
            act()
        assert caught.value.exit_code == 6


def test_the_newest_is_that_of_the_highest_step_also_after_a_million(tmp_path: Path) -> None:
    million = saved(tmp_path, 1_000_000)
    saved(tmp_path, 999_999)
    assert newest(tmp_path, print) == million


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    folder, state = saved(tmp_path, 1), fresh(seed=4)
    first = (folder / "manifest.json").read_bytes()
    state.save(folder, 1)
    assert (folder / "manifest.json").read_bytes() == first
    for damage in DAMAGES.values():
        damage(folder)
        state.save(folder, 1)
        assert verify(folder) is None
        load_weights(folder, restored := fresh().parameters)
        assert torch.equal(restored["weight"], state.parameters["weight"])


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / ".writing-step-000001"
    left.mkdir()
    (left / "rubbish").touch()
    folder = saved(tmp_path, 1)
    assert verify(folder) is None
    assert os.listdir(tmp_path) == ["step-000001"]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at_the_second_file() -> Callable[..., None]:
    calls = iter([real_save_file, full])
    return lambda *arguments: next(calls)(*arguments)


@pytest.mark.parametrize(
    ("name", "failing"),
    [("save_file", full), ("save_file", full_at_the_second_file()), ("write_text", full), ("_fsync", full)],
    ids=["weights", "optimizer", "state", "sync"],
)
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failing: Callable[..., None]
) -> None:
    before = saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(stored if name == "save_file" else checkpoint, name, failing)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left.*\nhint: ") as caught:
            saved(tmp_path, 2)
    assert caught.value.exit_code == 6
    assert os.listdir(tmp_path) == ["step-000001"]
    assert newest(tmp_path, print) == before
    assert verify(saved(tmp_path, 2)) is None


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
def test_a_device_that_is_full_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened and written by Python alone: what writes by renaming would replace the device."""

    def to_full(path: Path, text: str) -> None:
        with open("/dev/full", "w") as file:
            file.write(text)

    before = saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_text", to_full)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left"):
            saved(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert newest(tmp_path, print) == before


def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses files of more than 64 kB, the weights are 400 kB: the error is that of the real writer."""
    before, parameters = saved(tmp_path, 1), {"weight": nn.Parameter(torch.zeros(100_000))}
    state = RunState(parameters, Optimizer(OptimSection(), parameters, 1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*File too large"):
            state.save(tmp_path / "step-000002", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["step-000001"]
    assert newest(tmp_path, print) == before


def test_a_folder_that_cannot_be_made_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        saved(tmp_path / "file", 1)


def test_a_mistake_of_the_program_is_no_full_disk_and_leaves_nothing_either(tmp_path: Path) -> None:
    state = fresh(part=object())
    with pytest.raises(TypeError, match="not JSON serializable"):
        state.save(tmp_path / "step-000001", 1)
    assert os.listdir(tmp_path) == []


# --- when to save --------------------------------------------------------------------------------------------------


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def walk(checkpointer: Checkpointer, num_steps: int, metrics: Callable[[int], dict[str, float]] = lambda _: {}) -> None:
    for step in range(1, num_steps + 1):
        checkpointer.after_step(Progress(step, num_steps, metrics(step), 0, 0.0))


@pytest.mark.parametrize(
    ("every", "wanted"),
    [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7]), ("never", [7]), ("10h", [7])],
)
def test_checkpoints_are_saved_every_so_many_steps_and_at_the_end(
    tmp_path: Path, every: str | int, wanted: list[int]
) -> None:
    walk(Checkpointer(tmp_path, fresh(), every=every, keep=99, best=None), 7)
    assert steps_of(tmp_path) == wanted
    assert all(verify(path) is None for path in tmp_path.iterdir())


def test_checkpoints_are_saved_when_the_time_since_the_last_one_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step takes 4 of the 10 seconds: saved after 12, and again 12 later."""
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    checkpointer = Checkpointer(tmp_path, fresh(), every="10s", keep=99, best=None)
    for step in range(1, 9):
        now += 4
        checkpointer.after_step(Progress(step, 100, {}, 0, 0.0))
    assert steps_of(tmp_path) == [3, 6]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    walk(Checkpointer(tmp_path, fresh(), every=1, keep=2, best=None), 6)
    assert steps_of(tmp_path) == [5, 6]


def test_what_a_kill_left_to_be_pruned_is_pruned_when_the_run_ends(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every=1, keep=2, best=None)
    walk(checkpointer, 3)
    (tmp_path / "step-000001").mkdir()
    checkpointer.close()
    assert steps_of(tmp_path) == [2, 3]


def test_pruning_goes_by_number_also_after_a_million(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every=1, keep=1, best=None)
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        checkpointer.after_step(Progress(step, 2_000_000, {}, 0, 0.0))
    assert steps_of(tmp_path) == [1_000_001]


@pytest.mark.parametrize(
    ("best", "values", "step"),
    [
        ("eval/loss", [3.0, 1.0, 2.0, 1.0, 4.0], 2),  # smaller is better; the first of equals stays
        ("eval/perplexity", [9.0, 8.0, 7.0, 8.0, 9.0], 3),
        ("-objective/kl", [3.0, 2.0, 9.0, 9.0, 9.0], 2),
        ("-eval/loss", [3.0, 1.0, 2.0, 1.0, 4.0], 2),
        ("eval/score", [1.0, 5.0, 2.0, 5.0, 4.0], 2),  # larger is better
        ("eval/score", [float("nan"), 1.0, float("nan"), 0.0, 0.0], 2),
    ],
)
def test_the_best_checkpoint_is_saved_at_once_and_stays_besides(
    tmp_path: Path, best: str, values: list[float], step: int
) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every="never", keep=1, best=best)
    walk(checkpointer, 5, lambda at: {best.removeprefix("-"): values[at - 1]})
    assert checkpointer.best_step == step
    assert checkpointer.best_value == values[step - 1]
    assert steps_of(tmp_path) == [step, 5]


def test_a_model_that_was_best_before_the_first_step_is_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every=1, keep=1, best="eval/loss")
    checkpointer.after_step(Progress(0, 4, {"eval/loss": 1.0}, 0, 0.0))
    walk(checkpointer, 4, lambda _: {"eval/loss": 2.0})
    assert checkpointer.best_step == 0
    assert steps_of(tmp_path) == [0, 4]
    assert verify(checkpointer.path(0)) is None


def test_steps_without_the_metric_leave_the_best_alone(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every="never", keep=1, best="eval/loss")
    walk(checkpointer, 5, lambda at: {"eval/loss": 1.0} if at == 2 else {"loss": 0.0})
    assert (checkpointer.best_step, steps_of(tmp_path)) == (2, [2, 5])


def test_what_was_best_survives_a_restart(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, fresh(), every="never", keep=1, best="eval/loss")
    first.after_step(Progress(1, 9, {"eval/loss": 1.0}, 0, 0.0))
    second = Checkpointer(tmp_path, fresh(), every="never", keep=1, best="eval/loss")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.after_step(Progress(2, 9, {"eval/loss": 2.0}, 0, 0.0))
    assert (second.best_step, second.best_value, steps_of(tmp_path)) == (1, 1.0, [1])


def test_a_checkpoint_knows_that_it_is_the_best(tmp_path: Path) -> None:
    """The state is taken after the comparison, so that a run continued from the best knows it."""
    parts: dict[str, Any] = {}
    state = RunState(fresh().parameters, fresh().optimizer, parts)
    parts["checkpointer"] = checkpointer = Checkpointer(tmp_path, state, every="never", keep=1, best="eval/loss")
    checkpointer.after_step(Progress(3, 9, {"eval/loss": 0.5}, 0, 0.0))
    stored = json.loads((checkpointer.path(3) / "state.json").read_text())
    assert stored["checkpointer"] == {"best_step": 3, "best_value": 0.5}


@pytest.mark.parametrize(("reason", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_request_to_stop_saves_and_interrupts(tmp_path: Path, reason: str, code: int) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every="never", keep=2, best=None)
    checkpointer.after_step(Progress(1, 9, {}, 0, 0.0))
    checkpointer.stop_reason = reason
    with pytest.raises(Interrupted, match=rf"stopped by {reason} after step 2 of 9; all is saved\nhint: ") as caught:
        checkpointer.after_step(Progress(2, 9, {}, 0, 0.0))
    assert caught.value.exit_code == code
    assert steps_of(tmp_path) == [2]
    assert verify(checkpointer.path(2)) is None


def test_a_request_to_stop_at_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every="never", keep=2, best=None)
    checkpointer.stop_reason = "SIGINT"
    checkpointer.after_step(Progress(9, 9, {}, 0, 0.0))
    assert steps_of(tmp_path) == [9]


def test_nothing_is_said_to_be_saved_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path, fresh(), every="never", keep=2, best=None)
    checkpointer.stop_reason = "SIGINT"
    monkeypatch.setattr(stored, "save_file", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpointer.after_step(Progress(2, 9, {}, 0, 0.0))
