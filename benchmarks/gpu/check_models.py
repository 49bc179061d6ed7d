"""Roles on one base, and the sampler beside the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import little, rollouts
from benchmarks.gpu.checks import Found, Place, Skipped
from benchmarks.gpu.formulas import LORA
from benchmarks.gpu.little import largest
from benchmarks.gpu.sizes import SIZES, Rows, words

from fairlead.config import AdapterSection, ModelSection
from fairlead.data.pack import by_response, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.models.adapters import StartAdapter
from fairlead.models.load import load_base
from fairlead.models.roles import Models
from fairlead.rollout.experience import measure_tokens
from fairlead.rollout.native import NativeSampler
from fairlead.rollout.rewards import RoleReward, open_model
from fairlead.types import Prompt, Rollout, Sampling

SAME = 1e-5
NEW_TOKENS = {True: 96, False: 24}
PROMPTS = {True: 256, False: 64}
"""On a GPU and elsewhere."""


def roles(place: Place) -> Iterator[Found | Skipped]:
    """Policy, reference, value and reward on one base in fp32: what each gives, and what switching does to others."""
    job = little.job(place.work, place.device, LORA)
    judge = rollouts.trained_reward(job)
    adapter = AdapterSection(rank=8)
    shared = _models(place, ("policy", "reference", "value"), adapter, StartAdapter.read(judge / "model"))
    batch = token_batch(little.trees(), packed=True, pad_id=0).to(shared.device)
    alone = _models(place, ("policy",), None, None)
    with torch.no_grad(), alone.use("policy"):
        wanted = torch.cat(by_response(alone(batch, frozenset({"logprobs"})).logprobs, batch))
    with torch.no_grad(), shared.use("reference"):
        got = torch.cat(by_response(shared(batch, frozenset({"logprobs"})).logprobs, batch))
    yield Found("reference: log-probabilities of the base", float((got - wanted).abs().max()), SAME)
    with torch.no_grad(), shared.use("policy"):
        moved = torch.cat(by_response(shared(batch, frozenset({"logprobs"})).logprobs, batch))
    yield Found("policy: 0.01 over the largest change by its adapter", 0.01 / float((moved - got).abs().max()), 1.0)
    rows = [(*tree.prompt, *tree.responses[0]) for tree in little.trees(shared=False)]
    scores = [torch.tensor(each.score_ids(rows)) for each in (RoleReward(shared), _own(judge, shared.device))]
    yield Found("reward: scores of a base of its own", float((scores[0] - scores[1]).abs().max()), SAME)

    plain = little.gradients_of(shared, batch)[1]
    with torch.no_grad():
        for role in ("reference", "reward", "policy", "reward"):
            with shared.use(role):
                shared(batch, frozenset({"scores"} if role == "reward" else {"logprobs"}))
    with shared.use("reward"):
        switched = little.gradients_of(shared, batch)[1]
    yield Found("policy: gradients after the others were asked", largest(switched, plain), 1e-6)
    foreign = [n for n, p in shared.named_parameters() if p.grad is not None and n not in shared.trainable]
    yield Found("weights that are not trained and have a gradient", float(len(foreign)), 0.0)


def _own(judge: Path, device: torch.device) -> Any:
    return open_model(str(judge), device=device)


def _models(
    place: Place, wanted: tuple[str, ...], adapter: AdapterSection | None, reward: StartAdapter | None
) -> Models:
    """Adapters far from zero."""
    section = ModelSection(path=str(place.work / "base"), adapter=adapter, dtype="float32", device=place.device)
    base = load_base(section, little.words(), None, seed=0, device=torch.device(place.device))
    made = Models(base, wanted, adapter=adapter, reward=reward)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.trainable.items():
        if ".lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


# --- the sampler ---------------------------------------------------------------------------------------------------


def sampler(place: Place) -> Iterator[Found | Skipped]:
    """Log-probabilities of what was drawn, by the sampler and by the trainer: the largest difference of a token in
    fp32; in bf16, which promises none, the mean."""
    kinds = [
        ("float32", torch.float32, None, 1e-4),
        ("bfloat16", torch.bfloat16, None, 0.05),
        ("float32, the trainer under bf16 autocast", torch.float32, torch.bfloat16, 0.05),
    ]
    for name, dtype, autocast, bound in kinds:
        if name != "float32" and not place.on_gpu:
            yield Skipped(name, "needs CUDA")
            continue
        models = little.policy("llama", place.device, dtype=dtype, autocast=autocast)
        drawn = _sampled(models, _prompts(PROMPTS[place.on_gpu]), rows=64, new_tokens=NEW_TOKENS[place.on_gpu])
        trees = [Tree(rollout.prompt_ids, (rollout.response_ids,)) for rollout in drawn]
        known = measure_tokens(models, trees, temperature=1.0, budget=4096)["behaviour_logprobs"]
        gaps = torch.cat(known) - torch.tensor([p for rollout in drawn for p in rollout.behaviour_logprobs])
        mean, most = float(gaps.abs().mean()), float(gaps.abs().max())
        note = f"{len(gaps)} tokens, mean {mean:.1e}, largest {most:.1e}"
        is_exact = name == "float32"
        yield Found(f"{name}, {'largest' if is_exact else 'mean'}", most if is_exact else mean, bound, note)


def keyed_sampling(place: Place) -> Iterator[Found | Skipped]:
    """Tokens that differ, a token, when the same prompts are sampled in other company. A text counts up to its first
    difference, since what follows has another past."""
    models, prompts = little.policy("llama", place.device), _prompts(PROMPTS[place.on_gpu])
    new_tokens, number = NEW_TOKENS[place.on_gpu], len(prompts)
    wanted = _sampled(models, prompts, rows=number, new_tokens=new_tokens)
    third = number // 3
    apart = [
        *_sampled(models, prompts[:third], rows=number, new_tokens=new_tokens),
        *_sampled(models, prompts[third:], rows=number, new_tokens=new_tokens, first_item=third),
    ]
    for name, got in (
        ("7 rows at once", _sampled(models, prompts, rows=7, new_tokens=new_tokens)),
        ("in two parts", apart),
    ):
        tokens, flips = _first_differences(got, wanted)
        yield Found(f"float32, {name}", flips / tokens, 1e-4, f"{flips} of {tokens} tokens")


def _first_differences(got: Sequence[Rollout], wanted: Sequence[Rollout]) -> tuple[int, int]:
    """Tokens compared, and texts that differ somewhere."""
    tokens = flips = 0
    for one, other in zip(got, wanted, strict=True):
        pairs = zip(one.response_ids, other.response_ids, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        tokens += min(len(one.response_ids), len(other.response_ids)) if at is None else at + 1
        flips += at is not None
    return tokens, flips


def _prompts(number: int) -> list[Prompt]:
    rows = Rows(SIZES["tiny"])
    return [Prompt(words(rows.ids(3 + i % 20))) for i in range(number)]


def _sampled(
    models: Models, prompts: Sequence[Prompt], *, rows: int, new_tokens: int, first_item: int = 0
) -> list[Rollout]:
    renderer = Renderer(little.words(), template="plain", max_length=256)
    made = NativeSampler(models, renderer, rows=rows)
    return made.generate(prompts, sampling=Sampling(new_tokens), key=(0, "check"), first_item=first_item)
