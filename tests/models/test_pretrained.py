"""Reading weights in every form they are saved in, and refusing those that are not whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.config import ModelSection
from fairlead.errors import ModelError
from fairlead.models.export import save_model
from fairlead.models.load import Base, load_base
from fairlead.models.pretrained import read_config, read_model
from fairlead.models.roles import Models
from tests.tiny import CPU, base, scatter, tokenizer


def save(path: Path, form: str) -> dict[str, torch.Tensor]:
    """A tiny Llama on disk; its tensors."""
    model = base().model
    model.save_pretrained(path, max_shard_size="20KB" if "shards" in form else "5GB")
    tokenizer().save_pretrained(path)
    if "bin" in form:
        from safetensors.torch import load_file

        index: dict[str, str] = {}
        for file in sorted(path.glob("model*.safetensors")):
            tensors, name = load_file(file), file.stem.replace("model", "pytorch_model") + ".bin"
            torch.save(tensors, path / name)
            index |= dict.fromkeys(tensors, name)
            file.unlink()
        for old in path.glob("*.index.json"):
            old.unlink()
            (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("safetensors", ["model.safetensors"]),
        ("safetensors in shards", ["model.safetensors.index.json"]),
        ("bin", ["pytorch_model.bin"]),
        ("bin in shards", ["pytorch_model.bin.index.json"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_from_every_form_of_file(
    tmp_path: Path, form: str, files: list[str], dtype: torch.dtype
) -> None:
    wanted = save(tmp_path, form)
    assert all((tmp_path / name).is_file() for name in files)
    shards = [path for path in tmp_path.iterdir() if "-of-" in path.name]
    assert (len(shards) > 1) == ("shards" in form)
    found = read_model(str(tmp_path), dtype, CPU).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in wanted.items())


@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_id_is_looked_up_in_the_cache_and_named_when_it_is_not_there(tmp_path: Path, cached: bool) -> None:
    """In a process of its own, offline, with a cache laid out as huggingface_hub does."""
    if cached:
        commit, folder = "0" * 40, tmp_path / "models--someone--tiny"
        save(folder / "snapshots" / commit, "safetensors")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    program = (
        "import torch; from fairlead.models.pretrained import read_model\n"
        "try: print(type(read_model('someone/tiny', torch.float32, torch.device('cpu'))).__name__)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    if cached:
        assert done.stdout.strip() == "LlamaForCausalLM"
    else:
        assert done.stdout.startswith("ModelError someone/tiny cannot be loaded as a causal language model")
        assert "taken for a hub id: check the path, and the network" in done.stdout


# --- what is not whole ---------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, "safetensors in shards")
    gone = sorted(path for path in tmp_path.iterdir() if "-of-" in path.name)[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        read_model(str(tmp_path), torch.float32, CPU)


def test_weights_that_the_checkpoint_lacks_are_never_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight: it is no causal language"):
        read_model(str(tmp_path), torch.float32, CPU)


def test_a_checkpoint_without_its_score_head_is_no_reward_model(tmp_path: Path) -> None:
    save(tmp_path, "safetensors")
    with pytest.raises(ModelError, match=r"lacks its head, score\.weight: it is no sequence classifier") as caught:
        read_model(str(tmp_path), torch.float32, CPU, kind="sequence classifier")
    assert caught.value.hint is not None
    assert "reward stage" in caught.value.hint


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(ModelError, match="no_such_family"):
        read_config(str(tmp_path))


# --- adapters ------------------------------------------------------------------------------------------------------


def load(path: Path, **settings: Any) -> Base:
    section = ModelSection.model_validate({"path": str(path)} | settings)
    return load_base(section, tokenizer(), None, seed=0, device=CPU)


def adapter(path: Path, on: Path, seed: int = 1) -> Path:
    """A random adapter saved over a base, or over an adapter folder whose weights were merged."""
    section = ModelSection.model_validate({"adapter": {"rank": 4}})
    models = Models(load(on), ("policy",), adapter=section.adapter)
    scatter(models, seed=seed)
    save_model(models, path, template="plain")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(on)}))
    return path


def logits(model: Any) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def test_an_adapter_is_merged_for_a_stage_that_trains_all_weights(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save(tmp_path / "base", "safetensors")
    folder = adapter(tmp_path / "adapter", tmp_path / "base")
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(folder))
    made = load(folder)
    assert made.start is None
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    torch.testing.assert_close(logits(made.model), logits(plain), rtol=1e-5, atol=1e-5)


def test_of_a_chain_the_last_adapter_is_continued_and_those_below_are_merged(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save(tmp_path / "base", "safetensors")
    first = adapter(tmp_path / "first", tmp_path / "base")
    second = adapter(tmp_path / "second", first, seed=2)
    made = load(second, adapter={"rank": 4})
    assert made.start is not None
    assert made.start.path == second
    below: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(first))
    torch.testing.assert_close(logits(made.model), logits(below), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_base_that_has_changed_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "base", "safetensors")
    folder = adapter(tmp_path / "adapter", tmp_path / "base")
    base(seed=5).model.save_pretrained(tmp_path / "base")
    for settings in ({}, {"adapter": {"rank": 4}}):
        with pytest.raises(ModelError, match="adapter of other weights"):
            load(folder, **settings)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Saved by peft alone, no hash was recorded."""
    save(tmp_path / "base", "safetensors")
    folder = adapter(tmp_path / "adapter", tmp_path / "base")
    (folder / "fairlead.json").unlink()
    base(hidden_size=48).model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="is an adapter of another base: size mismatch"):
        load(folder)
