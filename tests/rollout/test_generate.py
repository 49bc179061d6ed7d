"""The reference engine keeps to the same protocol, and draws from the same distribution as the native one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.families import prepared
from tests.tiny import models, scatter, tokenizer

from fairlead.data.pack import by_response, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.models.roles import Models
from fairlead.rollout.engines import open_sampler
from fairlead.rollout.experience import drawn_from
from fairlead.rollout.generate import GenerateSampler
from fairlead.rollout.native import NativeSampler
from fairlead.types import Prompt, Sampling

PROMPTS = [Prompt(text) for text in ("why?", "the lamp", "Question: why does the lamp flicker?")]
CUT = Sampling(10, temperature=0.9, top_k=12, top_p=0.8, min_new_tokens=4)


def _sampler(rows: int = 64, spread: float = 0.2, **options: Any) -> tuple[Models, GenerateSampler]:
    made = models(("policy",), **options)
    scatter(made, spread)
    return made, GenerateSampler(made, Renderer(tokenizer(), template="question-answer", max_length=200), rows=rows)


@pytest.mark.parametrize("sampling", [Sampling(10, temperature=0.7), CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neo", "opt"])
def test_its_logprobs_are_the_trainers(family: str, sampling: Sampling) -> None:
    made = Models(prepared(family), ("policy",))
    renderer = Renderer(tokenizer(), template="question-answer", max_length=200)
    rollouts = open_sampler("generate", made, renderer).generate(PROMPTS, sampling=sampling, key=(0,), num_samples=2)
    assert [r.prompt for r in rollouts] == [prompt for prompt in PROMPTS for _ in range(2)]
    trees = [Tree(r.prompt_ids, (r.response_ids,)) for r in rollouts]
    batch = replace(token_batch(trees, packed=made.forest, pad_id=0), support=drawn_from(rollouts))
    with torch.no_grad(), made.use("policy"):
        found = by_response(made(batch, frozenset({"logprobs"}), sampling.temperature).logprobs, batch)
    for rollout, wanted in zip(rollouts, found, strict=True):
        torch.testing.assert_close(torch.tensor(rollout.behaviour_logprobs), wanted, atol=1e-4, rtol=0)
        assert rollout.banned == ((1, 1, 1, 1, *[-1] * (len(rollout.response_ids) - 4)) if sampling is CUT else None)


def test_both_engines_draw_first_tokens_equally_often() -> None:
    made, reference = _sampler(rows=4000, spread=0.8)
    renderer = Renderer(tokenizer(), template="question-answer", max_length=200)
    native = NativeSampler(made, renderer, rows=4000)
    sampling = Sampling(1, temperature=0.8, top_k=30, top_p=0.9)
    ours, theirs = (
        Counter(r.response_ids[0] for r in each.generate(PROMPTS[:1], sampling=sampling, key=(0,), num_samples=4000))
        for each in (native, reference)
    )
    assert set(ours) == set(theirs) and len(ours) > 5
    counts = torch.tensor([[ours[token], theirs[token]] for token in ours], dtype=torch.float64)
    expected = counts.sum(1, keepdim=True) / 2
    statistic = ((counts - expected) ** 2 / expected).sum()
    p = torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2)
    assert float(p) > 1e-3


def test_equal_keys_give_equal_draws_whatever_was_drawn_before() -> None:
    _, sampler = _sampler()
    texts: list[list[tuple[int, ...]]] = []
    for key, seed in (((0,), 1), ((0,), 2), ((1,), 1)):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        texts.append([r.response_ids for r in sampler.generate(PROMPTS, sampling=Sampling(8), key=key)])
        assert torch.equal(torch.random.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]


def test_responses_end_by_end_limit_and_stop_string() -> None:
    made, sampler = _sampler(rows=4)
    eos = tokenizer().eos_token_id
    with torch.no_grad():
        made.causal.get_output_embeddings().weight[eos] *= 8
    sampling = Sampling(24, shortest_limit=3, stop=("e", "a"))
    rollouts = sampler.generate(PROMPTS, sampling=sampling, key=(0,), num_samples=12)
    ends = Counter[str]()
    for rollout in rollouts:
        text = tokenizer().decode(rollout.response_ids, skip_special_tokens=True)
        before = tokenizer().decode(rollout.response_ids[:-1], skip_special_tokens=True)
        assert eos not in rollout.response_ids[:-1] and not {"e", "a"} & set(before)
        kind = "stop" if {"e", "a"} & set(text) else "end" if rollout.response_ids[-1] == eos else "limit"
        assert rollout.finished == (kind != "limit")
        assert kind != "limit" or 3 <= len(rollout.response_ids) <= 24
        assert not {"e", "a"} & set(rollout.text)
        ends[kind] += 1
    assert min(ends[kind] for kind in ("stop", "end", "limit")) > 0


def test_the_model_is_left_with_its_own_attention_and_settings() -> None:
    made, sampler = _sampler()
    made.causal.generation_config.repetition_penalty = 3.0
    kept = made.causal.generation_config
    sampler.generate(PROMPTS, sampling=Sampling(2), key=(0,))
    assert made.causal.config._attn_implementation == "fairlead"
    assert made.causal.generation_config is kept and kept.repetition_penalty == 3.0
    assert made.network.training
