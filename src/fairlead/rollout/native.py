"""The native engine: decodes with the trained model itself, by keyed draws, in fixed chunks of rows.

Texts do not depend on which prompts are sampled together; finished rows leave the batch. Log-probabilities are those
of the distribution drawn from, in fp32, at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fairlead.data.render import Renderer
from fairlead.models.roles import Models
from fairlead.ops.sampling import kept_tokens, sample_tokens, stream_key, token_uniforms
from fairlead.rollout.cache import survivors
from fairlead.rollout.draws import Response, cuts, limits, rollout, shaped
from fairlead.rollout.lean import lean
from fairlead.rollout.packed import packed
from fairlead.rollout.reader import Reader
from fairlead.rollout.stops import Stops
from fairlead.types import Prompt, Rollout, Sampling


class NativeSampler:
    """Samples from one role of the models. ``rows`` responses are decoded together."""

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
        ids, stream, device = self._renderer.prompt_ids(prompts), stream_key(*key), self._models.device
        # Prompts of like length together, so that little is padding.
        order = sorted(range(len(prompts) * num_samples), key=lambda item: len(ids[item // num_samples]))
        found: dict[int, Rollout] = {}
        with torch.no_grad(), decoding(self._models, self._role) as network:
            for start in range(0, len(order), self._rows):
                items = order[start : start + self._rows]
                asked = list(dict.fromkeys(item // num_samples for item in items))
                owner = torch.tensor([asked.index(item // num_samples) for item in items], device=device)
                reader = Reader(self._models, network, [ids[i] for i in asked], owner, sampling.max_new_tokens)
                keyed = torch.tensor(items, device=device) + first_item * num_samples
                for item, drawn in zip(items, self._decode(reader, stream, keyed, sampling), strict=True):
                    i = item // num_samples
                    found[item] = rollout(self._renderer, sampling, prompts[i], ids[i], drawn)
        return [found[item] for item in range(len(order))]

    def _decode(self, reader: Reader, key: int, items: Tensor, sampling: Sampling) -> list[Response]:
        """A response for each of the items [R], in their order."""
        longest, eos = sampling.max_new_tokens, self._renderer.eos
        index = torch.arange(longest, device=items.device).expand(len(items), longest)
        uniforms = token_uniforms(key, items[:, None].expand_as(index), index).transpose(1, 2)
        ends, rows = limits(key, items, sampling), torch.arange(len(items), device=items.device)
        stops, record = Stops(self._renderer, sampling.stop, len(items)), _Record()
        logits = reader.prompts()
        for t in range(longest):
            logits = shaped(logits, sampling, eos, len(rows) if t < sampling.min_new_tokens else 0)
            tokens, logprobs = sample_tokens(logits, uniforms[:, t])
            record.add(rows, tokens, logprobs, logits if cuts(sampling) else None)
            done = (tokens == eos) | (ends == t + 1)
            if sampling.stop:
                done |= torch.tensor(stops.add(rows.tolist(), tokens.tolist()), device=done.device)
            if bool(done.any()):
                order = survivors(done)
                if not len(order):
                    break
                reader.keep(order)
                rows, tokens, ends, uniforms = rows[order], tokens[order], ends[order], uniforms[:, :, order]
            logits = reader.next(tokens)
        return record.responses(len(items), stops.stopped)


@contextmanager
def decoding(models: Models, role: str) -> Iterator[Any]:
    """The network of a role, ready to decode, and as it was afterwards."""
    # The outer autocast lasts, so that weights are cast once, not for every token; only the trunk computes in it.
    with models.use(role), models.autocast(), torch.autocast(models.device.type, enabled=False):
        network = models.active_network()
        was_training = network.training
        network.eval()
        try:
            with ExitStack() as stack:
                if models._autocast is None:
                    stack.enter_context(lean(network))
                    stack.enter_context(packed(network))
                yield network
        finally:
            network.train(was_training)


class _Record:
    """What was drawn, left on the device until the last row is done."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, tokens: Tensor, logprobs: Tensor, cut: Tensor | None) -> None:
        self._steps.append((rows, tokens, logprobs))
        if cut is not None:
            self._kept.append(kept_tokens(cut))

    def responses(self, number: int, stopped: set[int]) -> list[Response]:
        found = [Response(stopped=row in stopped) for row in range(number)]
        rows, ids, logprobs = (torch.cat(each).tolist() for each in zip(*self._steps, strict=True))
        for row, token, logprob in zip(rows, ids, logprobs, strict=True):
            found[row].ids.append(token)
            found[row].logprobs.append(logprob)
        if self._kept:
            kept, counts = (torch.cat(each) for each in zip(*self._kept, strict=True))
            for row, part in zip(rows, kept.split(counts.tolist()), strict=True):
                found[row].kept.append(tuple(part.tolist()))
        return found
