"""Packed layers compute what the layers do, follow the adapters that are active, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairlead.rollout import packed as module
from fairlead.rollout.packed import packed

WIDTHS = (24, 40)


class Network(nn.Module):
    """A linear layer with a bias, one without, GPT-2's transposed one, and one in fp64 that is none of our business."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(*WIDTHS), nn.Linear(*WIDTHS, bias=False)
        self.third, self.wide = Conv1D(WIDTHS[1], WIDTHS[0]), nn.Linear(*WIDTHS, dtype=torch.float64)
        nn.init.normal_(self.third.bias)

    def forward(self, states: Tensor) -> list[Tensor]:
        return [self.first(states), self.second(states), self.third(states), self.wide(states.double())]


def _adapted(**settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    names = ["first", "second", "third"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=names, fan_in_fan_out=False, **settings)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(Network(), config)  # pyright: ignore[reportArgumentType]
        model.add_adapter("other", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=[1, 1 << 40], ids=["reordered", "transposed"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layouts, whatever the size."""
    monkeypatch.setattr(module, "LARGE", request.param)
    monkeypatch.setattr(module, "LARGE_FOR_FEW", request.param)


def _agree(network: Any, *shape: int) -> list[Tensor]:
    """What the plain network gives, after the packed one gave the same."""
    states = torch.randn(*shape, WIDTHS[0], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = network(states)
        with packed(network):
            found = [network(states), network(states)][1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert [each.shape for each in found] == [(*shape, WIDTHS[1])] * 4
    return wanted


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("shape", [(5,), (7, 1), (20, 1)])
def test_few_rows_give_what_the_layers_give(shape: tuple[int, ...]) -> None:
    _agree(Network(), *shape)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_the_active_adapters_are_added_in(settings: dict[str, Any]) -> None:
    model = _adapted(**settings)
    first = _agree(model, 6, 1)
    model.set_adapter("other")
    second = _agree(model, 6, 1)
    model.base_model.disable_adapter_layers()
    none = _agree(model, 6, 1)
    for pair in ((first, second), (first, none), (second, none)):
        assert min(float((a - b).abs().max()) for a, b in zip(*pair, strict=True) if a.dtype == torch.float32) > 0.1


def test_every_fp32_layer_is_packed_once_and_for_few_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    product = module.product
    monkeypatch.setattr(module, "product", lambda *given: made.append(tuple(given[0].shape)) or product(*given))
    network = Network()
    with torch.no_grad(), packed(network):
        network(torch.randn(module.MOST_ROWS + 1, WIDTHS[0]))
        network(torch.randn(1, 2, WIDTHS[0]))
        assert not made
        for rows in (module.MOST_ROWS, 3, 1):
            network(torch.randn(rows, WIDTHS[0]))
    assert made == [WIDTHS[::-1]] * 3


def test_a_network_above_the_limit_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    network = Network()
    with packed(network):
        assert not any("forward" in vars(layer) for layer in network.modules())


def test_quantised_layers_are_left_as_they_are() -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    network = nn.ModuleList([layers.Linear4bit(8, 8), layers.Linear8bitLt(8, 8, has_fp16_weights=False)])
    with packed(network):
        assert not any("forward" in vars(layer) for layer in network)


def test_nothing_is_left_behind_when_decoding_fails_and_changed_weights_are_packed_anew() -> None:
    network = _adapted()
    with pytest.raises(ZeroDivisionError), torch.no_grad(), packed(network):
        network(torch.randn(2, WIDTHS[0]))
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in network.modules())
    with torch.no_grad():
        network.get_base_model().second.base_layer.weight.add_(1.0)
    _agree(network, 4, 1)


def test_a_build_of_torch_without_the_reordered_product_takes_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Tensor:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(module, "LARGE_FOR_FEW", 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
    module._has_onednn.cache_clear()
    weight, states = torch.randn(5, 3), torch.randn(2, 3)
    try:
        torch.testing.assert_close(module.product(weight, None, 8)(states), states @ weight.T)
    finally:
        module._has_onednn.cache_clear()
