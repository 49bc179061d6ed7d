"""The native engine: decodes with the trained model itself, by keyed draws, in fixed chunks of rows.

Texts do not depend on which prompts are sampled together; finished rows leave the batch. Log-probabilities are those
of the distribution drawn from, in fp32, at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairlead.data.render import Renderer
from fairlead.models.lm_head import last_logits
from fairlead.models.roles import Models
from fairlead.ops.sampling import keep_top, sample_tokens, stream_key
from fairlead.rollout.cache import decoding_cache
from fairlead.types import Prompt, Rollout, Sampling


class NativeSampler:
    """Samples from one role of the models. ``rows`` prompts are decoded together."""

    def __init__(self, models: Models, renderer: Renderer, *, role: str = "policy", rows: int = 64) -> None:
        self._models, self._renderer, self._role, self._rows = models, renderer, role, rows

    def generate(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, key: tuple[int | str, ...], first_item: int = 0
    ) -> list[Rollout]:
        rollouts: list[Rollout] = []
        ids = self._renderer.prompt_ids(prompts)
        with torch.no_grad(), self._models.use(self._role):
            network = self._models.active_network()
            was_training = network.training
            network.eval()
            try:
                for start in range(0, len(prompts), self._rows):
                    chunk = slice(start, start + self._rows)
                    decoded = self._decode(network, ids[chunk], sampling, stream_key(*key), first_item + start)
                    for prompt, prompt_ids, (tokens, logprobs) in zip(prompts[chunk], ids[chunk], decoded, strict=True):
                        finished = tokens[-1] == self._renderer.eos
                        text = self._renderer.decode(tokens)
                        rollouts.append(Rollout(prompt, prompt_ids, tuple(tokens), tuple(logprobs), finished, text))
            finally:
                network.train(was_training)
        return rollouts

    def _decode(
        self, network: Any, prompts: Sequence[tuple[int, ...]], sampling: Sampling, key: int, first_item: int
    ) -> list[tuple[list[int], list[float]]]:
        """Response ids and their log-probabilities for each prompt."""
        device = self._models.device
        width, rows = max(map(len, prompts)), len(prompts)
        pad = self._renderer.eos
        input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        seen = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts], device=device)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        cache = decoding_cache(network, width + sampling.max_new_tokens, own=self._models.forest)
        alive = torch.arange(rows, device=device)
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        for t in range(sampling.max_new_tokens):
            logits = self._last_logits(network, input_ids, seen, positions, cache) / sampling.temperature
            if sampling.top_k or sampling.top_p < 1.0:
                logits = keep_top(logits, top_k=sampling.top_k, top_p=sampling.top_p)
            tokens, drawn = sample_tokens(logits, key, alive + first_item, torch.full_like(alive, t))
            for row, token, logprob in zip(alive.tolist(), tokens.tolist(), drawn.tolist(), strict=True):
                if not responses[row] or responses[row][-1] != self._renderer.eos:
                    responses[row].append(token)
                    logprobs[row].append(logprob)
            done = torch.tensor([responses[row][-1] == self._renderer.eos for row in alive.tolist()], device=device)
            if bool(done.all()):
                break
            if int(done.sum()) * 8 >= len(alive):
                keep = (~done).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, tokens, seen, positions = alive[keep], tokens[keep], seen[keep], positions[keep]
            input_ids = tokens[:, None]
            positions = positions[:, -1:] + 1
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        return list(zip(responses, logprobs, strict=True))

    def _last_logits(self, network: Any, input_ids: Tensor, seen: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits of the next token [R, V] in max(fp32, dtype), scaled and capped as the family does."""
        hidden = network.get_decoder()(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=_mask(seen, input_ids.shape[1]) if self._models.forest else seen.long(),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return last_logits(network, hidden)


def _mask(seen: Tensor, queries: int) -> Tensor:
    """[R, 1, queries, keys] bool: causal, padding unseen; padding sees itself, so that no row is empty."""
    keys = seen.shape[1]
    if queries == 1:
        return seen[:, None, None]
    square = torch.ones(queries, keys, dtype=torch.bool, device=seen.device).tril(keys - queries)
    return (square & seen[:, None])[:, None] | torch.eye(queries, keys, dtype=torch.bool, device=seen.device)
