"""The chunked head against the logits that plain transformers and peft make, whatever stands around the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairlead.errors import ModelError
from fairlead.models.lm_head import check_logits, head_logprobs, last_logits
from fairlead.ops import logprobs
from tests.families import CONFIGS, plain

IDS = torch.tensor([[3, 7, 5, 9, 40, 41, 2, 6, 8, 30, 31, 32]])


def _own(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The last hidden states [N, H], a leaf that the model's head is given, its own logits [N, V], the targets [N]."""
    seen: list[Tensor] = []

    def cut(_module: Any, _inputs: Any, output: Any) -> Any:
        seen.append(output.last_hidden_state[0, :-1].detach().requires_grad_(True))
        output.last_hidden_state = seen[0][None]
        return output

    handle = model.get_decoder().register_forward_hook(cut)
    logits = model(IDS, attention_mask=torch.ones_like(IDS)).logits[0]
    handle.remove()
    return seen[0], logits, IDS[0, 1:]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_chunked_logprobs_and_entropies_are_those_of_the_models_own_logits(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, bound: float
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * 320)
    model = plain(family, dtype)
    with torch.no_grad():
        hidden, logits, targets = _own(model)
        got, entropy = head_logprobs(model, hidden, targets, with_entropy=True)
        logs = logits.log_softmax(-1)
        wanted = logs.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=bound)
        torch.testing.assert_close(entropy, torch.special.entr(logs.exp()).sum(1), rtol=0, atol=bound)
        torch.testing.assert_close(last_logits(model, hidden), logits, rtol=bound, atol=bound)
    if family in ("gemma2", "gemma3_text", "cohere", "granite"):  # the form matters here, or the test would be blind
        bare = (
            (hidden.detach() @ model.get_output_embeddings().weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        )
        assert float((bare - wanted).detach().abs().max()) > 0.1


def _adapted(family: str, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": ["lm_head"]} | settings
    model = get_peft_model(plain(family, torch.float64), LoraConfig(r=2, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return model


def _compare(model: Any) -> Tensor:
    """Values and gradients of our head against those of the model's own logits; the log-probabilities."""
    hidden, logits, targets = _own(model.get_base_model())
    wanted = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got, _ = head_logprobs(model.get_base_model(), hidden, targets)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    leaves = [hidden, *(p for p in model.parameters() if p.requires_grad)]
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((weights * v).sum(), leaves, retain_graph=True, allow_unused=True) for v in (got, wanted)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    return got.detach()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", ["llama", "phi", "gemma2", "granite"])
def test_an_adapter_on_the_head_has_the_values_and_gradients_of_peft(family: str) -> None:
    model = _adapted(family)
    with_it = _compare(model)
    model.base_model.disable_adapter_layers()
    hidden, logits, targets = _own(model.get_base_model())
    without, _ = head_logprobs(model.get_base_model(), hidden, targets)
    wanted = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(without, wanted, rtol=0, atol=1e-12)
    assert float((with_it - without).detach().abs().max()) > 0.01


def test_of_two_adapters_on_the_head_the_active_one_counts() -> None:
    from peft import LoraConfig

    model = _adapted("llama")
    first = _compare(model)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=3, target_modules=["lm_head"]))
    model.set_adapter("other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.data = torch.full_like(parameter, 0.1, dtype=torch.float64).cumsum(0)
    assert float((_compare(model) - first).abs().max()) > 0.01


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_head_trained_in_full_beside_an_adapter_is_the_one_used(family: str) -> None:
    model = _adapted(family, target_modules=["q_proj"], modules_to_save=["lm_head"])
    changed = _compare(model)
    assert float((changed - _compare(_adapted(family, target_modules=["q_proj"]))).abs().max()) > 0.01


class Made(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, views of the known ones aside."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, leaf.numel())
        return result


def test_an_adapter_on_the_head_makes_no_second_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2 * 320)
    model = _adapted("llama")
    head = model.get_base_model().lm_head
    hidden = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    with Made({head.base_layer.weight.untyped_storage().data_ptr()}) as made:
        head_logprobs(model.get_base_model(), hidden, torch.arange(5))[0].sum().backward()
    assert made.largest < 320 * 32
    with Made({head.base_layer.weight.untyped_storage().data_ptr()}) as made:
        _ = head.base_layer.weight + head.get_delta_weight("default")
    assert made.largest == 320 * 32  # the measure sees a second head


def test_dora_on_the_head_is_refused() -> None:
    model = _adapted("llama", use_dora=True)
    with pytest.raises(ModelError, match="no plain LoRA"):
        head_logprobs(model.get_base_model(), torch.randn(2, 32, dtype=torch.float64), torch.arange(2))


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_accepted(family: str, dtype: torch.dtype) -> None:
    check_logits(plain(family, dtype))


@pytest.mark.parametrize(
    ("family", "setting"), [("hyperclovax", {"logits_scaling": 2.0}), ("falcon_h1", {"lm_head_multiplier": 2.0})]
)
def test_a_model_that_makes_its_logits_otherwise_is_refused(family: str, setting: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model(family, **sizes, **heads, **setting, eos_token_id=1)
    with pytest.raises(ModelError, match="not known here"):
        check_logits(AutoModelForCausalLM.from_config(config))
