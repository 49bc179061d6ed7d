"""One round of experience: prompts sampled in chunks, scored by text, measured under policy, value and reference.

What is computed here belongs to the moment the round began, so it is stored with the rollouts and never recomputed
when a run continues in the middle of a round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fairlead.data.pack import by_response, micro_batches, token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.models.roles import Models
from fairlead.rollout.samples import prompt_rows, sample_rows, score_kept, scored_rows, shares_of
from fairlead.rollout.screen import Screen
from fairlead.rollout.store import RolloutStore
from fairlead.rollout.texts import variety
from fairlead.types import Prompt, Ranks, Reward, Rollout, Sampler, Sampling, Scores, Support

CHECKED = 8
"""Where the sampler's log-probabilities stand for the trainer's, of one prompt in so many both are measured."""


@dataclass(frozen=True, slots=True)
class Experience:
    """Responses of one round, those to one prompt side by side. ``tokens`` holds for each name one tensor [length] a
    response."""

    trees: list[Tree]
    """One a prompt, each with as many responses."""
    tokens: dict[str, list[Tensor]]
    scores: Tensor
    """[S]"""
    finished: Tensor
    """[S] bool"""
    parts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """[S] what each of several rewards says itself."""
    support: Support | None = None
    """Of all tokens of all responses, in order."""
    measured: dict[str, float] = field(default_factory=dict[str, float])
    """Of the texts, which are not kept here."""
    number: int = 0
    """Of the round."""

    @property
    def discarded(self) -> dict[str, float]:
        """Shares of the responses by the reason for which they were discarded."""
        return {name: share for name, share in self.measured.items() if name.startswith("discarded/")}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(response) for tree in self.trees for response in tree.responses]

    def by_prompt(self, values: Tensor) -> list[Tensor]:
        """One number a response [S] -> those of each prompt."""
        return list(torch.split(values, [len(tree.responses) for tree in self.trees]))

    @property
    def num_samples(self) -> int:
        """Responses to a prompt."""
        return len(self.trees[0].responses)

    def support_of(self, responses: Sequence[int]) -> Support | None:
        """Of the tokens of some responses, in the order given."""
        return select_support(self.support, self.lengths, responses)

    def tensors(self) -> dict[str, Tensor]:
        prompts, responses = [tree.prompt for tree in self.trees], [r for tree in self.trees for r in tree.responses]
        support = {} if self.support is None else {
            "support/kept": self.support.kept,
            "support/counts": self.support.counts,
            "support/banned": self.support.banned,
        }  # fmt: skip
        return {
            **{f"token/{name}": torch.cat(values) for name, values in self.tokens.items()},
            **{f"part/{name}": values for name, values in self.parts.items()},
            **{f"measured/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.measured.items()},
            **support,
            "prompt_ids": torch.tensor(list(chain(*prompts))),
            "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
            "response_ids": torch.tensor(list(chain(*responses))),
            "response_lengths": torch.tensor(self.lengths),
            "scores": self.scores,
            "finished": self.finished,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Experience:
        def under(kind: str) -> dict[str, Tensor]:  # in an order of its own, which safetensors has not
            return {name.removeprefix(kind): tensors[name] for name in sorted(tensors) if name.startswith(kind)}

        prompt_lengths, lengths = tensors["prompt_lengths"].tolist(), tensors["response_lengths"].tolist()
        prompts = [tuple(ids.tolist()) for ids in tensors["prompt_ids"].split(prompt_lengths)]
        responses = [tuple(ids.tolist()) for ids in tensors["response_ids"].split(lengths)]
        number = len(responses) // len(prompts)
        return cls(
            [Tree(prompt, tuple(responses[i * number : (i + 1) * number])) for i, prompt in enumerate(prompts)],
            {name: list(values.split(lengths)) for name, values in under("token/").items()},
            tensors["scores"],
            tensors["finished"],
            under("part/"),
            Support(**kept) if (kept := under("support/")) else None,
            {name: float(value) for name, value in under("measured/").items()},
        )


def joined(parts: Sequence[Experience]) -> Experience:
    """One round from the shares of it; what was measured of their texts is left out."""
    names = dict.fromkeys(name for each in parts for name in each.parts)
    nothing = [torch.full_like(each.scores, math.nan) for each in parts]
    supports = [each.support or _whole_vocabulary(sum(each.lengths)) for each in parts]
    drawn = any(each.support is not None for each in parts)
    return Experience(
        [tree for each in parts for tree in each.trees],
        {
            name: [values for each in parts for values in each.tokens[name]]
            for name in parts[0].tokens
            if all(name in each.tokens for each in parts)
        },
        torch.cat([each.scores for each in parts]),
        torch.cat([each.finished for each in parts]),
        {
            name: torch.cat([each.parts.get(name, none) for each, none in zip(parts, nothing, strict=True)])
            for name in names
        },
        Support(
            torch.cat([each.kept for each in supports]),
            torch.cat([each.counts for each in supports]),
            torch.cat([each.banned for each in supports]),
        )
        if drawn
        else None,
    )


def _whole_vocabulary(tokens: int) -> Support:
    return Support(torch.zeros(0, dtype=torch.long), torch.zeros(tokens, dtype=torch.long), torch.full((tokens,), -1))


@dataclass(frozen=True, slots=True)
class Collector:
    """Makes rounds of experience, or reads them back when they were made before. Each of the ranks samples, scores and
    measures its share of the prompts; then all know the whole round."""

    sampler: Sampler
    reward: Reward
    models: Models
    renderer: Renderer
    store: RolloutStore
    sampling: Sampling
    num_samples: int
    seed: int
    rows: int
    """Prompts of one saved chunk: the unit of batch composition."""
    budget: Callable[[], int]
    """Tokens of one forward pass, now."""
    whole_kl: bool = False
    """Also measure the KL to the reference over the whole distribution, not at the sampled token alone."""
    logprobs: bool = True
    """Measure log-probabilities and values; else texts and scores are all that is wanted."""
    own_sampler: bool = False
    """The sampler is the policy itself in full precision: its log-probabilities are the trainer's up to rounding."""
    screen: Screen | None = None
    """Cleans responses, and says which are discarded; those are not scored."""
    watch: Mapping[str, Reward] = field(default_factory=dict[str, Reward])
    """Rewards that are measured of one response to each prompt, the first that was not discarded."""
    ranks: Ranks = field(default_factory=Ranks)
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """What the phases of the last round took; empty where it was read back."""

    def collect(self, round_number: int, prompts: Sequence[Prompt]) -> tuple[Experience, str]:
        """The round's experience and its hash."""
        self.seconds.clear()
        if not self.store.has(round_number):
            with self.models.whole(), self.ranks.together():
                own, told = self._share(round_number, prompts)
            parts = self.ranks.gather_tensors({} if own is None else own.tensors())
            whole = joined([Experience.from_tensors(part) for part in parts if part])
            told = [share for share in self.ranks.gather(told) if share["samples"]]
            if self.ranks.is_leader:
                self._save(round_number, prompts, whole, told)
        tensors, digest = self.store.load(round_number)
        return replace(Experience.from_tensors(tensors), number=round_number), digest

    def _share(self, round_number: int, prompts: Sequence[Prompt]) -> tuple[Experience | None, dict[str, Any]]:
        """This rank's share of a round, and what is to be said of its texts; none where it has no prompts."""
        with self._timed("sampling"):
            rollouts = self.store.sample(
                self.sampler,
                round_number,
                prompts,
                sampling=self.sampling,
                num_samples=self.num_samples,
                seed=self.seed,
                rows=self.rows,
            )
        samples = sample_rows(rollouts, self.num_samples, self.renderer)
        reasons: list[str | None] = [None] * len(rollouts)
        if self.screen is not None:
            rollouts, reasons = self.screen(rollouts)
        own_left = any(reason is None for reason in reasons)
        some_left = any(self.ranks.gather(own_left))
        with self._timed("scoring"):
            if own_left or not some_left:
                scores = score_kept(self.reward, rollouts, reasons)
            else:
                scores = Scores((math.nan,) * len(rollouts))
        with self._timed("measuring"):
            first = self.store.first_prompt(len(prompts), self.rows)
            experience = self.measure(rollouts, scores, first=first) if rollouts else None
        return experience, {
            "samples": samples,
            "scored": list(scored_rows(samples, rollouts, scores, reasons)),
            "texts": [rollout.text for rollout in rollouts],
            "reasons": reasons,
            "watched": self._watched(rollouts, reasons),
        }

    def _watched(self, rollouts: Sequence[Rollout], reasons: Sequence[str | None]) -> dict[str, list[float]]:
        left = [i for i, reason in enumerate(reasons) if reason is None]
        first = {i // self.num_samples: rollouts[i] for i in reversed(left)}
        asked = [first[prompt] for prompt in sorted(first)]
        return {name: list(reward(asked).values) if asked else [] for name, reward in self.watch.items()}

    def _save(
        self, round_number: int, prompts: Sequence[Prompt], whole: Experience, told: Sequence[dict[str, Any]]
    ) -> None:
        def all_of(name: str) -> list[Any]:
            return [each for share in told for each in share[name]]

        samples, reasons = all_of("samples"), all_of("reasons")
        watched = {name: [value for share in told for value in share["watched"][name]] for name in self.watch}
        whole.measured.update(
            {
                **variety(all_of("texts")),
                "finished": sum(row["finished"] for row in samples) / len(samples),  # a cleaned text always ends
                **shares_of(reasons),
                **{f"watched/{name}": sum(values) / len(values) for name, values in watched.items()},
            }
        )
        texts = {"prompts": prompt_rows(prompts), "samples": samples, "scored": all_of("scored")}
        self.store.save(round_number, whole.tensors(), texts)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - started

    def measure(self, rollouts: Sequence[Rollout], scores: Scores, *, first: int = 0) -> Experience:
        """Log-probabilities of policy and reference, entropy and values, one forward a trunk at most. ``first``: the
        number of the first prompt in its round."""
        trees, support = trees_of(rollouts, self.num_samples), drawn_from(rollouts)
        experience = Experience(
            trees,
            {"sampled_logprobs": [torch.tensor(rollout.behaviour_logprobs) for rollout in rollouts]},
            torch.tensor(scores.values, dtype=torch.float32),
            torch.tensor([rollout.finished for rollout in rollouts]),
            {name: torch.tensor(values, dtype=torch.float32) for name, values in scores.parts.items()},
            support,
        )
        if not self.logprobs:
            return experience
        tokens = experience.tokens
        if scores.tokens is not None:
            tokens["dense"] = [torch.tensor(each, dtype=torch.float32) for each in scores.tokens]
        known = self.own_sampler and not any(row.isnan().any() for row in tokens["sampled_logprobs"])  # else cleaned
        form: dict[str, Any] = {"temperature": self.sampling.temperature, "budget": self.budget()}
        tokens |= measure_tokens(
            self.models,
            trees,
            **form,
            support_of=experience.support_of,
            policy=not known,
            entropy=not known,
            whole_kl=self.whole_kl,
        )
        if known:
            tokens["behaviour_logprobs"] = tokens["sampled_logprobs"]
            tokens |= self._checked(experience, form, range(-first % CHECKED, len(trees), CHECKED))
        elif self.own_sampler:
            tokens["trainer_logprobs"] = tokens["behaviour_logprobs"]
        return experience

    def _checked(self, experience: Experience, form: Mapping[str, Any], prompts: range) -> dict[str, list[Tensor]]:
        """The trainer's log-probabilities and the entropy of the responses to some prompts, nan of the others."""
        number = experience.num_samples
        chosen = [at * number + k for at in prompts for k in range(number)]
        measured = measure_tokens(
            self.models,
            [experience.trees[at] for at in prompts],
            **form,
            support_of=lambda asked: experience.support_of([chosen[i] for i in asked]),
            others=(),
            entropy=True,
        )
        found: dict[str, list[Tensor]] = {}
        for name, of in (("trainer_logprobs", "behaviour_logprobs"), ("entropy", "entropy")):
            found[name] = [torch.full((length,), math.nan) for length in experience.lengths]
            for at, row in zip(chosen, measured[of], strict=True):
                found[name][at] = row
        return found


def trees_of(rollouts: Sequence[Rollout], num_samples: int) -> list[Tree]:
    """One tree a prompt."""
    groups = [rollouts[at : at + num_samples] for at in range(0, len(rollouts), num_samples)]
    return [Tree(group[0].prompt_ids, tuple(rollout.response_ids for rollout in group)) for group in groups]


def drawn_from(rollouts: Sequence[Rollout]) -> Support | None:
    """What the tokens of all responses, in order, were drawn from; none where always the whole vocabulary."""
    if all(rollout.kept is None and rollout.banned is None for rollout in rollouts):
        return None
    kept: list[tuple[int, ...]] = []
    banned: list[int] = []
    for rollout in rollouts:
        number = len(rollout.response_ids)
        kept += rollout.kept if rollout.kept is not None else [()] * number
        banned += rollout.banned if rollout.banned is not None else [-1] * number
    return Support(
        torch.tensor(list(chain(*kept)), dtype=torch.long), torch.tensor(list(map(len, kept))), torch.tensor(banned)
    )


def select_support(support: Support | None, lengths: Sequence[int], responses: Sequence[int]) -> Support | None:
    """Of the tokens of some responses, in the order given; ``support`` is of all, whose ``lengths`` are given."""
    if support is None:
        return None
    first = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    chosen = torch.cat([torch.arange(first[i], first[i + 1]) for i in responses])
    begin, counts = support.counts.cumsum(0) - support.counts, support.counts[chosen]
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = support.kept[begin[chosen].repeat_interleave(counts) + within]
    return Support(kept, counts, support.banned[chosen])


@torch.no_grad()
def measure_tokens(
    models: Models,
    trees: Sequence[Tree],
    *,
    temperature: float,
    budget: int,
    support_of: Callable[[Sequence[int]], Support | None] = lambda _: None,
    policy: bool = True,
    others: Sequence[str] = ("value", "reference"),
    entropy: bool = False,
    whole_kl: bool = False,
) -> dict[str, list[Tensor]]:
    """Of the ``policy`` ``behaviour_logprobs``, of the ``others`` that there are ``reference_logprobs`` and ``values``
    of each response, and ``entropy`` and ``whole_kl`` where asked for. ``support_of`` some responses says what their
    tokens were drawn from."""
    wanted: list[tuple[str, dict[str, str]]] = [("policy", {"logprobs": "behaviour_logprobs"} if policy else {})]
    if entropy:
        wanted[0][1]["entropy"] = "entropy"
    if "value" in models.roles and "value" in others:
        if models.value_shares_trunk:
            wanted[0][1]["values"] = "values"
        else:
            wanted.append(("value", {"values": "values"}))
    if "reference" in models.roles and "reference" in others:
        wanted.append(("reference", {"logprobs": "reference_logprobs"}))
    result: dict[str, list[Tensor]] = {name: [] for _, fields in wanted for name in fields.values()}
    if whole_kl:
        result["whole_kl"] = []
    first = [0, *torch.tensor([len(tree.responses) for tree in trees]).cumsum(0).tolist()]
    models.eval()
    for group in micro_batches([tree.num_tokens for tree in trees], budget, packed=models.forest):
        batch = token_batch([trees[i] for i in group], packed=models.forest, pad_id=0)
        responses = [at for i in group for at in range(first[i], first[i + 1])]
        batch = replace(batch, support=support_of(responses))
        given = batch.to(models.device)
        for role, fields in (each for each in wanted if each[1]):
            with models.use(role):
                outputs: Any = models(given, frozenset(fields), temperature)
            for field_name, name in fields.items():
                result[name] += by_response(getattr(outputs, field_name).float().cpu(), batch)
        if whole_kl:
            result["whole_kl"] += by_response(models.divergence(given, temperature).float().cpu(), batch)
    models.train()
    return result
