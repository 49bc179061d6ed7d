"""Weights in shards over ranks: gradients and runs of whole ones, and checkpoints that load on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.end_to_end.test_ranks import rows, run
from tests.ranks import on_ranks, started
from tests.training.parity import step
from tests.training.test_distributed import differences

from fairlead.errors import ConfigError
from fairlead.training.sharding import shard
from fairlead.training.stored import Stored, own_rows, write
from fairlead.types import Ranks

SHARDED = {"train.shard": "full"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sft", {**SHARDED, "train.batch_size": 1}),
    ("reward", SHARDED),
    ("dpo", {**SHARDED, "dpo.loss": {"aot": 1.0, "sft": 0.5}}),
    ("ppo", SHARDED),
    ("ppo", {**SHARDED, "ppo.value": {"trunk": "layers", "num_layers": 1}, "model.gradient_checkpointing": True}),
]


def test_shards_have_the_gradients_and_texts_of_whole_weights(tmp_path: Path) -> None:
    found = differences(2, CASES, tmp_path)
    assert len(found) == len(CASES) and max(found.values()) <= 1e-12, found


@pytest.mark.slow
def test_so_have_four(tmp_path: Path) -> None:
    assert max(differences(4, CASES, tmp_path).values()) <= 1e-12


def test_a_rank_holds_its_share_of_every_weight(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> list[int]:
        from tests.tiny import models

        made = models(("policy",))
        total = sum(p.numel() for p in made.trainable.values())
        shard(made, ranks)
        held = sum(p.to_local().numel() for p in made.trainable.values())  # pyright: ignore
        with made.whole():
            whole = sum(p.numel() for p in made.parameters())
            assert all(p.requires_grad for p in made.parameters())  # else autocast casts them for every token
        return [total, held, whole]

    first, second = on_ranks(2, tmp_path, work)
    assert first[0] == second[0] == first[2] == first[1] + second[1]
    assert abs(first[1] - second[1]) < 0.02 * first[0]


def test_a_model_in_bfloat16_is_sharded_with_its_head_in_float32(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> float:
        more = {**SHARDED, "model.dtype": "bfloat16"}
        return step("reward", ranks, tmp_path / f"{ranks.size}", more)["metrics"]["loss"]

    (alone,) = on_ranks(1, tmp_path / "one", lambda _: work(Ranks()))
    assert on_ranks(2, tmp_path / "two", work) == pytest.approx([alone, alone], rel=1e-4)


def test_activations_of_sharded_weights_can_be_offloaded(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> list[float]:
        from tests.tiny import TREES, models

        from fairlead.algorithms import sft
        from fairlead.data.pack import token_batch
        from fairlead.training.loop import backward

        norms: list[float] = []
        for offloads in (False, True):
            made = models(("policy",), offload_activations=offloads)
            shard(made, ranks)
            backward(made, sft.passes(sft.Settings()), [token_batch(TREES, packed=True, pad_id=0)], ranks)
            norms.append(sum(float(p.grad.full_tensor().norm()) for p in made.trainable.values()))  # pyright: ignore
        return norms

    (plain, offloaded), _ = on_ranks(2, tmp_path, work)
    assert plain == offloaded > 0


def test_a_checkpoint_in_two_shards_continues_on_one_rank_and_on_three(tmp_path: Path) -> None:
    more = {"model.dtype": "float64", **SHARDED}
    started(2, tmp_path / "forks", run("ppo", tmp_path / "two", **more))
    two = tmp_path / "two" / "ppo"
    assert (two / "checkpoints" / "step-000002" / "optimizer-2-of-2.safetensors").exists()
    for size in (1, 3):
        folder = tmp_path / str(size)
        shutil.copytree(tmp_path / "two", folder)
        for name in ("checkpoints/step-000003", "checkpoints/step-000004", "model"):
            shutil.rmtree(folder / "ppo" / name)
        (folder / "ppo" / "summary.json").unlink()
        recipe = folder / "ppo" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(tmp_path / "two"), str(folder)))
        ended = started(size, tmp_path / f"forks-{size}", run("ppo", folder, **more))
        assert [each["status"] for each in ended] == ["finished"] * size, ended
        for got, wanted in zip(rows(folder / "ppo"), rows(two), strict=True):
            assert got == pytest.approx(wanted, rel=1e-7, abs=1e-9, nan_ok=True)
        weights, wanted = (load_file(path / "model" / "model.safetensors") for path in (folder / "ppo", two))
        assert max(float((weights[name] - wanted[name]).abs().max()) for name in wanted) < 1e-7


def test_rows_of_whole_tensors_are_read_where_they_lie(tmp_path: Path) -> None:
    tensors = {"matrix": torch.arange(21.0).view(7, 3), "number": torch.tensor(5.0), "step": torch.tensor([3])}
    write(tmp_path, "model", tensors, Ranks())
    stored = Stored(tmp_path, "model")
    assert stored.names == {"matrix", "number", "step"}
    assert torch.equal(stored.rows("matrix", 2, 5), tensors["matrix"][2:5])
    assert all(torch.equal(stored.read(name, tensor, Ranks()), tensor) for name, tensor in tensors.items())
    assert own_rows(tensors["matrix"], Ranks()) == (0, 7)


@pytest.mark.slow
def test_a_sharded_run_has_the_bytes_of_an_interrupted_one(tmp_path: Path) -> None:
    started(2, tmp_path / "forks", run("sft", tmp_path / "whole", **SHARDED))
    first = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", first)
    for name in ("checkpoints/step-000003", "checkpoints/step-000004", "model"):
        shutil.rmtree(first / "sft" / name)
    (first / "sft" / "summary.json").unlink()
    recipe = first / "sft" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "whole"), str(first)))
    started(2, tmp_path / "more", run("sft", first, **SHARDED))

    def shards(path: Path) -> dict[str, bytes]:
        last = max((path / "checkpoints").iterdir())
        return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}

    assert shards(tmp_path / "whole" / "sft") == shards(first / "sft")
    assert json.dumps(rows(tmp_path / "whole" / "sft")) == json.dumps(rows(first / "sft"))


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.name=adafactor"):
        step("sft", Ranks(), tmp_path, {**SHARDED, "optim.name": "adafactor"})
