"""Sampling: the right distribution, the trainer's log-probabilities, texts that do not depend on their neighbours."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import models, scatter, tokenizer

from fairlead.data.pack import by_response, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.rollout.native import NativeSampler
from fairlead.types import Prompt, Sampling

PROMPTS = [Prompt(text) for text in ("why?", "the lamp", "Question: why does the lamp flicker?", "a", "loose fuse is")]


def _sampler(dtype: torch.dtype = torch.float32, rows: int = 64, architecture: str = "llama", spread: float = 0.2):
    made = models(("policy",), dtype=dtype, architecture=architecture)
    scatter(made, spread)
    renderer = Renderer(tokenizer(), template="question-answer", max_length=200)
    return made, NativeSampler(made, renderer, rows=rows)


def _trainer_logprobs(made, rollouts, temperature: float) -> list[torch.Tensor]:
    batch = token_batch([Tree(r.prompt_ids, (r.response_ids,)) for r in rollouts], packed=True, pad_id=0)
    with torch.no_grad(), made.use("policy"):
        return by_response(made(batch, frozenset({"logprobs"}), temperature).logprobs, batch)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox", "mistral", "gemma3_text"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_the_trainers(architecture: str, temperature: float) -> None:
    made, sampler = _sampler(architecture=architecture)
    rollouts = sampler.generate(PROMPTS, sampling=Sampling(24, temperature=temperature), key=(0, "t"))
    for rollout, wanted in zip(rollouts, _trainer_logprobs(made, rollouts, temperature), strict=True):
        torch.testing.assert_close(torch.tensor(rollout.behaviour_logprobs), wanted, atol=1e-4, rtol=0)


def test_sampled_first_tokens_follow_the_models_probabilities() -> None:
    made, sampler = _sampler(spread=0.5)
    draws = 4000
    rollouts = sampler.generate([PROMPTS[1]] * draws, sampling=Sampling(1), key=(3,))
    ids = rollouts[0].prompt_ids
    with torch.no_grad():
        made.causal.set_attn_implementation("sdpa")
        probs = made.causal(torch.tensor([ids])).logits[0, -1].softmax(-1).double()
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=len(probs)).double()
    order = probs.argsort(descending=True)
    likely, rest = order[:40], order[40:]  # expected counts below five are pooled
    expected = torch.cat([probs[likely], probs[rest].sum()[None]]) * draws
    observed = torch.cat([counts[likely], counts[rest].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < 73.4  # chi-square, 40 degrees of freedom, p = 0.001


def test_in_fp64_a_text_is_the_same_whatever_is_sampled_beside_it() -> None:
    _, sampler = _sampler(torch.float64)
    together = sampler.generate(PROMPTS, sampling=Sampling(24), key=(1,))
    for index, prompt in enumerate(PROMPTS):
        alone = sampler.generate([prompt], sampling=Sampling(24), key=(1,), first_item=index)[0]
        assert alone.response_ids == together[index].response_ids


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


def test_a_response_ends_at_its_first_end_of_sequence() -> None:
    made, sampler = _sampler()
    eos = tokenizer().eos_token_id
    with torch.no_grad():
        made.causal.get_output_embeddings().weight[eos] *= 8
    rollouts = sampler.generate(PROMPTS * 8, sampling=Sampling(24), key=(0,))
    assert any(r.finished for r in rollouts) and any(not r.finished for r in rollouts)
    for rollout in rollouts:
        assert rollout.finished == (rollout.response_ids[-1] == eos)
        assert eos not in rollout.response_ids[:-1]
        assert rollout.finished or len(rollout.response_ids) == 24
        assert len(rollout.response_ids) == len(rollout.behaviour_logprobs)
        assert "<eos>" not in rollout.text


def test_top_k_of_one_is_greedy_decoding() -> None:
    made, sampler = _sampler()
    rollout = sampler.generate(PROMPTS[:1], sampling=Sampling(6, top_k=1), key=(0,))[0]
    ids = list(rollout.prompt_ids)
    made.causal.set_attn_implementation("sdpa")
    for token in rollout.response_ids:
        with torch.no_grad():
            assert int(made.causal(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_sampling_leaves_training_mode_and_gradients_as_they_were() -> None:
    made, sampler = _sampler()
    sampler.generate(PROMPTS[:1], sampling=Sampling(3), key=(0,))
    assert made.network.training
    assert all(p.requires_grad and p.grad is None for p in made.trainable.values())
