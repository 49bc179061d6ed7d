import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fairlead.ops.sampling import (
    keep_top,
    kept_tokens,
    keyed_uniform,
    permutation,
    sample_tokens,
    stream_key,
    token_uniforms,
)

MASK = (1 << 64) - 1


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-square; cells that expect fewer than five are taken together."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def flat_p_value(uniforms: Tensor, bins: int = 100) -> float:
    return p_value(torch.histc(uniforms, bins, 0, 1), torch.full((bins,), len(uniforms) / bins))


def joint_p_value(first: Tensor, second: Tensor) -> float:
    """Are the pairs spread evenly over 10 x 10 cells?"""
    cells = (first * 10).long() * 10 + (second * 10).long()
    return p_value(cells.bincount(minlength=100), torch.full((100,), len(first) / 100))


# --- keys and uniforms ---------------------------------------------------------------------------------------------

GOLDEN = [
    # printf 'int:0\x1fstr:order\x1fint:3' | sha256sum | cut -c1-16
    ((0, "order", 3), "b4fbde37c3f66625"),
    (("0",), "479b4cc4518dd33f"),
    ((0,), "669b4c24c93570eb"),
    ((-7, "é"), "d1e40a4a2560c36e"),
]


@pytest.mark.parametrize(("parts", "digest"), GOLDEN)
def test_a_stream_key_is_63_bits_of_the_hash_of_its_typed_parts(parts: tuple[int | str, ...], digest: str) -> None:
    assert stream_key(*parts) == int.from_bytes(bytes.fromhex(digest), "little") >> 1


def test_stream_keys_do_not_depend_on_the_process_and_its_hashing_of_words() -> None:
    code = "from fairlead.ops.sampling import stream_key; print(stream_key(0, 'order', 3), hash('order'))"
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    key, word = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert int(word) != hash("order")
    assert int(key) == int.from_bytes(bytes.fromhex(GOLDEN[0][1]), "little") >> 1


def split_mix(x: int) -> int:
    """One output of SplitMix64 from the state ``x``, in Python's unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_the_uniforms_are_those_of_split_mix_in_exact_arithmetic() -> None:
    assert split_mix(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    keys = [0, 1, stream_key(1, "x"), (1 << 63) - 1]
    items, tokens = torch.tensor([0, 1, 5, 1 << 40]), torch.tensor([0, 3, 4095, 7])
    for key in keys:
        for draw in (0, 1):
            wanted = [
                (split_mix((split_mix((split_mix((i + key) & MASK) + t) & MASK) + draw) & MASK) >> 11) / 2**53
                for i, t in zip(items.tolist(), tokens.tolist(), strict=True)
            ]
            uniforms = keyed_uniform(key, items, tokens, draw)
            assert uniforms.dtype == torch.float64
            assert uniforms.tolist() == wanted


def test_uniforms_are_even_along_every_part_of_the_key() -> None:
    count = 20_000
    index, zero = torch.arange(count), torch.zeros(count, dtype=torch.long)
    key = stream_key(0, "uniform")
    along = {
        "items": keyed_uniform(key, index, zero, 0),
        "tokens": keyed_uniform(key, zero, index, 0),
        "draws": torch.cat([keyed_uniform(key, zero[:1], zero[:1], draw) for draw in range(2000)]),
        "keys": torch.cat([keyed_uniform(stream_key(0, k), zero[:1], zero[:1], 0) for k in range(2000)]),
    }
    for name, uniforms in along.items():
        assert 0 <= uniforms.min().item() <= uniforms.max().item() < 1, name
        assert flat_p_value(uniforms) > 1e-3, name


def test_neighbours_along_every_part_of_the_key_are_independent() -> None:
    count = 20_000
    items = torch.arange(count)
    tokens = items % 64
    key = stream_key(0, "uniform")
    base = keyed_uniform(key, items, tokens, 0)
    neighbours = {
        "key": keyed_uniform(stream_key(1, "uniform"), items, tokens, 0),
        "adjacent key": keyed_uniform(key + 1, items, tokens, 0)[1:],
        "item": keyed_uniform(key, items + 1, tokens, 0),
        "token": keyed_uniform(key, items, tokens + 1, 0),
        "swapped": keyed_uniform(key, tokens, items, 0),
        "draw": keyed_uniform(key, items, tokens, 1),
    }
    for name, other in neighbours.items():
        assert joint_p_value(base[: len(other)], other) > 1e-3, name
        assert not torch.isin(other, base).all(), name


@pytest.mark.parametrize("length", [0, 1, 2, 7, 1000])
def test_a_permutation_holds_every_index_once(length: int) -> None:
    assert sorted(permutation(stream_key(0, length), length)) == list(range(length))


def test_permutations_differ_by_key_and_repeat_with_it() -> None:
    orders = {tuple(permutation(stream_key(0, "order", epoch), 50)) for epoch in range(20)}
    assert len(orders) == 20
    assert permutation(stream_key(0, "order", 3), 50) == permutation(stream_key(0, "order", 3), 50)


def test_all_orders_of_a_permutation_are_equally_likely() -> None:
    orders = [tuple(permutation(stream_key("orders", k), 3)) for k in range(1200)]
    counts = torch.tensor([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    assert p_value(counts, torch.full((6,), 200.0)) > 1e-3


# --- draws ---------------------------------------------------------------------------------------------------------


def draws(logits: Tensor, rows: int, *, key: int = 0) -> tuple[Tensor, Tensor]:
    items = torch.arange(rows)
    return sample_tokens(logits.expand(rows, -1), token_uniforms(stream_key(key, "draws"), items // 16, items % 16))


@pytest.mark.parametrize("vocabulary", [5, 64, 65, 1000])
def test_tokens_are_drawn_in_proportion_to_their_probability(vocabulary: int) -> None:
    rows = 20_000
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary), dtype=torch.float64)
    tokens, logprobs = draws(logits.float(), rows)
    assert logprobs.dtype == torch.float32
    counts, expected = tokens.bincount(minlength=vocabulary), rows * logits.softmax(0)
    assert p_value(counts, expected) > 1e-3
    torch.testing.assert_close(logprobs.double(), logits.log_softmax(0)[tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_log_probabilities_have_the_wider_type(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens, logprobs = sample_tokens(logits, token_uniforms(1, torch.arange(3), torch.arange(3)))
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = logits.double().log_softmax(1)[torch.arange(3), tokens]
    torch.testing.assert_close(logprobs.double(), wanted, rtol=0, atol=1e-6)


def test_a_row_draws_the_same_token_whatever_rows_stand_beside_it() -> None:
    rows, vocabulary = 40, 1000
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(5))
    items, steps = torch.arange(rows) * 7, torch.arange(rows) % 3
    together, logprobs = sample_tokens(logits, token_uniforms(9, items, steps))
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(6))[: rows // 2]
    part, part_logprobs = sample_tokens(logits[shuffled], token_uniforms(9, items[shuffled], steps[shuffled]))
    assert torch.equal(part, together[shuffled])
    torch.testing.assert_close(part_logprobs, logprobs[shuffled], rtol=0, atol=1e-6)
    for row in range(rows):
        one = slice(row, row + 1)
        alone, _ = sample_tokens(logits[one], token_uniforms(9, items[one], steps[one]))
        assert alone.item() == together[row].item()


def test_item_and_token_each_change_the_draw() -> None:
    logits, same, index = torch.zeros(50, 1000), torch.zeros(50, dtype=torch.long), torch.arange(50)
    assert sample_tokens(logits, token_uniforms(0, same, same))[0].unique().numel() == 1
    assert sample_tokens(logits, token_uniforms(0, index, same))[0].unique().numel() > 40
    assert sample_tokens(logits, token_uniforms(0, same, index))[0].unique().numel() > 40


def test_a_logit_of_minus_infinity_is_never_drawn() -> None:
    """First and last token, single ones, a whole block, all but one of a block; 130 is no multiple of the block."""
    allowed = [1, 3, 60, 63, 128]
    logits = torch.full((130,), -math.inf)
    logits[allowed] = torch.tensor([0.0, -3.0, 1.0, -8.0, -2.0])
    tokens, logprobs = draws(logits, 20_000)
    assert set(tokens.tolist()) <= set(allowed)
    weights = torch.tensor([0.0, -3.0, 1.0, -8.0, -2.0]).double().softmax(0)
    counts = tokens.bincount(minlength=130)[allowed]
    assert p_value(counts, 20_000 * weights) > 1e-3
    assert logprobs.isfinite().all()


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (1 - 2.0**-53, 131)])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(uniform: float, token: int) -> None:
    for scale in (1.0, 1 / 3, 1e-3):
        logits = torch.full((1, 200), -math.inf)
        logits[0, [2, 70, 131]] = torch.tensor([0.0, scale, -scale])
        assert sample_tokens(logits, torch.full((2, 1), uniform).double())[0].item() == token


# --- truncation ----------------------------------------------------------------------------------------------------


def kept(probabilities: list[float], *, top_k: int = 0, top_p: float = 1.0) -> list[int]:
    logits = torch.tensor([probabilities]).log()
    result = keep_top(logits, top_k=top_k, top_p=top_p)
    survivors = result[0].isfinite().nonzero()[:, 0].tolist()
    assert result[0, survivors].tolist() == logits[0, survivors].tolist()
    return survivors


SKEWED = [0.125, 0.5, 0.0625, 0.25, 0.0625]


@pytest.mark.parametrize(
    ("top_k", "top_p", "wanted"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [0, 1, 3]),
        (5, 1.0, [0, 1, 2, 3, 4]),
        (9, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.01, [1]),  # the likeliest always stays
        (0, 0.49, [1]),
        (0, 0.51, [1, 3]),
        (0, 0.76, [0, 1, 3]),
        (0, 0.9, [0, 1, 2, 3]),  # of equal ones the first
        (2, 0.6, [1]),  # of the two kept ones 2/3 and 1/3
        (2, 0.7, [1, 3]),
    ],
)
def test_the_kept_sets_by_hand(top_k: int, top_p: float, wanted: list[int]) -> None:
    assert kept(SKEWED, top_k=top_k, top_p=top_p) == wanted


@pytest.mark.parametrize("top_p", [0.3004, 0.9003, 0.9987])
@pytest.mark.parametrize("top_k", [0, 400])
def test_the_kept_set_is_that_of_a_stable_sort_of_the_whole_vocabulary(top_k: int, top_p: float) -> None:
    """Rows that need few tokens and rows that need most, beside one another, with many equal logits."""
    scales = torch.tensor([0.1, 1.0, 3.0, 9.0, 0.0])[:, None]
    logits = (torch.randn(5, 1000, generator=torch.Generator().manual_seed(3)) * scales * 4).round().double() / 4
    result = keep_top(logits, top_k=top_k, top_p=top_p)
    sizes: list[int] = []
    for row, found in zip(logits, result, strict=True):
        order = sorted(range(1000), key=lambda i: (-float(row[i]), i))
        if top_k:
            floor = row[order[top_k - 1]]
            order = [i for i in order if row[i] >= floor]
        probs = row[order].softmax(0)
        wanted = {i for i, before in zip(order, (probs.cumsum(0) - probs).tolist(), strict=True) if before < top_p}
        assert set(found.isfinite().nonzero()[:, 0].tolist()) == wanted
        sizes.append(len(wanted))
    assert min(sizes) < 30 and max(sizes) > 250


def test_each_row_is_truncated_by_itself() -> None:
    logits = torch.tensor([SKEWED, SKEWED[::-1]]).log()
    assert keep_top(logits, top_k=2, top_p=1.0).isfinite().tolist() == [
        [False, True, False, True, False],
        [False, True, False, True, False],
    ]
    assert keep_top(logits, top_k=0, top_p=0.4).isfinite().tolist() == [
        [False, True, False, False, False],
        [False, False, False, True, False],
    ]


def test_the_log_probabilities_of_truncated_draws_are_those_of_the_kept_set() -> None:
    logits = keep_top(torch.tensor([SKEWED]).log(), top_k=2, top_p=1.0)
    tokens, logprobs = draws(logits[0], 100)
    assert set(tokens.tolist()) == {1, 3}
    wanted = torch.where(tokens == 1, 2 / 3, 1 / 3)
    torch.testing.assert_close(logprobs.exp(), wanted)


def test_the_kept_tokens_are_listed_row_after_row() -> None:
    logits = keep_top(torch.tensor([SKEWED, SKEWED[::-1]]).log(), top_k=3, top_p=0.8)
    ids, counts = kept_tokens(logits)
    assert (ids.tolist(), counts.tolist()) == ([1, 3, 1, 3], [2, 2])
