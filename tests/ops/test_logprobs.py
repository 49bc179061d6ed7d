"""Against log_softmax of the whole logits, which autograd differentiates by itself."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairlead.ops import logprobs
from fairlead.ops.logprobs import Readout, full_kl, logit_statistics, token_logprobs

ROWS, WIDTH, VOCABULARY = 7, 4, 11


def inputs(dtype: torch.dtype = torch.float64, rows: int = ROWS, vocabulary: int = VOCABULARY) -> tuple[Tensor, ...]:
    """hidden, weight, bias, targets"""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return normal(rows, WIDTH), normal(vocabulary, WIDTH), normal(vocabulary), targets


@pytest.fixture(params=[0, 4 * VOCABULARY, 1 << 24], autouse=True)
def _kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, some, or all of what the backward pass needs is kept."""
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", request.param)


def full(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The definition, all logits at once."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logs = (logits / temperature).log_softmax(1)
    return logs[torch.arange(len(targets)), targets], torch.special.entr(logs.exp()).sum(1)


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 7 * VOCABULARY - 1, 7 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_are_those_of_the_whole_log_softmax_wherever_the_chunks_end(
    monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float, with_bias: bool, with_entropy: bool
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in inputs())
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    given = bias if with_bias else None
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)

    def gradients(values: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        loss = (weights * values).sum() + ((weights**2 * entropy).sum() if with_entropy else 0)
        return torch.autograd.grad(loss, leaves)

    wanted = full(hidden, weight, given, targets, temperature)
    ours = token_logprobs(hidden, weight, targets, bias=given, temperature=temperature, with_entropy=with_entropy)
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], wanted[1] if with_entropy else wanted[1][:0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(*ours), gradients(*wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_the_slopes_of_the_values(
    monkeypatch: pytest.MonkeyPatch, with_entropy: bool, with_bias: bool
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in inputs())

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        both = token_logprobs(hidden, weight, targets, bias=bias, temperature=1.3, with_entropy=with_entropy)
        return both if with_entropy else both[:1]

    assert torch.autograd.gradcheck(call, (hidden, weight, bias) if with_bias else (hidden, weight))


def head_of_form(
    hidden: Tensor, weight: Tensor, bias: Tensor, reduced: Tensor, up: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale 3, cap 2, an adapter of rank 2, temperature 0.7, all logits at once."""
    raw = 3.0 * (hidden @ weight.T + reduced @ up.T + bias)
    logs = (2.0 * torch.tanh(raw / 2.0) / 0.7).log_softmax(1)
    return logs[torch.arange(len(targets)), targets], torch.special.entr(logs.exp()).sum(1)


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_scale_cap_and_adapter_give_the_values_and_gradients_of_their_definition(
    monkeypatch: pytest.MonkeyPatch, chunk: int, with_entropy: bool
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, targets = inputs()
    reduced, up = hidden[:, :2].flip(0).clone(), weight[:, :2].flip(0).clone()
    leaves = [x.requires_grad_(True) for x in (hidden, weight, bias, reduced, up)]
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    wanted = head_of_form(hidden, weight, bias, reduced, up, targets)
    ours = token_logprobs(
        hidden, weight, targets, bias=bias, low_rank=(reduced, up), scale=3.0, cap=2.0, temperature=0.7,
        with_entropy=with_entropy,
    )  # fmt: skip
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], wanted[1] if with_entropy else wanted[1][:0], rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad((weights * v).sum() + ((weights**2 * e).sum() if with_entropy else 0), leaves)
        for v, e in (ours, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_the_cap_by_hand() -> None:
    """Raw logits (0, 2) capped at 2: (0, 2 tanh 1); without the cap the odds would be e^2."""
    values, _ = token_logprobs(torch.ones(1, 1), torch.tensor([[0.0], [2.0]]), torch.tensor([1]), cap=2.0)
    assert values.item() == pytest.approx(-math.log1p(math.exp(-2 * math.tanh(1))), abs=1e-6)


def test_only_the_gradients_asked_for_are_computed() -> None:
    hidden, weight, bias, targets = inputs()
    hidden.requires_grad_(True)
    token_logprobs(hidden, weight, targets, bias=bias)[0].sum().backward()
    assert (weight.grad, bias.grad) == (None, None)
    wanted = torch.autograd.grad(full(hidden, weight, bias, targets, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-12, atol=1e-12)


def test_the_entropy_and_its_slope_by_hand() -> None:
    """Logits (0, ln 3): p = (1/4, 3/4), H = ln 4 - 3/4 ln 3, dH/dz_1 = -p_1 (ln p_1 + H) = 3/16 ln 3."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    weight.requires_grad_(True)
    values, entropy = token_logprobs(hidden, weight, torch.tensor([1]), with_entropy=True)
    assert values.item() == pytest.approx(math.log(3 / 4), abs=1e-15)
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-15)
    gradient = torch.autograd.grad(entropy.sum(), weight)[0]
    slope = 3 / 16 * math.log(3)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([slope, -slope], dtype=torch.float64))


def test_the_temperature_divides_the_logits_before_the_softmax() -> None:
    """Logits (0, ln 3) at temperature 1/2 are (0, ln 9): p = (1/10, 9/10)."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    values, _ = token_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 1]), temperature=0.5)
    assert values.exp().tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_bfloat16_head_is_summed_in_float32(with_entropy: bool) -> None:
    """In bfloat16 a sum of 4096 similar terms stops growing at 256 of them."""
    hidden, weight, bias, targets = inputs(torch.bfloat16, rows=5, vocabulary=4096)
    values, entropy = token_logprobs(hidden, weight, targets, bias=bias, with_entropy=with_entropy)
    logits = (hidden @ weight.T).double() + bias.double()
    logs = logits.log_softmax(1)
    assert values.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(values.double(), logs[torch.arange(5), targets], rtol=0, atol=1e-5)
    if with_entropy:
        torch.testing.assert_close(entropy.double(), torch.special.entr(logs.exp()).sum(1), rtol=0, atol=1e-5)


def test_gradients_of_bfloat16_weights_are_accumulated_over_chunks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 equal rows, one a chunk: each adds 1/2 for its target and takes 1/2 from the other token. In bfloat16 the
    sum would stop at 128."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2)
    rows = 300
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    values, _ = token_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.long), bias=bias)
    gradients = torch.autograd.grad(values.sum(), (weight, bias))
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2
    assert [g.flatten().tolist() for g in gradients] == [[150.0, -150.0]] * 2


def test_float32_inputs_are_as_exact_as_float32_is() -> None:
    hidden, weight, bias, targets = inputs(torch.float32, rows=5, vocabulary=4096)
    values, entropy = token_logprobs(hidden, weight, targets, bias=bias, with_entropy=True)
    wanted = full(hidden.double(), weight.double(), bias.double(), targets, 1.0)
    torch.testing.assert_close((values.double(), entropy.double()), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_token_whose_bias_is_minus_infinity_is_as_good_as_absent(with_entropy: bool) -> None:
    hidden, weight, bias, _ = inputs()
    targets = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    banned, kept = VOCABULARY - 1, VOCABULARY - 1
    bias[banned] = -math.inf
    leaves = [x.requires_grad_(True) for x in (hidden, weight, bias)]
    values, entropy = token_logprobs(hidden, weight, targets, bias=bias, with_entropy=with_entropy)
    gradients = torch.autograd.grad(values.sum() + 2 * entropy.sum(), leaves)

    fewer = [x.detach().clone().requires_grad_(True) for x in (hidden, weight[:kept], bias[:kept])]
    wanted, wanted_entropy = full(fewer[0], fewer[1], fewer[2], targets, 1.0)
    wanted_gradients = torch.autograd.grad(wanted.sum() + 2 * with_entropy * wanted_entropy.sum(), fewer)
    torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12)
    if with_entropy:
        torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], wanted_gradients[0], rtol=1e-12, atol=1e-12)
    for gradient, wanted_gradient in zip(gradients[1:], wanted_gradients[1:], strict=True):
        torch.testing.assert_close(gradient[:kept], wanted_gradient, rtol=1e-12, atol=1e-12)
        assert not gradient[banned].any()


def test_large_logits_overflow_nothing() -> None:
    weight = torch.tensor([[1000.0], [0.0], [-1000.0]])
    values, entropy = token_logprobs(torch.ones(3, 1), weight, torch.arange(3), with_entropy=True)
    assert values.tolist() == [0.0, -1000.0, -2000.0]
    assert entropy.tolist() == [0.0] * 3


def test_no_rows_give_no_values_and_zero_gradients() -> None:
    hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in inputs(rows=0))
    values, entropy = token_logprobs(hidden, weight, targets, bias=bias, with_entropy=True)
    assert values.shape == entropy.shape == (0,)
    gradients = torch.autograd.grad(values.sum() + entropy.sum(), (hidden, weight, bias))
    assert [tuple(g.shape) for g in gradients] == [(0, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    assert not any(g.any() for g in gradients)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize("form", [{}, {"cap": 2.0}, {"cap": 3.0, "temperature": 0.7, "scale": 1.7}])
def test_under_a_frozen_head_the_backward_pass_makes_no_logits_and_has_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], chunk: int
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, targets = inputs(torch.float64)
    weights = torch.randn(len(targets), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradient(trained: bool) -> Tensor:
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        values, _ = token_logprobs(leaf, head, targets, bias=bias, **form)
        with LargestTensor() as backward:
            (weights * values).sum().backward()
        assert trained or backward.elements <= hidden.numel()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(False), gradient(True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_logits_of_all_rows_never_exist_at_once_forward_or_backward(
    monkeypatch: pytest.MonkeyPatch, with_entropy: bool, cap: float | None
) -> None:
    rows, vocabulary, chunk = 60, 1000, 5000
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, targets = (
        x.requires_grad_(x.is_floating_point()) for x in inputs(torch.float32, rows, vocabulary)
    )
    assert max(hidden.numel(), weight.numel()) < chunk
    low_rank = (hidden[:, :2], weight[:, :2])
    with LargestTensor() as forward:
        values, entropy = token_logprobs(
            hidden, weight, targets, bias=bias, low_rank=low_rank, cap=cap, with_entropy=with_entropy
        )
    with LargestTensor() as backward:
        (values.sum() + entropy.sum()).backward()
    assert (forward.elements, backward.elements) == (chunk, chunk)

    with LargestTensor() as forward:  # the measure sees both directions
        values, _ = full(hidden, weight, bias, targets, 1.0)
    with LargestTensor() as backward:
        values.sum().backward()
    assert (forward.elements, backward.elements) == (rows * vocabulary, rows * vocabulary)


# --- less than the vocabulary --------------------------------------------------------------------------------------

KEPT = [[], [3, 0, 9], [5], [], [1, 2, 10], [4, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
"""By row; an empty one keeps the whole vocabulary."""
BANNED = [-1, 8, -1, 6, -1, -1, -1]
WITHIN = torch.tensor([4, 9, 5, 0, 2, 7, 10])
"""A target of each row that it could be."""
SUPPORT = (
    torch.tensor([token for row in KEPT for token in row]),
    torch.tensor([len(row) for row in KEPT]),
    torch.tensor(BANNED),
)


def allowed() -> Tensor:
    """[ROWS, VOCABULARY] bool, written out."""
    mask = torch.tensor([[not row or token in row for token in range(VOCABULARY)] for row in KEPT])
    for row, token in enumerate(BANNED):
        if token >= 0:
            mask[row, token] = False
    return mask


def masked(hidden: Tensor, weight: Tensor, bias: Tensor, temperature: float, cap: float | None = None) -> Tensor:
    """Log-softmax over the allowed tokens, all logits at once."""
    logits = hidden @ weight.T + bias
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return (logits / temperature).masked_fill(~allowed(), -math.inf).log_softmax(1)


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_over_a_support_values_and_gradients_are_those_of_a_masked_softmax(
    monkeypatch: pytest.MonkeyPatch, chunk: int, with_entropy: bool, cap: float | None, frozen: bool
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, _ = inputs()
    leaves = [hidden.requires_grad_()] if frozen else [x.requires_grad_() for x in (hidden, weight, bias)]
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    logs = masked(hidden, weight, bias, 0.7, cap)
    wanted = logs[torch.arange(ROWS), WITHIN], torch.special.entr(logs.exp()).sum(1)
    ours = token_logprobs(
        hidden, weight, WITHIN, bias=bias, temperature=0.7, cap=cap, with_entropy=with_entropy, support=SUPPORT
    )
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], wanted[1] if with_entropy else wanted[1][:0], rtol=1e-12, atol=1e-12)
    # Autograd of the plain form has 0 * inf in the entropy, so its slope is that of the finite terms.
    finite = torch.where(allowed(), logs, 0.0)
    entropy = -(torch.where(allowed(), logs.exp(), 0.0) * finite).sum(1)
    gradients = [
        torch.autograd.grad((weights * v).sum() + ((weights**2 * e).sum() if with_entropy else 0), leaves)
        for v, e in (ours, (wanted[0], entropy))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_gradients_over_a_support_are_the_slopes_of_the_values() -> None:
    hidden, weight, bias, _ = (x.requires_grad_(x.is_floating_point()) for x in inputs())

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, weight, WITHIN, bias=bias, with_entropy=True, support=SUPPORT)

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


def test_of_two_kept_tokens_each_has_its_share_by_hand() -> None:
    """Logits (0, ln 3, 50) of which the first two are kept: 1/4 and 3/4; of all but the last the same."""
    weight = torch.tensor([[0.0], [math.log(3)], [50.0]])
    kept = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([-1, 2])
    values, entropy = token_logprobs(torch.ones(2, 1), weight, torch.tensor([1, 0]), with_entropy=True, support=kept)
    assert values.exp().tolist() == pytest.approx([0.75, 0.25])
    assert entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2)


def test_a_target_outside_its_support_has_no_probability() -> None:
    hidden, weight, bias, _ = inputs()
    values, _ = token_logprobs(hidden, weight, torch.full((ROWS,), 8), bias=bias, support=SUPPORT)
    assert values.isinf().tolist() == [False, True, True, False, True, True, False]


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("over", ["all", "support"])
def test_collision_and_mean_logit_are_those_of_their_definition(
    monkeypatch: pytest.MonkeyPatch, chunk: int, over: str
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, _ = inputs()
    inside = allowed() if over == "support" else torch.ones(ROWS, VOCABULARY, dtype=torch.bool)
    logits = (hidden @ weight.T + bias) / 0.7
    probs = logits.masked_fill(~inside, -math.inf).softmax(1)
    mean = torch.stack([row[mask].mean() for row, mask in zip(logits, inside, strict=True)])
    support = SUPPORT if over == "support" else None
    found = logit_statistics(hidden, weight, bias=bias, temperature=0.7, support=support)
    torch.testing.assert_close(found, ((probs**2).sum(1).log(), mean), rtol=1e-12, atol=1e-12)


# --- divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("over", ["all", "support"])
def test_the_kl_is_that_of_whole_distributions(monkeypatch: pytest.MonkeyPatch, chunk: int, over: str) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, _ = inputs()
    policy = Readout(hidden, weight, bias, cap=2.0)
    reference = Readout(hidden.flip(0), weight.flip(1), scale=1.5)
    inside = allowed() if over == "support" else torch.ones(ROWS, VOCABULARY, dtype=torch.bool)
    own = 2.0 * torch.tanh((hidden @ weight.T + bias) / 2.0) / 0.7
    other = 1.5 * hidden.flip(0) @ weight.flip(1).T / 0.7
    wanted = torch.stack(
        [
            torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=a[mask]), torch.distributions.Categorical(logits=b[mask])
            )
            for a, b, mask in zip(own, other, inside, strict=True)
        ]
    )
    found = full_kl(policy, reference, temperature=0.7, support=SUPPORT if over == "support" else None)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert float(wanted.max()) > 0.1


def test_the_kl_makes_no_logits_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary, chunk = 60, 1000, 5000
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, _ = inputs(torch.float32, rows, vocabulary)
    with LargestTensor() as seen:
        kl = full_kl(Readout(hidden, weight, bias), Readout(hidden, weight))
    assert seen.elements <= chunk
    assert not kl.requires_grad and float(kl.min()) > 0


def test_a_token_that_only_the_policy_can_draw_makes_the_kl_infinite() -> None:
    ones, weight = torch.ones(1, 1), torch.zeros(2, 1)
    never = torch.tensor([0.0, -math.inf])
    assert full_kl(Readout(ones, weight), Readout(ones, weight, never)).tolist() == [math.inf]
    assert full_kl(Readout(ones, weight, never), Readout(ones, weight)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("form", [{}, {"temperature": 0.7}, {"cap": 2.0, "scale": 0.5}, {"low_rank": True}])
def test_gradients_taken_on_the_way_forward_are_those_taken_on_the_way_back(
    monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], is_uniform: bool
) -> None:
    """Also where the loss does not weigh all rows alike, though it was said to; and once more through one graph."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in inputs())
    leaves, given = [hidden, weight, bias], dict(form)
    if given.pop("low_rank", False):
        low_rank = (
            hidden.detach()[:, :2].clone().requires_grad_(True),
            weight.detach()[:, :2].clone().requires_grad_(True),
        )
        given["low_rank"], leaves = low_rank, [*leaves, *low_rank]
    pull = torch.full((ROWS,), -0.3, dtype=torch.float64) if is_uniform else torch.linspace(-1, 2, ROWS).double()
    plain, _ = token_logprobs(hidden, weight, targets, bias=bias, **given)
    wanted = torch.autograd.grad(plain, leaves, pull)
    values, _ = token_logprobs(hidden, weight, targets, bias=bias, **given, uniform=True)
    torch.testing.assert_close(values, plain)
    for _ in range(2):
        got = torch.autograd.grad(values, leaves, pull, retain_graph=True)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_taken_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = (x.requires_grad_(x.is_floating_point()) for x in inputs())
    made: list[object] = []
    plain = logprobs._Gradients
    monkeypatch.setattr(logprobs, "_Gradients", lambda *given: made.append(given) or plain(*given))
    for uniform in (True, False):
        with torch.no_grad():
            token_logprobs(hidden, weight, targets, uniform=uniform)
        assert not made
        token_logprobs(hidden, weight, targets, uniform=uniform)[0].sum().backward()
        assert made
        made.clear()


def test_logits_are_computed_once_where_the_loss_is_uniform_or_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in inputs())
    calls: list[slice] = []
    plain = logprobs._logits
    monkeypatch.setattr(logprobs, "_logits", lambda part, *rest: calls.append(part) or plain(part, *rest))
    for uniform, room, number in ((True, 0, 1), (False, 0, 2), (False, 1 << 24, 1)):
        monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", room)
        calls.clear()
        token_logprobs(hidden, weight, targets, bias=bias, uniform=uniform)[0].sum().backward()
        assert len(calls) == number
