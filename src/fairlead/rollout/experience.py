"""One round of experience: prompts sampled in chunks, scored by text, measured under policy, value and reference.

What is computed here belongs to the moment the round began, so it is stored with the rollouts and never recomputed
when a run continues in the middle of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairlead.data.pack import by_response, micro_batches, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.models.roles import Models
from fairlead.rollout.store import RolloutStore
from fairlead.types import Prompt, Reward, Rollout, Sampler, Sampling


@dataclass(frozen=True, slots=True)
class Experience:
    """Responses of one round. ``tokens`` holds for each name one tensor [length] a response."""

    trees: list[Tree]
    tokens: dict[str, list[Tensor]]
    scores: Tensor
    """[S]"""
    finished: Tensor
    """[S] bool"""

    def tensors(self) -> dict[str, Tensor]:
        prompts, responses = [tree.prompt for tree in self.trees], [tree.responses[0] for tree in self.trees]
        flat = {f"token/{name}": torch.cat(values) for name, values in self.tokens.items()}
        return {
            **flat,
            "prompt_ids": torch.tensor([token for ids in prompts for token in ids]),
            "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
            "response_ids": torch.tensor([token for ids in responses for token in ids]),
            "response_lengths": torch.tensor([len(ids) for ids in responses]),
            "scores": self.scores,
            "finished": self.finished,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Experience:
        prompt_lengths, lengths = tensors["prompt_lengths"].tolist(), tensors["response_lengths"].tolist()
        prompts, responses = tensors["prompt_ids"].split(prompt_lengths), tensors["response_ids"].split(lengths)
        trees = [Tree(tuple(p.tolist()), (tuple(r.tolist()),)) for p, r in zip(prompts, responses, strict=True)]
        flat = {name.removeprefix("token/"): values for name, values in tensors.items() if name.startswith("token/")}
        tokens = {name: list(values.split(lengths)) for name, values in flat.items()}
        return cls(trees, tokens, tensors["scores"], tensors["finished"])


@dataclass(frozen=True, slots=True)
class Collector:
    """Makes rounds of experience, or reads them back when they were made before."""

    sampler: Sampler
    reward: Reward
    models: Models
    renderer: Renderer
    store: RolloutStore
    sampling: Sampling
    seed: int
    rows: int
    """Prompts of one saved chunk: the unit of batch composition."""
    budget: Callable[[], int]
    """Tokens of one forward pass, now."""

    def collect(self, round_number: int, prompts: Sequence[Prompt]) -> tuple[Experience, str]:
        """The round's experience and its hash."""
        if not self.store.has(round_number):
            rollouts = self._sample(round_number, prompts)
            experience = self.measure(rollouts, self.reward(rollouts).values)
            rows = [
                {
                    "prompt": self.renderer.prompt_text(r.prompt),
                    "response": r.text,
                    "finished": r.finished,
                    "score": score,
                }
                for r, score in zip(rollouts, experience.scores.tolist(), strict=True)
            ]
            self.store.save(round_number, experience.tensors(), rows)
        tensors, digest = self.store.load(round_number)
        return Experience.from_tensors(tensors), digest

    def _sample(self, round_number: int, prompts: Sequence[Prompt]) -> list[Rollout]:
        rollouts: list[Rollout] = []
        for number, start in enumerate(range(0, len(prompts), self.rows)):
            part = prompts[start : start + self.rows]

            def sample(part: Sequence[Prompt] = part, start: int = start) -> list[Rollout]:
                key = (self.seed, "rollout", round_number)
                return self.sampler.generate(part, sampling=self.sampling, key=key, first_item=start)

            rollouts += self.store.chunk(round_number, number, part, sample)
        return rollouts

    def measure(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Experience:
        """Log-probabilities of policy and reference and the values, one forward a trunk."""
        trees = [Tree(rollout.prompt_ids, (rollout.response_ids,)) for rollout in rollouts]
        tokens = measure_tokens(self.models, trees, temperature=self.sampling.temperature, budget=self.budget())
        tokens["sampled_logprobs"] = [torch.tensor(rollout.behaviour_logprobs) for rollout in rollouts]
        return Experience(
            trees, tokens, torch.tensor(scores, dtype=torch.float32), torch.tensor([r.finished for r in rollouts])
        )


@torch.no_grad()
def measure_tokens(
    models: Models, trees: Sequence[Tree], *, temperature: float, budget: int
) -> dict[str, list[Tensor]]:
    """``behaviour_logprobs``, ``reference_logprobs`` and ``values`` (for the roles there are) of each response."""
    wanted: list[tuple[str, dict[str, str]]] = [("policy", {"logprobs": "behaviour_logprobs"})]
    if "value" in models.roles:
        if models.value_shares_trunk:
            wanted[0][1]["values"] = "values"
        else:
            wanted.append(("value", {"values": "values"}))
    if "reference" in models.roles:
        wanted.append(("reference", {"logprobs": "reference_logprobs"}))
    result: dict[str, list[Tensor]] = {name: [] for _, fields in wanted for name in fields.values()}
    models.eval()
    for group in micro_batches([tree.num_tokens for tree in trees], budget, packed=models.forest):
        batch = token_batch([trees[i] for i in group], packed=models.forest, pad_id=0).to(models.device)
        for role, fields in wanted:
            with models.use(role):
                outputs: Any = models(batch, frozenset(fields), temperature)
            for field, name in fields.items():
                result[name] += [row.float().cpu() for row in by_response(getattr(outputs, field), batch)]
    models.train()
    return result
