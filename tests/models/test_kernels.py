"""Kernels compute what the modules they stand in for compute, keep less, and change nothing else in the process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairlead.errors import ConfigError
from fairlead.models import kernels
from tests.families import plain, prepared

PATCHED = {
    "llama": {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"},
    "gemma2": {"Gemma2RMSNorm", "Gemma2MLP", "Gemma2Attention"},
    "gemma3_text": {"Gemma3RMSNorm", "Gemma3MLP", "Gemma3Attention"},
    "granite": {"GraniteRMSNorm", "GraniteMLP", "GraniteAttention"},
    "mistral": {"MistralRMSNorm", "MistralMLP", "MistralAttention"},
    "olmo2": {"Olmo2RMSNorm", "Olmo2MLP", "Olmo2Attention"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"},
    "phi3": {"Phi3RMSNorm", "Phi3Attention"},
    "cohere": {"CohereMLP"},
    "gpt2": set(),
    "opt": set(),
}
"""Cohere rotates pairs of neighbours and has another norm, Phi-3 another MLP: those keep their own."""
IDS = torch.tensor([[3, 7, 5, 9, 40, 41, 2, 6, 8, 30, 31, 32]] * 2)


def _patched(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def _outcome(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(IDS, attention_mask=torch.ones_like(IDS)).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
    (logits * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), found


@pytest.mark.parametrize("family", sorted(PATCHED))
def test_a_model_with_kernels_gives_the_logits_and_gradients_of_the_plain_one(family: str) -> None:
    """In fp32, where Gemma's layers enlarge the rounding of each module; the plain model is of transformers alone."""
    reference, fast = plain(family), plain(family)
    kernels.patch(fast, kernels.OURS)
    assert _patched(fast) == PATCHED[family]
    (wanted, wanted_gradients), (got, gradients) = _outcome(reference), _outcome(fast)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 3e-5  # 1.2e-5 on a CPU without AVX-512
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        bound = 5e-5 * float(wanted_gradients[name].norm()) + 1e-5  # of key biases, rounding is all there is
        assert float((gradient - wanted_gradients[name]).norm()) < bound, name


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gemma3_text"])
def test_each_module_equals_the_plain_one_to_a_millionth(family: str) -> None:
    reference, fast = plain(family), plain(family)
    kernels.patch(fast, kernels.OURS)
    states, pull = torch.randn(2, 2, 12, 32, generator=torch.Generator().manual_seed(0)).unbind()
    compared = 0
    for ours, theirs in zip(fast.modules(), reference.modules(), strict=True):
        if "forward" not in vars(ours) or type(ours).__name__.endswith("Attention"):
            continue
        width = ours.weight.shape[0] if isinstance(getattr(ours, "weight", None), Tensor) else 32
        inputs = [states[..., :width].clone().requires_grad_(True) for _ in range(2)]
        out = [module(x) for module, x in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(*out, rtol=1e-6, atol=1e-6)
        for y in out:
            y.backward(pull[..., : y.shape[-1]])
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=2e-6, atol=2e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared >= 7


def test_where_a_part_of_each_head_rotates_the_familys_own_function_does_it() -> None:
    reference, fast = (_partial_phi3() for _ in range(2))
    kernels.patch(fast, kernels.OURS)
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)


def _partial_phi3() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("phi3", **sizes, num_attention_heads=4, num_key_value_heads=4, rope_parameters=rope,
                             pad_token_id=0, bos_token_id=1, eos_token_id=1)
    )  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 4, 6), (5, 6)])
def test_each_kernel_has_the_slopes_of_its_values(offset: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64, requires_grad=True)

    states, other = normal(*shape), normal(*shape)
    assert torch.autograd.gradcheck(lambda x, w: kernels.OURS.norm(x, w, 1e-6, offset), (states, normal(6)))
    for act in ("silu", "gelu_tanh"):
        assert torch.autograd.gradcheck(lambda g, u, act=act: kernels.OURS.gated(g, u, act), (states, other))
    cos, sin = normal(2, 3, 6).detach(), normal(2, 3, 6).detach()
    rotate = kernels.OURS.rotary
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (normal(2, 4, 3, 6), normal(2, 2, 3, 6)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_plain_modules_compute(dtype: torch.dtype) -> None:
    reference, fast = plain("llama", dtype), plain("llama", dtype)
    kernels.patch(fast, kernels.OURS)
    with torch.no_grad():
        assert torch.equal(reference(IDS).logits, fast(IDS).logits)


def test_under_autocast_the_gradients_stay_those_of_the_plain_modules() -> None:
    reference, fast = plain("llama"), plain("llama")
    kernels.patch(fast, kernels.OURS)
    with torch.autocast("cpu", torch.bfloat16):
        (wanted, wanted_gradients), (got, gradients) = _outcome(reference), _outcome(fast)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 3e-2  # bfloat16 rounds at 4e-3
    for name, gradient in gradients.items():
        assert float((gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()) < 5e-2, name


def test_kernels_keep_less_for_the_backward_pass() -> None:
    kept = []
    for patch in (False, True):
        model, storages = plain("llama"), dict[int, int]()
        if patch:
            kernels.patch(model, kernels.OURS)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(tensor: Tensor, own: set[int] = own, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = model(IDS).logits
        kept.append(sum(storages.values()))
        del logits
    assert kept[1] < 0.9 * kept[0]


def test_one_model_alone_is_changed_and_its_copy_computes_with_its_own_weights() -> None:
    fast, other = plain("llama"), plain("llama")
    kernels.patch(fast, kernels.OURS)
    assert not _patched(other) and not _patched(plain("llama"))
    twin = copy.deepcopy(fast)
    assert _patched(twin) == _patched(fast)
    with torch.no_grad():
        before = fast(IDS).logits
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(fast(IDS).logits, before)
        assert not twin(IDS).logits.any()


def test_saved_weights_and_configuration_know_nothing_of_kernels(tmp_path: Path) -> None:
    for name, kernel in (("plain", "none"), ("fast", "auto")):
        model = prepared("llama", kernel=kernel).model
        assert bool(_patched(model)) == (kernel == "auto")
        model.save_pretrained(tmp_path / name)
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert files == {path.name for path in (tmp_path / "fast").iterdir()}
    assert all((tmp_path / "plain" / f).read_bytes() == (tmp_path / "fast" / f).read_bytes() for f in files)


def test_adapters_on_the_projections_are_computed() -> None:
    from peft import LoraConfig, get_peft_model

    outcomes = []
    for patch in (False, True):
        model = plain("llama")
        if patch:
            kernels.patch(model, kernels.OURS)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"]))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        outcomes.append(_outcome(adapted))
    (wanted, wanted_gradients), (got, gradients) = outcomes
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 2e-6
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) == 16
    for name, gradient in gradients.items():
        assert float((gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()) < 1e-5, name


def test_liger_without_a_gpu_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="runs on GPUs, not on cpu"):
        prepared("llama", kernel="liger")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_ligers_kernels_give_the_logits_and_gradients_of_the_plain_model(family: str) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    global IDS
    reference, fast = plain(family).cuda(), plain(family).cuda()
    kernels.install(fast, "liger", torch.device("cuda"))
    assert _patched(fast) == PATCHED[family]
    ids, IDS = IDS, IDS.cuda()
    try:
        (wanted, wanted_gradients), (got, gradients) = _outcome(reference), _outcome(fast)
    finally:
        IDS = ids
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-3
    for name, gradient in gradients.items():
        assert float((gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()) < 1e-2, name
