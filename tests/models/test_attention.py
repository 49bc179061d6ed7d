"""Every way to compute attention over a forest against the definition: a token sees itself and its ancestors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fairlead.config import ModelSection
from fairlead.data.pack import by_response, token_batch
from fairlead.errors import ConfigError, ModelError
from fairlead.models import attention, gpu_attention
from fairlead.models.attention import Forest, forest_attention
from fairlead.models.gpu_attention import BLOCK, block_mask
from fairlead.models.load import load_base
from fairlead.models.roles import Models
from fairlead.types import TokenBatch
from tests.families import plain, prepared
from tests.tiny import CPU, TREES, separate, tokenizer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FORMS = [(None, None, 2), (4, None, 1), (None, 0.5, 2), (4, 0.5, 2)]
"""Sliding window, soft cap, heads that share a key."""


def _visible(batch: TokenBatch, window: int | None) -> Tensor:
    """[B, T, T] bool, by following each token's chain of predecessors."""
    seen: list[list[list[bool]]] = []
    for previous, positions in zip(batch.previous.tolist(), batch.position_ids.tolist(), strict=True):
        seen.append([[i == j for j in range(len(previous))] for i in range(len(previous))])
        for token, ancestor in enumerate(previous):
            while ancestor >= 0:
                seen[-1][token][ancestor] = window is None or positions[token] - positions[ancestor] < window
                ancestor = previous[ancestor]
    return torch.tensor(seen)


def _definition(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ v).transpose(1, 2)


def _states(
    width: int,
    groups: int,
    rows: int = 1,
    size: int = 8,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        drawn = torch.randn(rows, heads, width, size, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype)

    return normal(2 * groups), normal(2), normal(2)


def _batches() -> list[TokenBatch]:
    return [token_batch(TREES, packed=True, pad_id=0), token_batch(TREES[1:], packed=False, pad_id=0)]


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize(("window", "softcap", "groups"), FORMS)
def test_attention_over_a_forest_is_that_of_the_definition(
    way: str, window: int | None, softcap: float | None, groups: int
) -> None:
    for batch in _batches():
        rows, width = batch.input_ids.shape
        q, k, v = _states(width, groups, rows)
        wanted = _definition(q, k, v, _visible(batch, window), softcap)
        forest = Forest.of(batch, way)
        got, _ = forest_attention(
            torch.nn.Module(), q, k, v, None, sliding_window=window, softcap=softcap, forest=forest
        )
        real = batch.subtree_end > 0
        torch.testing.assert_close(got[real], wanted[real])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap", "groups"), FORMS)
def test_flex_attention_with_our_block_mask_is_the_definition(
    window: int | None, softcap: float | None, groups: int
) -> None:
    """Forward alone: torch has no backward of it on CPUs."""
    from fairlead.models.gpu_attention import flex

    batch = token_batch(TREES * 4, packed=True, pad_id=0)
    q, k, v = _states(batch.input_ids.shape[1], groups, size=16)
    with torch.no_grad():
        blocks = block_mask(batch.subtree_end, batch.position_ids, window)
        got = flex(q, k, v, blocks, scaling=None, softcap=softcap).transpose(1, 2)
    torch.testing.assert_close(got, _definition(q, k, v, _visible(batch, window), softcap))


def test_rows_of_many_shapes_and_windows_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten graphs, where torch's own limit is 8: above it flex attention would hold every score."""
    from torch._dynamo import config

    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(config, "cache_size_limit", 8)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    gpu_attention._compiled.cache_clear()
    compiled = gpu_attention._compiled()
    monkeypatch.setattr(gpu_attention, "_plain", lambda: compiled)
    packed = [token_batch(TREES * number, packed=True, pad_id=0) for number in (9, 8, 1, 12, 11, 2)]
    padded = [token_batch(TREES * number, packed=False, pad_id=0) for number in (1, 2, 3)]
    with torch.no_grad():
        for batch in (*packed, *padded):
            rows, width = batch.input_ids.shape
            for window in (None, 5):
                q, k, v = _states(width, 2, rows, size=16)
                gpu_attention.flex(q, k, v, Forest.of(batch).blocks(window), scaling=None, softcap=None)
    gpu_attention._compiled.cache_clear()
    assert 8 < len(graphs) <= 12


@pytest.mark.parametrize("window", [None, 20, 280])
def test_blocks_hold_every_visible_pair_and_full_ones_no_other(window: int | None) -> None:
    """What a fused kernel reads, and the plain one does not: which blocks are listed."""
    from fairlead.data.render import Tree

    long = [Tree(tuple(range(3, 303)), (tuple(range(3, 203)), tuple(range(3, 153)))), TREES[1]]
    batch = token_batch([*long, *long], packed=True, pad_id=0)
    visible = _visible(batch, window)[0]
    width = visible.shape[0]
    blocks = -(-width // BLOCK)
    made = block_mask(batch.subtree_end, batch.position_ids, window)
    listed = {}
    for kind, counts, indices in (
        ("some", made.kv_num_blocks, made.kv_indices),
        ("full", made.full_kv_num_blocks, made.full_kv_indices),
    ):
        found = torch.zeros(blocks, blocks, dtype=torch.bool)
        for q in range(blocks):
            found[q, indices[0, 0, q, : counts[0, 0, q]].long()] = True
        listed[kind] = found.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:width, :width]
    assert not (visible & ~(listed["some"] | listed["full"])).any()
    assert not (listed["full"] & ~visible).any()
    assert not (listed["full"] & listed["some"]).any()
    assert listed["full"].any() or window == 20
    assert (listed["some"] | listed["full"]).float().mean() < 0.55  # causal alone would list more than half


@pytest.mark.parametrize("window", [None, 4])
def test_the_sequences_of_varlen_attention_are_the_definition(window: int | None) -> None:
    """Each with its last query at its last key, as flash-attn aligns them, and its window counted along the keys."""
    for batch in _batches():
        rows, width = batch.input_ids.shape
        states = _states(width, 1, rows)
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in states)
        plan = Forest.of(batch).varlen
        out = torch.zeros_like(q)
        for i in range(len(plan.query_ends) - 1):
            queries = plan.queries[plan.query_ends[i] : plan.query_ends[i + 1]]
            keys = plan.keys[plan.key_ends[i] : plan.key_ends[i + 1]]
            place = torch.arange(len(keys))
            own = place[-len(queries) :]
            seen = own[:, None] >= place
            if window is not None:
                seen &= own[:, None] - place < window
            scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) / q.shape[-1] ** 0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[queries] = torch.einsum("hqk,khd->qhd", weights, v[keys])
        wanted = _definition(*states, visible=_visible(batch, window), softcap=None).flatten(0, 1)
        real = (batch.subtree_end > 0).flatten()
        torch.testing.assert_close(out[real], wanted[real])
        assert plan.longest == (max(plan.query_ends.diff()), max(plan.key_ends.diff()))


def test_a_forest_knows_whether_a_prompt_is_shared() -> None:
    assert Forest.of(token_batch(TREES, packed=True, pad_id=0)).shared
    assert not Forest.of(token_batch(separate(TREES), packed=False, pad_id=0)).shared
    assert not Forest.of(token_batch([TREES[2]] * 3, packed=True, pad_id=0)).shared


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_the_way_asked_for_gives_the_logprobs_of_the_default(way: str) -> None:
    batch = token_batch(TREES, packed=True, pad_id=0)
    rows = []
    for chosen in ("auto", way):
        made = Models(prepared("gemma2", torch.float64, way=chosen), ("policy",))
        with torch.no_grad(), made.use("policy"):
            rows.append(torch.cat(by_response(made(batch, frozenset({"logprobs"})).logprobs, batch)))
    torch.testing.assert_close(*rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("way", "reason"), [("flex", "no backward pass of flex attention"), ("flash", "CUDA devices only")]
)
def test_a_way_the_device_cannot_take_is_refused_with_the_reason(way: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepared("llama", way=way)


def test_flash_without_flash_attn_says_what_to_install() -> None:
    if attention.has_flash():
        pytest.skip("flash-attn is installed")
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        attention.require_device("flash", torch.device("cuda"))


def test_a_family_with_attention_of_its_own_only_refuses_another(tmp_path) -> None:
    plain("gpt_neo").save_pretrained(tmp_path)
    assert not load_base(
        ModelSection(path=str(tmp_path), attention="eager"), tokenizer(), None, seed=0, device=CPU
    ).forest
    with pytest.raises(ConfigError, match="gpt_neo does not have it"):
        load_base(ModelSection(path=str(tmp_path), attention="sdpa"), tokenizer(), None, seed=0, device=CPU)


def test_a_dense_mask_of_a_long_row_is_refused() -> None:
    batch = token_batch([TREES[2]] * 1100, packed=True, pad_id=0)
    with pytest.raises(ModelError, match="4096"):
        Forest.of(batch).dense(None)


@needs_gpu
@pytest.mark.parametrize("way", ["flex", "flash"])
@pytest.mark.parametrize(("window", "softcap", "groups"), FORMS)
def test_on_a_gpu_fused_attention_has_the_values_and_gradients_of_the_definition(
    way: str, window: int | None, softcap: float | None, groups: int
) -> None:
    if way == "flash" and not attention.has_flash():
        pytest.skip("needs flash-attn")
    dtype = torch.float32 if way == "flex" else torch.bfloat16
    batch = token_batch(TREES * 6, packed=True, pad_id=0)
    visible = _visible(batch, window).cuda()
    states = [t.requires_grad_(True) for t in _states(batch.input_ids.shape[1], groups, 1, 32, "cuda", dtype)]
    wide = [t.detach().double().requires_grad_(True) for t in states]
    got, _ = forest_attention(
        torch.nn.Module(), *states, attention_mask=None, sliding_window=window, softcap=softcap,
        forest=Forest.of(batch.to(torch.device("cuda")), way),
    )  # fmt: skip
    wanted = _definition(*wide, visible=visible, softcap=softcap)
    bound = 2e-3 if way == "flex" else 3e-2  # tf32 products; bfloat16
    torch.testing.assert_close(got.double(), wanted, atol=bound, rtol=0)
    pull = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got, states, pull.to(dtype)), torch.autograd.grad(wanted, wide, pull), strict=True
    ):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 5 * bound
