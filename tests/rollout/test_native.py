"""Sampling: the right distribution, the trainer's log-probabilities, texts that do not depend on their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.families import CONFIGS, plain, prepared
from tests.tiny import base, models, scatter, tokenizer
from torch import Tensor

from fairlead.config import AdapterSection
from fairlead.data.pack import by_response, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.models.roles import Models
from fairlead.rollout.experience import drawn_from
from fairlead.rollout.native import NativeSampler
from fairlead.types import Prompt, Rollout, Sampling

PROMPTS = [Prompt(text) for text in ("why?", "the lamp", "Question: why does the lamp flicker?", "a", "loose fuse is")]
CUT = Sampling(24, temperature=0.9, top_k=12, top_p=0.8)


def _renderer() -> Renderer:
    return Renderer(tokenizer(), template="question-answer", max_length=200)


def _sampler(dtype: torch.dtype = torch.float32, rows: int = 64, spread: float = 0.2, **options: Any):
    made = models(("policy",), dtype=dtype, **options)
    scatter(made, spread)
    return made, NativeSampler(made, _renderer(), rows=rows)


def _trainer_logprobs(made: Models, rollouts: Sequence[Rollout], temperature: float, role: str = "policy"):
    trees = [Tree(r.prompt_ids, (r.response_ids,)) for r in rollouts]
    batch = replace(token_batch(trees, packed=made.forest, pad_id=0), support=drawn_from(rollouts))
    with torch.no_grad(), made.use(role):
        return by_response(made(batch, frozenset({"logprobs"}), temperature).logprobs, batch)


def _assert_the_trainers(made: Models, rollouts: Sequence[Rollout], temperature: float, bound: float = 1e-4) -> None:
    for rollout, wanted in zip(rollouts, _trainer_logprobs(made, rollouts, temperature), strict=True):
        got = torch.tensor(rollout.behaviour_logprobs, dtype=wanted.dtype)
        torch.testing.assert_close(got, wanted, atol=bound, rtol=0)


def _likes_to_end(made: Models) -> int:
    """Makes the end of sequence likely; its id."""
    eos = tokenizer().eos_token_id
    with torch.no_grad():
        made.causal.get_output_embeddings().weight[eos] *= 8
    return eos


def _next_logits(made: Models, ids: Sequence[int]) -> Tensor:
    """By transformers' own attention, in fp64."""
    made.causal.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = made.causal(torch.tensor([ids])).logits[0, -1].double()
    made.causal.set_attn_implementation("fairlead")
    return logits


# --- the distribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("sampling", [Sampling(24, temperature=0.7), CUT], ids=["whole", "cut"])
def test_the_samplers_logprobs_are_the_trainers(family: str, sampling: Sampling) -> None:
    made = Models(prepared(family), ("policy",))
    rollouts = NativeSampler(made, _renderer()).generate(PROMPTS, sampling=sampling, key=(0, "t"), num_samples=2)
    assert len(rollouts) == 10
    _assert_the_trainers(made, rollouts, sampling.temperature)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_greedy_decoding_is_that_of_plain_transformers(family: str) -> None:
    made = Models(prepared(family, torch.float64), ("policy",))
    model = plain(family, torch.float64)
    rollouts = NativeSampler(made, _renderer()).generate(PROMPTS, sampling=Sampling(12, top_k=1), key=(0,))
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=1
        )
        assert list(rollout.response_ids) == wanted[0, ids.shape[1] :].tolist()


def _chi_square(drawn: Sequence[int], probs: Tensor) -> float:
    """p-value; cells that expect fewer than five are taken together."""
    counts, expected = torch.bincount(torch.tensor(drawn), minlength=len(probs)).double(), probs * len(drawn)
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(2), None),
        (Sampling(2, temperature=1.5, min_new_tokens=2), None),
        (Sampling(2, top_k=9), 9),
        (Sampling(2, top_p=0.6), 40),
        (Sampling(2, temperature=1.2, top_k=20, top_p=0.9, min_new_tokens=2), 20),
    ],
)
def test_sampled_tokens_follow_the_models_probabilities(sampling: Sampling, kept: int | None) -> None:
    """First tokens, and second ones after the likeliest first, against the definition written out."""
    made, sampler = _sampler(spread=0.5)
    rollouts = sampler.generate([PROMPTS[1]], sampling=sampling, key=(3,), num_samples=6000)
    first = max(set(firsts := [r.response_ids[0] for r in rollouts]), key=firsts.count)
    seconds = [r.response_ids[1] for r in rollouts if r.response_ids[0] == first and len(r.response_ids) > 1]
    assert len(seconds) > 200
    for drawn, before in ((firsts, []), (seconds, [first])):
        logits = _next_logits(made, [*rollouts[0].prompt_ids, *before]) / sampling.temperature
        if sampling.min_new_tokens:
            logits[tokenizer().eos_token_id] = -torch.inf
        order = logits.argsort(descending=True)[: sampling.top_k or len(logits)]
        probs = logits[order].softmax(0)
        order = order[probs.cumsum(0) - probs < sampling.top_p]
        assert kept is None or 1 < len(order) <= kept
        wanted = torch.zeros_like(logits)
        wanted[order] = logits[order].softmax(0)
        assert _chi_square(drawn, wanted) > 1e-3
        assert set(drawn) <= set(order.tolist())


def test_kept_tokens_are_those_that_the_definition_keeps() -> None:
    made, sampler = _sampler(spread=0.5)
    rollouts = sampler.generate(PROMPTS, sampling=CUT, key=(0,))
    sizes = set[int]()
    for rollout in rollouts:
        assert rollout.kept is not None and len(rollout.kept) == len(rollout.response_ids)
        for at, kept in enumerate(rollout.kept):
            logits = _next_logits(made, [*rollout.prompt_ids, *rollout.response_ids[:at]]) / CUT.temperature
            order = logits.argsort(descending=True)[: CUT.top_k]
            probs = logits[order].softmax(0)
            wanted = order[probs.cumsum(0) - probs < CUT.top_p].tolist()
            assert sorted(kept) == sorted(wanted) and rollout.response_ids[at] in kept
            share = torch.log(probs[wanted.index(rollout.response_ids[at])] / probs[: len(wanted)].sum())
            assert rollout.behaviour_logprobs[at] == pytest.approx(float(share), abs=5e-5)
            sizes.add(len(kept))
    assert len(sizes) > 3


# --- draws ---------------------------------------------------------------------------------------------------------


def test_in_fp64_a_text_is_the_same_whatever_is_sampled_beside_it() -> None:
    _, sampler = _sampler(torch.float64)
    together = sampler.generate(PROMPTS, sampling=Sampling(24), key=(1,))
    for index, prompt in enumerate(PROMPTS):
        alone = sampler.generate([prompt], sampling=Sampling(24), key=(1,), first_item=index)[0]
        assert alone.response_ids == together[index].response_ids


@pytest.mark.parametrize("rows", [2, 3, 64])
def test_in_fp64_samples_of_a_prompt_are_those_of_as_many_equal_prompts(rows: int) -> None:
    """However prompts and samples fall into chunks, and in prompt order."""
    _, sampler = _sampler(torch.float64, rows=rows)
    made = sampler.generate(PROMPTS[:3], sampling=Sampling(12), key=(1,), first_item=2, num_samples=5)
    repeated = [prompt for prompt in PROMPTS[:3] for _ in range(5)]
    wanted = sampler.generate(repeated, sampling=Sampling(12), key=(1,), first_item=10)
    assert [r.response_ids for r in made] == [r.response_ids for r in wanted]
    assert [r.prompt for r in made] == repeated
    assert len({r.response_ids for r in made}) == 15


def test_in_fp32_chunks_change_at_most_one_token_in_ten_thousand() -> None:
    _, whole = _sampler(rows=128)
    _, parts = _sampler(rows=7)
    prompts = PROMPTS * 20
    first = whole.generate(prompts, sampling=Sampling(32), key=(2,))
    second = parts.generate(prompts, sampling=Sampling(32), key=(2,))
    tokens = sum(len(rollout.response_ids) for rollout in first)
    differing = sum(a.response_ids != b.response_ids for a, b in zip(first, second, strict=True))
    assert tokens > 2000
    assert differing <= tokens * 1e-4


def test_equal_prompts_get_different_draws_and_equal_keys_the_same() -> None:
    _, sampler = _sampler()
    one = sampler.generate([PROMPTS[0]] * 3, sampling=Sampling(12), key=(0,))
    again = sampler.generate([PROMPTS[0]] * 3, sampling=Sampling(12), key=(0,))
    other = sampler.generate([PROMPTS[0]] * 3, sampling=Sampling(12), key=(1,))
    assert [r.response_ids for r in one] == [r.response_ids for r in again]
    assert len({r.response_ids for r in one + other}) == 6


# --- ends ----------------------------------------------------------------------------------------------------------


def test_a_response_ends_at_its_first_end_of_sequence() -> None:
    made, sampler = _sampler()
    eos = _likes_to_end(made)
    rollouts = sampler.generate(PROMPTS * 8, sampling=Sampling(24), key=(0,))
    assert any(r.finished for r in rollouts) and any(not r.finished for r in rollouts)
    for rollout in rollouts:
        assert rollout.finished == (rollout.response_ids[-1] == eos)
        assert eos not in rollout.response_ids[:-1]
        assert rollout.finished or len(rollout.response_ids) == 24
        assert len(rollout.response_ids) == len(rollout.behaviour_logprobs)
        assert "<eos>" not in rollout.text


def test_no_response_ends_before_the_least_length_and_its_tokens_say_so() -> None:
    made, sampler = _sampler()
    eos = _likes_to_end(made)
    free = sampler.generate(PROMPTS * 8, sampling=Sampling(24), key=(0,))
    rollouts = sampler.generate(PROMPTS * 8, sampling=Sampling(24, min_new_tokens=5), key=(0,))
    assert min(len(r.response_ids) for r in free) < 5 and all(r.banned is None and r.kept is None for r in free)
    assert any(5 < len(r.response_ids) < 24 for r in rollouts)
    for rollout in rollouts:
        assert eos not in rollout.response_ids[:5] and rollout.kept is None
        assert rollout.banned == (*[eos] * 5, *[-1] * (len(rollout.response_ids) - 5))
    _assert_the_trainers(made, rollouts, 1.0)


def test_limits_of_their_own_are_drawn_evenly_and_by_key() -> None:
    _, sampler = _sampler()
    sampling = Sampling(9, shortest_limit=4, min_new_tokens=9)
    rollouts = sampler.generate(PROMPTS, sampling=sampling, key=(0,), num_samples=120)
    lengths = [len(r.response_ids) for r in rollouts]
    assert _chi_square([length - 4 for length in lengths], torch.full((6,), 1 / 6).double()) > 1e-3
    assert set(lengths) == {4, 5, 6, 7, 8, 9} and not any(r.finished for r in rollouts)
    part = sampler.generate(PROMPTS[1:2], sampling=sampling, key=(0,), first_item=1, num_samples=120)
    assert [len(r.response_ids) for r in part] == lengths[120:240]


def test_finished_rows_leave_the_batch_at_once_and_a_prompt_is_read_once() -> None:
    made, sampler = _sampler()
    _likes_to_end(made)
    read: list[int] = []
    made.causal.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    rollouts = sampler.generate(PROMPTS, sampling=Sampling(24), key=(0,), num_samples=6)
    prompts = sum(len(r.prompt_ids) for r in rollouts[::6])
    going = [sum(len(r.response_ids) > t for r in rollouts) for t in range(1, 24)]
    assert read == [prompts, *[number for number in going if number]]
    assert len(set(going)) > 5


# --- the models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"train_also": ("lm_head",)}, {"targets": ("q_proj", "lm_head")}, {"method": "dora"}],
    ids=["lora", "head in full", "lora on the head", "dora"],
)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_under_an_adapter_each_role_samples_from_itself(role: str, settings: dict[str, Any]) -> None:
    made = Models(base(), ("policy", "reference"), adapter=AdapterSection(rank=4, **settings))
    scatter(made, 0.3)
    rollouts = NativeSampler(made, _renderer(), role=role).generate(PROMPTS, sampling=Sampling(16), key=(0,))
    found = {each: _trainer_logprobs(made, rollouts, 1.0, each) for each in ("policy", "reference")}
    for rollout, wanted in zip(rollouts, found[role], strict=True):
        # Logits are large here: the rounding of fp32 is up to 1.4e-4, by CPU.
        torch.testing.assert_close(torch.tensor(rollout.behaviour_logprobs), wanted, atol=5e-4, rtol=0)
    assert max(float((a - b).abs().max()) for a, b in zip(*found.values(), strict=True)) > 0.1


def test_weights_trained_between_two_calls_are_sampled_from() -> None:
    made, sampler = _sampler()
    sampler.generate(PROMPTS, sampling=Sampling(8), key=(0,))
    scatter(made, 0.2, seed=5)
    _assert_the_trainers(made, sampler.generate(PROMPTS, sampling=Sampling(8), key=(0,)), 1.0)


def test_sampling_leaves_modules_training_mode_and_gradients_as_they_were() -> None:
    made, sampler = _sampler()
    before = {name: set(vars(module)) for name, module in made.named_modules()}
    sampler.generate(PROMPTS[:1], sampling=Sampling(3), key=(0,))
    handle = made.causal.get_input_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.generate(PROMPTS[:1], sampling=Sampling(3), key=(0,))
    handle.remove()
    assert {name: set(vars(module)) for name, module in made.named_modules()} == before
    assert made.network.training
    assert all(p.requires_grad and p.grad is None for p in made.trainable.values())


def test_decoding_multiplies_in_the_type_that_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairlead.rollout.packed.LARGE_FOR_FEW", 1)  # a packed layer would know fp32 alone
    made, sampler = _sampler(autocast=torch.bfloat16)
    seen: list[torch.dtype] = []
    made.causal.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    rollouts = sampler.generate(PROMPTS, sampling=Sampling(8), key=(0,))
    assert set(seen) == {torch.bfloat16} and len(seen) == 8
    _assert_the_trainers(made, rollouts, 1.0, bound=5e-3)
