"""What cannot be merged is refused with what to do; a folder is whole, right and new, or absent."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairlead.errors import ConfigError, ModelError, RunError
from fairlead.models.identity import weights_sha256
from fairlead.models.merge import merge
from tests.models.merge.made import save_adapter, save_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter")


def name_base(adapter: Path, base: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def leaves_nothing(folder: Path) -> bool:
    return not any(path.name.startswith((".", "out")) for path in folder.iterdir())


def test_an_adapter_of_another_base_is_refused_by_its_shapes(tmp_path: Path, adapter: Path) -> None:
    name_base(adapter, str(save_base(tmp_path / "wide", hidden_size=96)))
    with pytest.raises(ModelError, match="belongs to another base") as caught:
        merge(adapter, tmp_path / "out")
    assert "takes 64 to" in caught.value.message
    assert leaves_nothing(tmp_path)
    name_base(adapter, str(save_base(tmp_path / "gpt2", "gpt2")))
    with pytest.raises(ModelError, match=r"adapter of another base: .*gpt2 has no model\.layers\.0"):
        merge(adapter, tmp_path / "out")


def test_an_adapter_of_another_base_is_refused_by_the_hash_that_was_recorded(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    meta = {"role": "policy", "base": {"path": str(base), "sha256": weights_sha256(base)}}
    (adapter / "fairlead.json").write_text(json.dumps(meta))
    merge(adapter, tmp_path / "out")
    name_base(adapter, str(save_base(tmp_path / "twin", seed=5)))
    with pytest.raises(ModelError, match=r"was trained on other weights than .*twin holds now"):
        merge(adapter, tmp_path / "out2")


def test_a_base_that_is_not_there_is_named_with_the_adapter(tmp_path: Path, adapter: Path) -> None:
    for missing in ("runs/gone/model", "no-such-owner/no-such-model"):
        name_base(adapter, missing)
        with pytest.raises(ModelError, match=rf"the base of .*adapter is not there: {missing}"):
            merge(adapter, tmp_path / "out")
    name_base(adapter, None)
    with pytest.raises(ModelError, match="does not name its base"):
        merge(adapter, tmp_path / "out")
    name_base(adapter, str(adapter))
    with pytest.raises(ModelError, match="is an adapter over itself"):
        merge(adapter, tmp_path / "out")


def test_other_kinds_of_adapters_and_torn_ones_are_refused(tmp_path: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = load_file(path)
    first = next(key for key in whole if "lora_B" in key)
    save_file({key: tensor for key, tensor in whole.items() if key != first}, path)
    with pytest.raises(ModelError, match=r"is torn: .* lacks lora_B"):
        merge(adapter, tmp_path / "out")
    save_file({**whole, "base_model.model.model.norm.ia3_l": torch.ones(1)}, path)
    with pytest.raises(ModelError, match="ia3_l, which cannot be merged"):
        merge(adapter, tmp_path / "out")
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"peft_type": "LOHA"}))
    with pytest.raises(ModelError, match="an adapter of the kind LOHA"):
        merge(adapter, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:100])
    settings.write_text(settings.read_text().replace("LOHA", "LORA"))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        merge(adapter, tmp_path / "out")


def test_a_base_that_lacks_a_file_and_a_reward_that_lacks_its_head_are_refused(tmp_path: Path, base: Path) -> None:
    reward = save_adapter(base, tmp_path / "reward", task="SEQ_CLS")
    path = reward / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "score" not in key}, path)
    with pytest.raises(ModelError, match="lacks its score head"):
        merge(reward, tmp_path / "out")
    max(base.glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"lacks model-\d+-of-\d+\.safetensors, which its index names"):
        merge(reward, tmp_path / "out")
    assert leaves_nothing(tmp_path)


def test_wrong_words_are_refused(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype int8 is not known"):
        merge(adapter, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="is no device"):
        merge(adapter, tmp_path / "out", device="abacus")


@pytest.mark.parametrize("scale", [100, 1e3])
def test_a_merge_that_answers_otherwise_leaves_no_folder(
    scale: float, tmp_path: Path, base: Path, adapter: Path
) -> None:
    """Large weights have few digits in fp16; those beyond 65,504 become infinite."""
    path = adapter / "adapter_model.safetensors"
    save_file({key: tensor * scale for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=r"differs from its adapters by up to .* float16 is 0\.02") as caught:
        merge(adapter, tmp_path / "out", dtype="float16")
    assert "try --dtype float32" in (caught.value.hint or "")
    assert leaves_nothing(tmp_path)


def test_the_same_merge_is_left_alone_and_another_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = merge(adapter, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert merge(adapter, tmp_path / "out") == result
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(RunError, match="holds another merge"):
        merge(adapter, tmp_path / "out", dtype="bfloat16")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(RunError, match="one that was changed"):
        merge(adapter, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds files that are no merge"):
        merge(adapter, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_what_a_killed_process_left_is_cleared_and_one_at_work_is_not(tmp_path: Path, adapter: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="another process merges into"):
        merge(adapter, tmp_path / "out")
    assert (partial / "model.safetensors").read_bytes() == b"half"
    os.close(handle)
    merge(adapter, tmp_path / "out")
    assert not partial.exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_no_folder(tmp_path: Path, adapter: Path) -> None:
    with files_of_at_most(100_000), pytest.raises(RunError, match=r"out cannot be written: .*\nhint: make room"):
        merge(adapter, tmp_path / "out")
    assert leaves_nothing(tmp_path)
    merge(adapter, tmp_path / "out")


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path, base: Path, adapter: Path) -> None:
    """The configuration says how much is written; one that says more than any disk has is as good as a large model."""
    config = json.loads((base / "config.json").read_text())
    rows = 1 + shutil.disk_usage(tmp_path).free // (4 * 64)
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    with pytest.raises(RunError, match=r"the merged model takes .* GB, and .* has .* GB left"):
        merge(adapter, tmp_path / "out")
    assert leaves_nothing(tmp_path)
