"""A quantised base, for real on the CPU build of bitsandbytes; each value beside bitsandbytes, peft or plain torch."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fairlead.config import ModelSection, QuantizeSection
from fairlead.data.pack import token_batch
from fairlead.errors import ConfigError, ModelError
from fairlead.models.export import save_model
from fairlead.models.load import Base, load_base
from fairlead.models.precision import dtype_of
from fairlead.models.quantize import bits_and_bytes, prepare_quantised
from fairlead.models.roles import Models
from tests.tiny import CPU, TREES, base, gradients, relative_error, scatter, tokenizer

FORMS: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "type": "fp4", "double": False},
    {"bits": 4, "double": False, "compute_dtype": "bfloat16"},
]
LOGPROBS = frozenset({"logprobs"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    made = base("llama", hidden_size=64, num_layers=2)
    made.model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def load(path: Path, quantize: Any = None, **settings: Any) -> Base:
    given = {"path": str(path), "adapter": {"rank": 4}, "quantize": quantize} | settings
    section = ModelSection.model_validate(given)
    return load_base(section, tokenizer(), None, seed=0, device=CPU)


def linears(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def dequantised(path: Path, section: QuantizeSection) -> Any:
    """The plain model whose linear layers hold what bitsandbytes makes of them, there and back; the head is left."""
    from bitsandbytes import functional as bnb
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, module in linears(model).items():
        if name == "lm_head":
            continue
        weight = module.get_parameter("weight").data
        if section.bits == 8:
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            weight.copy_(codes.float() * scales[:, None] / 127)
        else:
            codes, state = bnb.quantize_4bit(weight, quant_type=section.type, compress_statistics=section.double)
            weight.copy_(bnb.dequantize_4bit(codes, state))
    return model


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_logits_are_those_of_the_dequantised_weights(folder: Path, form: dict[str, Any]) -> None:
    section = QuantizeSection.model_validate(form)
    made, plain = load(folder, form).model, dequantised(folder, section)
    made.set_attn_implementation("sdpa")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, wanted = made(ids).logits, plain(ids).logits
    exact = section.bits == 4 and section.compute_dtype == "auto"
    bound = 1e-5 if exact else 2e-2  # 8 bits round what comes in, bfloat16 what is multiplied
    assert float((found - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_gradients_of_adapters_are_those_over_the_dequantised_weights(folder: Path, form: dict[str, Any]) -> None:
    found = []
    for quantised in (True, False):
        made = load(folder, form if quantised else None)
        if not quantised:
            made.model.load_state_dict(dequantised(folder, QuantizeSection.model_validate(form)).state_dict())
        models = Models(made, ("policy",), adapter=ModelSection.model_validate({"adapter": {"rank": 4}}).adapter)
        scatter(models)
        with models.use("policy"):
            models(token_batch(TREES, packed=True, pad_id=0), LOGPROBS).logprobs.sum().backward()
        found.append(gradients(models))
    assert relative_error(*found) < (1e-4 if form["bits"] == 4 else 0.1)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_checkpointing_changes_no_gradient(folder: Path, form: dict[str, Any]) -> None:
    """Though no input requires gradients, which the reentrant kind would need."""
    found = []
    for checkpointing in (False, True):
        models = Models(load(folder, form), ("policy",), adapter=ModelSection.model_validate(
            {"adapter": {"rank": 4}}).adapter, gradient_checkpointing=checkpointing)  # fmt: skip
        scatter(models)
        with models.use("policy"):
            models(token_batch(TREES, packed=True, pad_id=0), LOGPROBS).logprobs.sum().backward()
        found.append(gradients(models))
    assert relative_error(*found) < 1e-6


def test_gradients_still_pass_after_a_call_without_gradients(folder: Path) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes would repack the weights at such a call, for good."""
    models = Models(load(folder, "4bit"), ("policy",), adapter=ModelSection.model_validate({"adapter": "lora"}).adapter)
    scatter(models)
    batch = token_batch(TREES, packed=True, pad_id=0)
    before = {name: module.weight.clone() for name, module in linears(models.causal).items()}
    models.eval()
    with torch.no_grad(), models.use("policy"):
        models(batch, LOGPROBS)
    models.train()
    assert all(torch.equal(module.weight, before[name]) for name, module in linears(models.causal).items())
    with models.use("policy"):
        models(batch, LOGPROBS).logprobs.sum().backward()
    assert all(float(gradient.norm()) > 0 for gradient in gradients(models).values())


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_the_base_is_frozen_and_stays_byte_for_byte_while_adapters_train(folder: Path, form: dict[str, Any]) -> None:
    made = load(folder, form)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    models = Models(made, ("policy",), adapter=ModelSection.model_validate({"adapter": {"rank": 4}}).adapter)
    assert all(".lora_" in name for name in models.trainable)
    assert {p.dtype for p in models.trainable.values()} == {torch.float32}
    scatter(models)
    optimizer = torch.optim.SGD(list(models.trainable.values()), lr=0.1)
    with models.use("policy"):
        models(token_batch(TREES, packed=True, pad_id=0), LOGPROBS).logprobs.sum().backward()
    optimizer.step()
    after = {name.replace("base_layer.", ""): p for name, p in models.causal.named_parameters()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma", "gpt_neox", "phi"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_layer_but_head_and_embeddings_is_quantised(tmp_path: Path, architecture: str, bits: int) -> None:
    plain = base(architecture, hidden_size=64, num_layers=1).model
    plain.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, {"bits": bits}).model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    layers = [name for name, m in plain.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    head = next(name for name, m in plain.named_modules() if m is plain.get_output_embeddings())
    assert {kinds[name] for name in layers if name != head} == {{4: "Linear4bit", 8: "Linear8bitLt"}[bits]}
    assert kinds[head] == "Linear"
    assert {
        p.dtype for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers or n.startswith(head)
    } == {torch.float32}


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has mapped")
@pytest.mark.parametrize("bits", [8, 4])
def test_the_unquantised_checkpoint_does_not_stay_in_memory(folder: Path, tmp_path: Path, bits: int) -> None:
    place = shutil.copytree(folder, tmp_path / "base")
    quantised = load(place, {"bits": bits})
    assert str(place) not in Path("/proc/self/maps").read_text()
    whole = load(place)
    assert str(place) in Path("/proc/self/maps").read_text()
    embeddings = (each.model.get_input_embeddings().weight for each in (quantised, whole))
    assert torch.equal(*embeddings)


def test_norms_compute_in_fp32_and_the_stream_keeps_its_type(folder: Path) -> None:
    """As peft's preparation has it, but the embedding and the head are not widened."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    made = copy.deepcopy(plain)
    prepare_quantised(made)
    dtypes = {name: p.dtype for name, p in made.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {torch.bfloat16}
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm, reference = made.model.norm, plain.model.norm.float()
    norm.weight.data.uniform_(0.5, 2.0)
    reference.weight.data.copy_(norm.weight)
    assert torch.equal(norm(states), reference(states.float()).bfloat16())
    assert not any(p.requires_grad for p in made.parameters())
    assert not made.is_gradient_checkpointing


def test_a_base_prepared_by_peft_gives_the_same_log_probabilities(folder: Path) -> None:
    """On an fp32 stream the two preparations are one."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    config = bits_and_bytes(QuantizeSection(), CPU)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    theirs = prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    theirs.train()  # else bitsandbytes repacks the weights on some CPUs
    ids = torch.arange(3, 40)[None]
    ours = load(folder, "4bit").model
    ours.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


# --- stages on a quantised base -----------------------------------------------------------------------------------


def saved(path: Path, on: Path, quantize: Any) -> Path:
    made = load(on, quantize)
    models = Models(made, ("policy",), adapter=ModelSection.model_validate({"adapter": {"rank": 4}}).adapter)
    scatter(models)
    save_model(models, path, template="plain")
    return path


def test_an_adapter_is_continued_on_the_bare_quantised_base(folder: Path, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", folder, "4bit")
    made = load(first, "4bit")
    assert made.start is not None
    assert made.start.path == first
    assert {type(m).__name__ for n, m in linears(made.model).items() if n != "lm_head"} == {"Linear4bit"}
    bare = load(folder, "4bit")
    for name, parameter in bare.model.named_parameters():
        assert torch.equal(made.model.get_parameter(name), parameter), name


def test_nothing_is_merged_into_a_quantised_base(folder: Path, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", folder, "4bit")
    with pytest.raises(ModelError, match="cannot be merged on loading") as caught:
        load(first, adapter=None)
    assert caught.value.hint is not None
    assert "fairlead merge" in caught.value.hint
    second = tmp_path / "second"
    second.mkdir()
    config = json.loads((first / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(first)}))
    (second / "adapter_model.safetensors").write_bytes((first / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="cannot be merged on loading"):
        load(second, "4bit")


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_quantised_base_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match=r"model\.quantize needs model\.adapter"):
        ModelSection.model_validate({"path": "x", "quantize": "4bit"})


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_model_from_scratch_is_not_quantised(adapter: str | None) -> None:
    with pytest.raises(ValueError, match=r"model\.adapter needs a base that is saved|needs model\.adapter"):
        ModelSection.model_validate({"scratch": {}, "quantize": "8bit", "adapter": adapter})


def test_bitsandbytes_that_is_missing_is_named_with_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="bitsandbytes, which is not installed") as caught:
        load(folder, "4bit")
    assert caught.value.hint == "pip install 'fairlead[quant]'"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (None, r"is stored in 4 bits, and model\.quantize is not given"),
        ("8bit", r"is stored in 4 bits, in another form than model\.quantize asks"),
        ({"type": "fp4"}, r"is stored in 4 bits, in another form"),
        ({"double": False}, r"is stored in 4 bits, in another form"),
    ],
)
def test_a_checkpoint_stored_in_another_form_is_refused(folder: Path, tmp_path: Path, asked: Any, message: str) -> None:
    from transformers import AutoModelForCausalLM

    settings = bits_and_bytes(QuantizeSection(), CPU)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path, asked)
    assert caught.value.hint is not None
    assert "model.quantize.bits=4 model.quantize.type=nf4 model.quantize.double=true" in caught.value.hint


def test_a_checkpoint_stored_in_the_form_asked_for_is_read_as_it_is(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = bits_and_bytes(QuantizeSection(), CPU)
    stored: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    stored.save_pretrained(tmp_path)
    made = load(tmp_path, {"bits": 4, "compute_dtype": "bfloat16"}).model
    plain = linears(load(folder, "4bit").model)
    for name, module in linears(made).items():
        assert torch.equal(module.get_parameter("weight"), plain[name].get_parameter("weight")), name
        if name != "lm_head":
            assert getattr(module, "compute_dtype") == torch.bfloat16  # noqa: B009


def test_a_checkpoint_quantised_by_others_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised already, by gptq"):
        load(tmp_path, "4bit")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_a_quantised_base_trains_adapters_on_a_gpu(folder: Path, form: dict[str, Any]) -> None:
    section = ModelSection.model_validate({"path": str(folder), "adapter": {"rank": 4}, "quantize": form})
    device = torch.device("cuda")
    made = load_base(section, tokenizer(), None, seed=0, device=device)
    models = Models(made, ("policy",), adapter=section.adapter, autocast=torch.bfloat16)
    scatter(models)
    batch = token_batch(TREES, packed=True, pad_id=0).to(device)
    with models.use("policy"):
        found = models(batch, LOGPROBS).logprobs
        found.sum().backward()
    assert made.model.dtype == dtype_of(section, device)
    assert all(float(gradient.norm()) > 0 for gradient in gradients(models).values())
    plain = Models(load(folder), ("policy",), adapter=section.adapter)
    scatter(plain)
    with torch.no_grad(), plain.use("policy"):
        wanted = plain(token_batch(TREES, packed=True, pad_id=0), LOGPROBS).logprobs
    assert float((found.detach().cpu() - wanted).abs().mean()) < 0.2
