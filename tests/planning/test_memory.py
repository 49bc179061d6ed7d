"""Planned bytes against real ones: parameters, gradients, optimizer states, bitsandbytes' storage, keys and values. The
plan sees a configuration alone; the real side is a run of the loop on weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CPU, TREES, base, tokenizer

from fairlead.algorithms import find
from fairlead.assemble import build_models
from fairlead.config import OptimSection, QuantizeSection
from fairlead.data.pack import token_batch
from fairlead.models.export import save_model
from fairlead.models.load import load_base
from fairlead.models.roles import Models
from fairlead.planning.memory import cache_bytes, parameter_sizes, quantised_bytes, state_bytes, total
from fairlead.planning.plan import Plan, plan_run
from fairlead.rollout.cache import PreallocatedLayer, decoding_cache
from fairlead.runner import resolve
from fairlead.training.loop import backward
from fairlead.training.optim import Optimizer

LORA = ("model.adapter.rank=4", "model.adapter.targets=[q_proj,v_proj]")


def both(folder: Path, algorithm: str, *settings: str, architecture: str = "llama") -> tuple[Plan, Models, Any]:
    """The plan of a saved model's configuration, and the roles on the model itself."""
    made = base(architecture)
    made.model.config.save_pretrained(folder)
    recipe = resolve({"algorithm": algorithm, "model": {"path": str(folder)}}, ["data.max_length=64", *settings]).recipe
    found = find(algorithm)
    return plan_run(recipe, found, build_models), build_models(recipe, found, made, CPU), recipe


@pytest.mark.parametrize("settings", [(), LORA], ids=["full", "lora"])
def test_a_step_of_sft_holds_exactly_what_was_planned(tmp_path: Path, settings: Any) -> None:
    planned, made, recipe = both(tmp_path, "sft", *settings)
    backward(made, find("sft").passes(recipe.settings), [token_batch(TREES, packed=True, pad_id=0)])
    gradients = {name: p.grad.nbytes for name, p in made.named_parameters() if p.grad is not None}
    stepped = Optimizer(recipe.optim, made.trainable, 1)
    stepped.step(1)
    sums = total(planned.parts)
    assert sums["weights"] == sum(p.nbytes for p in made.parameters())
    assert sums["gradients"] == sum(gradients.values())
    assert sums["optimizer"] == sum(tensor.nbytes for tensor in stepped.tensors().values())
    assert planned.buffers == sum(buffer.nbytes for buffer in made.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        *({"name": name} for name in ("adamw", "adam", "sgd", "lion", "adafactor", "adamw-8bit", "lion-8bit")),
        {"name": "adamw", "state_dtype": "bfloat16"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_states_are_those_each_optimizer_makes(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Matrices, a vector and a cube; some below and some above the size from which states are in 8 bits."""
    if settings["name"].endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    section = OptimSection(**settings)
    shapes = [(100, 50), (64, 33), (7, 1), (10,), (5000,), (80, 5, 11)]
    parameters = {str(shape): torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    made = Optimizer(section, parameters, 1)
    made.step(1)
    for shape in shapes:
        state = made._torch.state[parameters[str(shape)]]
        real = {
            field: value.nbytes
            for field, value in state.items()
            if isinstance(value, torch.Tensor) and not field.startswith("qmap")
        }
        assert state_bytes(section, shape, dtype) == real


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("settings", [(), ("model.adapter.rank=4",)], ids=["full", "lora"])
def test_every_role_of_ppo_is_counted(tmp_path: Path, architecture: str, settings: Any) -> None:
    planned, made, _ = both(tmp_path, "ppo", *settings, "ppo.max_new_tokens=8", architecture=architecture)
    assert planned.untraced is None
    assert sum(part.parameters for part in planned.parts) == sum(p.numel() for p in made.parameters())
    by_role = {part.role: part for part in planned.parts}
    assert by_role["value head"].trainable == 32 + 1
    weights = sum(p.numel() for p in base(architecture).model.parameters())
    if settings:
        assert by_role["base"].parameters == weights and by_role["base"].trainable == 0
        lora = [p.numel() for name, p in made.named_parameters() if ".lora_" in name]
        assert by_role["policy adapter"].trainable == sum(lora) == planned.trainable - 33
    else:
        assert by_role["policy"].trainable == by_role["reference"].parameters == weights
        assert by_role["reference"].trainable == 0 and planned.parameters == weights + 33


@pytest.mark.parametrize("shape", [(64, 128), (100, 37), (333, 512), (11, 3)])
def test_bytes_of_quantised_weights_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows, columns = shape
    for double in (True, False):
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=double)
        state = layer.to("cpu").weight.quant_state
        held = [layer.weight.data, state.absmax, state.code]
        held += [state.state2.absmax, state.state2.code, state.offset] if double else []
        expected = sum(tensor.nbytes for tensor in held)
        assert quantised_bytes(rows, columns, QuantizeSection(double=double)) == expected
        assert parameter_sizes(layer)[id(layer.weight)] == (rows * columns, expected)
    layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False).to("cpu")
    expected = layer.weight.data.nbytes + layer.weight.SCB.nbytes
    layer(torch.randn(2, columns))  # moves the scales
    assert quantised_bytes(rows, columns, QuantizeSection(bits=8)) == expected
    assert parameter_sizes(layer)[id(layer.weight)] == (rows * columns, expected)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
def test_the_decoding_cache_takes_what_was_planned(architecture: str) -> None:
    network = base(architecture).model
    cache = decoding_cache(network, 24, lambda states: states)
    ids = torch.zeros(3, 16, dtype=torch.long)
    with torch.no_grad():
        mask = torch.ones(3, 1, 16, 16, dtype=torch.bool)
        network(input_ids=ids, position_ids=torch.zeros_like(ids), attention_mask=mask, past_key_values=cache)
    held = 0
    for layer in cache.layers:
        assert isinstance(layer, PreallocatedLayer) and layer._store
        held += sum(store.nbytes for store in layer._store)
    assert cache_bytes(network.config, rows=3, length=24, dtype=torch.float32) == held


def test_a_model_with_fewer_key_heads_caches_fewer() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3)
    assert cache_bytes(config, rows=5, length=7, dtype=torch.bfloat16) == 2 * 3 * (2 * 8) * 5 * 7 * 2


def test_llama_2_7b_without_weights_gives_the_figures_of_the_sources() -> None:
    """torch's AdamW keeps its states in the type of the weights: 2 bytes each here, where the sources count 4."""
    recipe = resolve({"algorithm": "sft", "model": {"path": "llama-2-7b", "dtype": "bfloat16"}}).recipe
    planned = plan_run(recipe, find("sft"), build_models)
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert planned.parameters == 32 * layer + 2 * 32000 * 4096 + 4096 == 6_738_415_616
    sums = total(planned.parts)
    assert sums["weights"] == sums["gradients"] == 2 * planned.parameters
    assert planned.parts[0].states["exp_avg"] == 2 * planned.parameters


@pytest.mark.parametrize("bits", ["4bit", "8bit", "{bits: 4, double: false, type: fp4}"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_quantised_base_is_loaded_in_the_bytes_that_were_planned(
    tmp_path: Path, bits: str, architecture: str
) -> None:
    pytest.importorskip("bitsandbytes")
    source = base(architecture)
    source.model.save_pretrained(tmp_path)
    settings = [f"model.quantize={bits}", "model.adapter.rank=4", "data.max_length=64"]
    recipe = resolve({"algorithm": "sft", "model": {"path": str(tmp_path)}}, settings).recipe
    planned = {part.role: part for part in plan_run(recipe, find("sft"), build_models, tokenizer=tokenizer()).parts}
    loaded = load_base(recipe.model, tokenizer(), None, seed=0, device=CPU)
    made = build_models(recipe, find("sft"), loaded, CPU)
    frozen = {
        id(p): p.nbytes for name, p in made.named_parameters() if ".lora_" not in name and name.startswith("network.")
    }
    scales = 0
    for module in made.modules():
        if not type(module).__module__.startswith("bitsandbytes"):  # peft's wrappers have the same names
            continue
        weight: Any = module.get_parameter("weight")
        if type(module).__name__ == "Linear8bitLt":
            scales += 4 * weight.shape[0]
            continue
        state = weight.quant_state
        inner = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
        scales += sum(tensor.nbytes for tensor in (state.absmax, state.code, *inner))
    assert scales > 0
    assert planned["base"].weights == sum(frozen.values()) + scales
    assert planned["base"].parameters == source.model.num_parameters()
    assert planned["policy adapter"].weights == sum(p.nbytes for p in made.trainable.values())


def test_a_tokenizer_that_grows_the_embeddings_grows_the_plan(tmp_path: Path) -> None:
    made = base()
    made.model.config.save_pretrained(tmp_path)
    grown = tokenizer().__class__.from_pretrained(_saved(tmp_path / "tokenizer"))
    grown.add_tokens([f"<{i}>" for i in range(100)], special_tokens=True)
    settings = {"path": str(tmp_path), "add_tokens": [f"<{i}>" for i in range(100)]}
    recipe = resolve({"algorithm": "sft", "model": settings}, ["data.max_length=64"]).recipe
    rows = made.model.get_input_embeddings().weight.shape[0]
    planned = plan_run(recipe, find("sft"), build_models, tokenizer=grown)
    assert len(grown) > rows
    assert planned.parameters - made.model.num_parameters() == 32 * (len(grown) - rows)  # tied: once


def _saved(folder: Path) -> Path:
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [LORA, (), ("model.num_layers_unfrozen=1",)], ids=["lora", "full", "hydra"])
def test_a_continued_adapter_and_its_frozen_copy_are_planned_as_they_are_built(tmp_path: Path, settings: Any) -> None:
    """PPO on a run of SFT with adapters: continued and compared with themselves; or merged, and trained whole."""
    first = load(tmp_path, "sft", f"model.path={_base(tmp_path)}", *LORA)[1]
    save_model(first, tmp_path / "sft", template="plain")
    extra = ("ppo.max_new_tokens=8", "ppo.value.trunk=model") if settings == () else ("ppo.max_new_tokens=8",)
    planned, made = load(tmp_path, "ppo", f"model.path={tmp_path / 'sft'}", *settings, *extra)
    assert total(planned.parts)["weights"] == sum(p.nbytes for p in made.parameters())
    assert planned.trainable == sum(p.numel() for p in made.trainable.values())
    roles = {part.role for part in planned.parts}
    if settings == LORA:
        assert roles == {"base", "policy adapter", "reference adapter", "value head"}
    else:
        assert roles == {"policy", "reference", "value head", *(["value"] if not settings else [])}
    assert planned.untraced is None


def load(folder: Path, algorithm: str, *settings: str) -> tuple[Plan, Models]:
    recipe = resolve({"algorithm": algorithm}, ["data.max_length=64", *settings]).recipe
    found = find(algorithm)
    planned = plan_run(recipe, found, build_models, tokenizer=tokenizer())
    return planned, build_models(recipe, found, load_base(recipe.model, tokenizer(), None, seed=0, device=CPU), CPU)


def _base(folder: Path) -> Path:
    base().model.save_pretrained(folder / "base")
    return _saved(folder / "base")
