"""The reference engine: transformers' own `generate`, slow, to compare the others with. Its draws are its own: they
come from one stream a chunk, so a text depends on what is sampled beside it, though not on earlier chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fairlead.data.render import Renderer
from fairlead.models.roles import Models
from fairlead.ops.sampling import kept_tokens, stream_key
from fairlead.rollout.draws import Response, cuts, ended, limits, rollout, shaped
from fairlead.rollout.native import decoding
from fairlead.types import Prompt, Rollout, Sampling


class GenerateSampler:
    """Samples from one role of the models. ``rows`` responses are decoded together. Log-probabilities are computed
    afterwards, response by response, from the model's own logits."""

    def __init__(self, models: Models, renderer: Renderer, *, role: str = "policy", rows: int = 64) -> None:
        self._models, self._renderer, self._role, self._rows = models, renderer, role, rows

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling,
        key: tuple[int | str, ...],
        first_item: int = 0,
        num_samples: int = 1,
    ) -> list[Rollout]:
        rollouts: list[Rollout] = []
        ids, at_once = self._renderer.prompt_ids(prompts), max(1, self._rows // num_samples)
        with torch.no_grad(), decoding(self._models, self._role) as network, _own_attention(network):
            for start in range(0, len(prompts), at_once):
                part = range(start, min(start + at_once, len(prompts)))
                items = torch.arange(part.start * num_samples, part.stop * num_samples) + first_item * num_samples
                ends = limits(stream_key(*key), items, sampling).tolist()
                seed = stream_key(*key, "generate", first_item + start)
                found = self._sequences(network, [ids[i] for i in part], sampling, num_samples, seed)
                owners = [i for i in part for _ in range(num_samples)]
                for i, sequence, end in zip(owners, found, ends, strict=True):
                    drawn = ended(self._renderer, sampling, sequence, end)
                    self._measure(network, ids[i], drawn, sampling)
                    rollouts.append(rollout(self._renderer, sampling, prompts[i], ids[i], drawn))
        return rollouts

    def _sequences(
        self, network: Any, prompts: Sequence[tuple[int, ...]], sampling: Sampling, num_samples: int, seed: int
    ) -> list[list[int]]:
        """What transformers generates, with what it writes behind the end."""
        from transformers import GenerationConfig

        width, device = max(map(len, prompts)), self._models.device
        seen = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        eos = self._renderer.eos
        network.generation_config = GenerationConfig(
            do_sample=True,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens or None,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            num_return_sequences=num_samples,
            eos_token_id=eos,
            pad_token_id=eos,
            stop_strings=list(sampling.stop) or None,
            use_cache=True,
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._models.autocast():
            torch.manual_seed(seed)
            found = network.generate(
                torch.tensor([[eos] * (width - len(ids)) + list(ids) for ids in prompts], device=device),
                attention_mask=seen,
                tokenizer=self._renderer.tokenizer if sampling.stop else None,
            )
        return found[:, width:].tolist()

    def _measure(self, network: Any, prompt: tuple[int, ...], drawn: Response, sampling: Sampling) -> None:
        """Fill in the log-probabilities and kept tokens of one forward pass."""
        ids = torch.tensor([[*prompt, *drawn.ids]], device=self._models.device)
        with self._models.autocast():
            logits: Tensor = network(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
        tokens = ids[0, len(prompt) :, None]
        own = logits.gather(1, tokens) / sampling.temperature
        logits = shaped(logits, sampling, self._renderer.eos, sampling.min_new_tokens)
        logits = logits.scatter(1, tokens, own)  # drawn, so kept, whatever rounding says now
        drawn.logprobs = logits.log_softmax(1).gather(1, tokens)[:, 0].tolist()
        if cuts(sampling):
            kept, counts = kept_tokens(logits)
            drawn.kept = [tuple(part.tolist()) for part in kept.split(counts.tolist())]


@contextmanager
def _own_attention(network: Any) -> Iterator[None]:
    """Attention and settings of transformers' own, not ours nor those saved beside the weights."""
    ours, saved = network.config._attn_implementation, network.generation_config
    network.set_attn_implementation("sdpa" if network._supports_sdpa else "eager")
    try:
        yield
    finally:
        network.set_attn_implementation(ours)
        network.generation_config = saved
