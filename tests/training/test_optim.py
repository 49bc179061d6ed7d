import math
from typing import Any

import pytest
import torch
from torch import nn

from fairlead.config import OptimSection
from fairlead.errors import ConfigError
from fairlead.training.optim import Optimizer, learning_rate_factor
from fairlead.training.rules import round_at_random


def section(**settings: Any) -> OptimSection:
    return OptimSection.model_validate(settings)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (3, 2), "layer.bias": (3,), "norm.weight": (2,), "scale": (), "wide": (80, 64)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def fill_gradients(given: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in given.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# --- the learning rate ---------------------------------------------------------------------------------------------

HALF, QUARTER = 0.5, 0.25
UP = 0.5 * (1 + math.sqrt(0.5))  # the cosine at an eighth of a turn
DOWN = 0.5 * (1 - math.sqrt(0.5))


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "floor", "factors"),
    [
        ("constant", 0, 0.0, [1, 1, 1, 1, 1]),
        ("constant", 2, 0.0, [0.5, 1, 1, 1, 1]),
        ("constant", 4, 0.3, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0, 0.2, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 2, 0.0, [0.5, 1, 1, 0.5, 0]),
        ("linear", 4, 0.0, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 5, 0.0, [0.2, 0.4, 0.6, 0.8, 1]),
        ("linear", 10, 0.0, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("cosine", 0, 0.0, [1, UP, 0.5, DOWN, 0]),
        ("cosine", 0, 0.5, [1, 0.5 + UP / 2, 0.75, 0.5 + DOWN / 2, 0.5]),
        ("cosine", 2, 0.1, [0.5, 1, 1, 0.55, 0.1]),
        ("cosine", 1, 0.0, [1, 1, 0.75, 0.25, 0]),
    ],
)
def test_the_learning_rate_of_five_steps(schedule: str, warmup_steps: int, floor: float, factors: list[float]) -> None:
    found = [
        learning_rate_factor(step, 5, schedule=schedule, warmup_steps=warmup_steps, floor=floor) for step in range(1, 6)
    ]
    assert found == pytest.approx(factors, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 3, 1000])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_last_step_has_the_floor(schedule: str, num_steps: int, floor: float) -> None:
    last = learning_rate_factor(num_steps, num_steps, schedule=schedule, warmup_steps=0, floor=floor)
    assert last == pytest.approx(floor, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_takes_it_at_the_peak(schedule: str) -> None:
    assert learning_rate_factor(1, 1, schedule=schedule, warmup_steps=0, floor=0.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "warmup_steps"),
    [
        ({}, 0),
        ({"warmup_ratio": 0.25}, 5),
        ({"warmup_ratio": 0.12}, 2),
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 0, "warmup_ratio": 0.5}, 0),
    ],
)
def test_warm_up_steps_win_over_the_ratio_of_all_steps(settings: dict[str, Any], warmup_steps: int) -> None:
    assert Optimizer(section(**settings), parameters(), 20).warmup_steps == warmup_steps


def test_a_step_moves_by_the_scheduled_rate_and_drops_the_gradients() -> None:
    """Plain gradient descent: the change is rate times gradient."""
    given = parameters()
    settings = section(name="sgd", learning_rate=0.1, schedule="linear", min_learning_rate_ratio=0.5)
    optimizer = Optimizer(settings, given, 3)
    for step, rate in ((1, 0.1), (2, 0.075), (3, 0.05)):
        before = {name: parameter.detach().clone() for name, parameter in given.items()}
        fill_gradients(given, step)
        gradients = {name: p.grad.clone() for name, p in given.items() if p.grad is not None}
        assert optimizer.step(step) == pytest.approx(rate)
        for name, parameter in given.items():
            torch.testing.assert_close(parameter.detach(), before[name] - rate * gradients[name])
            assert parameter.grad is None


# --- decay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        *({"name": name} for name in ("adamw", "sgd", "lion", "adafactor", "adamw-8bit", "lion-8bit")),
        {"name": "adamw", "state_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_only_matrices_decay(settings: dict[str, Any]) -> None:
    """With zero gradients a step is the decay alone: times 1 - rate * decay."""
    given = parameters()
    before = {key: parameter.detach().clone() for key, parameter in given.items()}
    optimizer = Optimizer(section(**settings, learning_rate=0.1, weight_decay=0.5, schedule="constant"), given, 1)
    for parameter in given.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1)
    for key, parameter in given.items():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[key], rtol=1e-6, atol=0)


def test_the_first_step_of_adam_is_the_sign_of_the_gradient_times_the_rate() -> None:
    """Kingma and Ba 2015: both moments are unbiased, so m / sqrt(v) is g / |g|."""
    given = parameters()
    before = {key: parameter.detach().clone() for key, parameter in given.items()}
    fill_gradients(given, 1)
    signs = {key: parameter.grad.sign() for key, parameter in given.items() if parameter.grad is not None}
    Optimizer(section(name="adamw", learning_rate=0.01, schedule="constant"), given, 1).step(1)
    for key, parameter in given.items():
        torch.testing.assert_close(parameter.detach(), before[key] - 0.01 * signs[key], rtol=0, atol=1e-6)


# --- rules of our own, and of others ------------------------------------------------------------------------------


def test_three_steps_of_lion_by_hand() -> None:
    """Chen et al. 2023, algorithm 2, rate 0.1, betas 0.9 and 0.5, decay 0.5 (matrices only).

    m: 0, 1, -0.5, ...; c = 0.9 m + 0.1 g: 0.2 -> +, 0.7 -> +, -0.4 -> -.
    """
    given = {"w": nn.Parameter(torch.tensor([[1.0]])), "b": nn.Parameter(torch.tensor([1.0]))}
    settings = section(name="lion", learning_rate=0.1, betas=(0.9, 0.5), weight_decay=0.5, schedule="constant")
    optimizer = Optimizer(settings, given, 3)
    found: list[tuple[float, float]] = []
    for step, gradient in enumerate((2.0, -2.0, 0.5), start=1):
        for parameter in given.values():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step(step)
        found.append((given["w"].item(), given["b"].item()))
    # w: 1 * 0.95 - 0.1, 0.85 * 0.95 - 0.1, 0.7075 * 0.95 + 0.1
    assert [w for w, _ in found] == pytest.approx([0.85, 0.7075, 0.772125])
    assert [b for _, b in found] == pytest.approx([0.9, 0.8, 0.9])
    assert optimizer.tensors()["b|exp_avg"].tolist() == [0.0]  # 0, 1, -0.5, 0


def test_lion_steps_as_that_of_bitsandbytes_does() -> None:
    from bitsandbytes.optim.lion import Lion32bit

    ours, theirs = parameters(), parameters()
    settings = section(name="lion", learning_rate=0.01, weight_decay=0.1, schedule="constant")
    optimizer = Optimizer(settings, ours, 5)
    groups = [
        {"params": [p for p in theirs.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    other = Lion32bit(groups, lr=0.01, betas=(0.9, 0.95))
    for step in range(1, 6):
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        optimizer.step(step)
        other.step()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)


def test_the_first_step_of_adafactor_by_hand() -> None:
    """Shazeer and Stern 2018: the step is relative to the weight's root mean square, here 2, and its own is clipped to
    1; a gradient of one value is its factors' root exactly, so the update is its sign."""
    given = {"w": nn.Parameter(torch.full((2, 3), 2.0))}
    given["w"].grad = torch.full((2, 3), -0.5)
    Optimizer(section(name="adafactor", learning_rate=0.01, schedule="constant"), given, 1).step(1)
    torch.testing.assert_close(given["w"].detach(), torch.full((2, 3), 2.0 + 2.0 * 0.01))


@pytest.mark.parametrize(
    ("settings", "bound"),
    [({"name": "adamw-8bit"}, 0.05), ({"name": "adamw", "state_dtype": "bfloat16"}, 0.02)],
    ids=str,
)
def test_small_states_change_the_path_of_adamw_but_little(settings: dict[str, Any], bound: float) -> None:
    """Against torch's AdamW with fp32 states: the way of 20 steps, relative."""
    small, plain = parameters(), parameters()
    start = plain["wide"].detach().clone()
    common = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    torch.manual_seed(0)
    first, second = Optimizer(section(**common, **settings), small, 20), Optimizer(section(**common), plain, 20)
    for step in range(1, 21):
        for given, optimizer in ((small, first), (plain, second)):
            fill_gradients(given, step)
            optimizer.step(step)
    way = (plain["wide"] - start).norm()
    difference = (small["wide"] - plain["wide"]).norm() / way
    assert 0 < difference.item() < bound


def test_states_of_one_and_two_bytes() -> None:
    """8 bits: a code a number and an fp32 scale for 256 of them, from 4096 numbers up; smaller ones stay in fp32."""
    expected = {
        "adamw-8bit": {"state1": (torch.uint8, 5120), "absmax1": (torch.float32, 20), "state2": (torch.uint8, 5120)},
        "lion-8bit": {"state1": (torch.uint8, 5120), "absmax1": (torch.float32, 20)},
        "lion": {"exp_avg": (torch.float32, 5120)},
        "adafactor": {"row_var": (torch.float32, 80), "col_var": (torch.float32, 64)},
    }
    for name, fields in expected.items():
        given = parameters()
        optimizer = Optimizer(section(name=name), given, 1)
        fill_gradients(given, 1)
        optimizer.step(1)
        held = {key.removeprefix("wide|"): value for key, value in optimizer.tensors().items() if "wide|" in key}
        for field, (dtype, number) in fields.items():
            assert (held[field].dtype, held[field].numel()) == (dtype, number), (name, field)
        if "state1" in fields:
            assert optimizer.tensors()["layer.weight|state1"].dtype == torch.float32


def test_rounding_at_random_keeps_the_mean() -> None:
    """1 + 2^-10 lies an eighth of the way from 1 to the next bfloat16, 1 + 2^-7."""
    torch.manual_seed(0)
    rounded = round_at_random(torch.full((40_000,), 1 + 2.0**-10)).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2.0**-7}
    share = (rounded > 1).float().mean().item()
    assert share == pytest.approx(1 / 8, abs=4 * math.sqrt(1 / 8 * 7 / 8 / 40_000))
    negative = round_at_random(torch.full((1000,), -3.0))
    assert negative.unique().tolist() == [-3.0]  # what bfloat16 can hold stays


def test_paged_states_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"paged-adamw-8bit: a GPU pages its memory to the CPU, the cpu does not"):
        Optimizer(section(name="paged-adamw-8bit"), parameters(), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged optimizers need a CUDA device")
@pytest.mark.parametrize("name", ["paged-adamw-8bit", "paged-lion-8bit"])
def test_paged_states_go_out_and_in(name: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [nn.Parameter(torch.ones(512, 512, device="cuda")) for _ in range(2)]
    gradients = [torch.randn(512, 512, device="cuda", generator=generator) for _ in range(4)]
    first, second = (Optimizer(section(name=name), {"w": weight}, 4) for weight in weights)
    for step in (1, 2):
        weights[0].grad = gradients[step - 1].clone()
        first.step(step)
    weights[1].data.copy_(weights[0])
    second.load_tensors({key: value.clone() for key, value in first.tensors().items()})
    for step in (3, 4):
        for weight, optimizer in zip(weights, (first, second), strict=True):
            weight.grad = gradients[step - 1].clone()
            optimizer.step(step)
    assert torch.equal(weights[0], weights[1])


def test_states_in_bfloat16_are_for_adamw() -> None:
    with pytest.raises(ValueError, match=r"state_dtype=bfloat16 is for adamw, not for lion"):
        section(name="lion", state_dtype="bfloat16")


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        *({"name": name} for name in ("adamw", "adam", "sgd", "lion", "adafactor", "adamw-8bit", "lion-8bit")),
        {"name": "adamw", "state_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_the_state_goes_out_and_in_bit_for_bit(given: dict[str, str]) -> None:
    settings = section(**given, learning_rate=0.05, weight_decay=0.1)
    uninterrupted, continued = parameters(), parameters()
    first = Optimizer(settings, uninterrupted, 6)
    for step in (1, 2, 3):
        fill_gradients(uninterrupted, step)
        first.step(step)
    saved = {key: value.clone() for key, value in first.tensors().items()}
    with torch.no_grad():
        for key, parameter in continued.items():
            parameter.copy_(uninterrupted[key])
    second = Optimizer(settings, continued, 6)
    second.load_tensors(saved)
    again = second.tensors()
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in saved.items())
    for step in (4, 5, 6):
        for parameters_, optimizer in ((uninterrupted, first), (continued, second)):
            torch.manual_seed(step)  # as the loop does: rounding at random draws from it
            fill_gradients(parameters_, step)
            optimizer.clip()
            optimizer.step(step)
    for key in uninterrupted:
        assert torch.equal(uninterrupted[key], continued[key])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor", "adamw-8bit", "lion-8bit"])
def test_a_step_is_known_as_a_write_of_every_weight(name: str) -> None:
    """By which a sampler knows that its copy of the weights is old; fused and 8-bit steps say nothing of it."""
    given = parameters()
    optimizer, before = Optimizer(section(name=name), given, 2), {key: each._version for key, each in given.items()}
    fill_gradients(given, 1)
    optimizer.step(1)
    assert all(each._version > before[key] for key, each in given.items())


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "adafactor", "adamw-8bit"])
def test_what_has_forgotten_steps_as_a_new_one(name: str) -> None:
    used, new = parameters(), parameters()
    optimizer = Optimizer(section(name=name, schedule="constant"), used, 9)
    for step in (1, 2):
        fill_gradients(used, step)
        optimizer.step(step)
    optimizer.forget()
    assert optimizer.tensors() == {}
    for key, parameter in new.items():
        parameter.data.copy_(used[key].data)
    fresh = Optimizer(section(name=name, schedule="constant"), new, 9)
    for step, rate in ((3, 1.0), (4, 0.5)):
        for each, holder in ((used, optimizer), (new, fresh)):
            fill_gradients(each, step)
            assert holder.step(step, rate) == pytest.approx(rate * 1e-4)
    assert all(torch.equal(used[key], new[key]) for key in used)


def test_the_state_names_each_parameter_and_field() -> None:
    given = parameters()
    optimizer = Optimizer(section(), given, 2)
    assert optimizer.tensors() == {}
    fill_gradients(given, 1)
    optimizer.step(1)
    assert set(optimizer.tensors()) == {
        f"{key}|{field}" for key in given for field in ("step", "exp_avg", "exp_avg_sq")
    }


def test_a_parameter_that_never_had_a_gradient_has_no_state_and_stays() -> None:
    given = parameters()
    fill_gradients(given, 1)
    given["scale"].grad = None
    before = given["scale"].item()
    optimizer = Optimizer(section(), given, 2)
    assert torch.isfinite(optimizer.clip())
    optimizer.step(1)
    assert given["scale"].item() == before
    assert not any(key.startswith("scale|") for key in optimizer.tensors())
    restored = Optimizer(section(), given, 2)
    restored.load_tensors(optimizer.tensors())
    fill_gradients(given, 2)
    restored.step(2)


# --- clipping ------------------------------------------------------------------------------------------------------


def with_gradient(*values: float) -> dict[str, nn.Parameter]:
    """Two parameters that share the gradient ``values``."""
    given = {"a": nn.Parameter(torch.zeros(1, 1)), "b": nn.Parameter(torch.zeros(len(values) - 1))}
    given["a"].grad, given["b"].grad = torch.tensor([[values[0]]]), torch.tensor(values[1:])
    return given


def gradients(given: dict[str, nn.Parameter]) -> list[float]:
    return [x for p in given.values() if p.grad is not None for x in p.grad.flatten().tolist()]


@pytest.mark.parametrize(
    ("limit", "scaled"),
    [(6.5, [1.5, 2.0, 6.0]), (13.0, [3.0, 4.0, 12.0]), (20.0, [3.0, 4.0, 12.0]), (None, [3.0, 4.0, 12.0])],
)
def test_gradients_are_scaled_down_to_the_norm_over_all_parameters(limit: float | None, scaled: list[float]) -> None:
    """The norm of (3, 4, 12) is 13."""
    given = with_gradient(3.0, 4.0, 12.0)
    norm = Optimizer(section(max_grad_norm=limit), given, 1).clip()
    assert norm.item() == pytest.approx(13.0)
    assert gradients(given) == pytest.approx(scaled, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients_alone(bad: float) -> None:
    given = with_gradient(3.0, bad, 4.0)
    norm = Optimizer(section(max_grad_norm=1.0), given, 1).clip()
    assert not math.isfinite(norm.item())
    found = gradients(given)
    assert (found[0], found[2]) == (3.0, 4.0)
    assert found[1] == bad or (math.isnan(bad) and math.isnan(found[1]))


def test_no_gradient_at_all_has_norm_zero() -> None:
    assert Optimizer(section(), parameters(), 1).clip().item() == 0.0
