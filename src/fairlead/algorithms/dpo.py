"""Direct preference optimisation (Rafailov et al. 2023) and its family: the policy's log-ratio to the reference is the
reward. Losses may be mixed, each with its weight, and with the likelihood of the chosen responses (RPO, MPO).

The reference's log-probabilities are computed once, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fairlead.algorithms.losses import LOSSES, MIXED, settings_of
from fairlead.algorithms.reference import MovingSource, reference_logprobs
from fairlead.algorithms.responses import (
    LengthSettings,
    chosen_nll,
    log_ratios,
    pair_metrics,
    response_lengths,
    response_sums,
)
from fairlead.algorithms.stage import Stage
from fairlead.config_file import suggest
from fairlead.data.loader import DatasetSource
from fairlead.data.pack import preference_batch
from fairlead.errors import ConfigError
from fairlead.ops.preference import Divergence, divergence_score
from fairlead.types import Algorithm, Call, Metrics, Outputs, Pass, Preference, PreferenceBatch, Ranks, Term


class LossSettings(LengthSettings):
    """What the family's losses read, wherever their pairs come from."""

    loss: str | dict[str, float] = "sigmoid"
    """A loss by name, or several with their weights, {sigmoid: 1, sft: 0.5} say; docs/reference/preference-losses.md
    lists them. sft is the chosen responses' mean NLL a token."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference; smaller forgets it more."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels: sigmoid becomes conservative DPO; robust, exo and aot take it too."""
    divergence: Divergence = "reverse_kl"
    """The divergence from the reference that the loss stands for (f-DPO); alpha: with `divergence_alpha`."""
    divergence_alpha: float = Field(default=0.5, gt=0)
    margin_coef: float = Field(default=0.0, ge=0)
    """The rewards of a pair are pushed apart by this times its margin (ODPO, Amini et al. 2024), in units of beta times
    a log-ratio."""
    length_penalty: float = Field(default=0.0, ge=0)
    """The reward of a token less in the chosen response (R-DPO, Park et al. 2024, equation 9)."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: a pair counts by how likely the policy is to have written it (WPO, Zhou et al. 2024)."""
    discopop_tau: float = Field(default=0.05, gt=0)
    measure: tuple[Literal["entropy", "logits"], ...] = ()
    """More that is logged: entropy and mean logits a token; each costs time."""

    @property
    def weights(self) -> dict[str, float]:
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss

    @model_validator(mode="after")
    def _go_together(self) -> LossSettings:
        if not self.weights:
            raise ValueError("loss names none")
        for name in self.weights:
            if name not in LOSSES and name not in MIXED:
                raise ValueError(f"there is no loss {name!r}; {suggest(name, [*LOSSES, *MIXED])}")
        known = {name: LOSSES[name] for name in self.weights if name in LOSSES}
        if self.label_smoothing and not any("label_smoothing" in settings_of(loss) for loss in known.values()):
            raise ValueError(f"label_smoothing has no effect on {', '.join(self.weights)}")
        if "exo" in known and not self.label_smoothing:
            raise ValueError("exo needs label_smoothing > 0, 0.001 say")
        apart = [name for name, loss in known.items() if not loss.takes_difference]
        given = {
            "divergence": self.divergence != "reverse_kl",
            "margin_coef": self.margin_coef > 0,
            "length_penalty": self.length_penalty > 0,
        }
        if apart and any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"{names}: for losses of the difference of two rewards, which {', '.join(apart)} is not")
        return self


class Settings(LossSettings):
    sync_every: int | None = Field(default=None, ge=1)
    """Steps after which the reference is moved to the policy (TR-DPO, Gorbatovski et al. 2024); null: it never moves.
    Costs a forward of the reference at every step."""
    sync_mix: float = Field(default=1.0, gt=0, le=1)
    """The policy's share in the moved reference; with adapters 1."""


def rewards(outputs: Outputs, batch: PreferenceBatch, settings: LossSettings) -> Tensor:
    """What the losses take in the place of log-ratios [S]."""
    ratios = log_ratios(outputs, batch, settings)
    return divergence_score(ratios, settings.divergence, alpha=settings.divergence_alpha)


def pair_loss(
    outputs: Outputs, batch: PreferenceBatch, *, name: str, settings: LossSettings, measures: bool
) -> tuple[Tensor, Metrics]:
    """One loss of the family summed over pairs; unit ``pair``."""
    loss, ratios = LOSSES[name], rewards(outputs, batch, settings)
    chosen, rejected = ratios[batch.chosen], ratios[batch.rejected]
    if (offset := _offset(batch, settings)) is not None:
        chosen = chosen + offset / settings.beta
    given = {key: getattr(settings, key) for key in settings_of(loss)}
    given |= {key: batch.statistics[f"{name}/{key}"] for key in loss.statistics}
    losses = loss.function(chosen, rejected, **given)
    if settings.weighting == "wpo":
        losses = losses * _likely(outputs, batch)
    return losses.sum(), pair_metrics(outputs, batch, settings.beta * ratios.detach()) if measures else {}


def _offset(batch: PreferenceBatch, settings: LossSettings) -> Tensor | None:
    """Added to beta times the difference of a pair [P]."""
    offset = None
    if settings.margin_coef and batch.margin is not None:
        offset = -settings.margin_coef * batch.margin
    if settings.length_penalty:
        lengths = response_lengths(batch)
        longer = settings.length_penalty * (lengths[batch.chosen] - lengths[batch.rejected])
        offset = longer if offset is None else offset + longer
    return offset


def _likely(outputs: Outputs, batch: PreferenceBatch) -> Tensor:
    """Weight of each pair, without gradient [P]: exp of both responses' mean of log p - log sum p^2 (WPO,
    section 3.2)."""
    excess = (outputs.logprobs - outputs.collision).detach()
    means = response_sums(excess, batch, LengthSettings(length="mean"))
    return (means[batch.chosen] + means[batch.rejected]).exp()


_NEEDS = frozenset({"logprobs"})


def prepare(
    call: Call, batches: Sequence[PreferenceBatch], ranks: Ranks, *, settings: LossSettings, moves: bool
) -> list[PreferenceBatch]:
    """Fills in the log-probabilities of a reference that moves, and the statistics of the losses that couple the pairs
    of a step."""
    if moves:
        batches = [
            replace(batch, reference_logprobs=call(batch, _NEEDS, role="reference").logprobs.cpu()) for batch in batches
        ]
    if not _couples(settings):
        return list(batches)
    ratios = [rewards(Outputs(logprobs=call(batch, _NEEDS).logprobs.cpu()), batch, settings) for batch in batches]
    fixed = [response_sums(_reference(batch), batch, settings) for batch in batches]
    pairs = [int(batch.counts["pair"]) for batch in batches]
    first = sum(ranks.gather(sum(pairs))[: ranks.rank])

    def both(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        each = list(zip(values, batches, strict=True))
        return ranks.whole([v[b.chosen] for v, b in each]), ranks.whole([v[b.rejected] for v, b in each])

    found: list[dict[str, Tensor]] = [dict(batch.statistics) for batch in batches]
    for name in settings.weights:
        loss = LOSSES.get(name)
        if loss is None or loss.prepare is None:
            continue
        for key, values in loss.prepare(*both(ratios), *both(fixed)).items():
            own = values[first : first + sum(pairs)]
            for statistics, part in zip(found, torch.split(own, pairs), strict=True):
                statistics[f"{name}/{key}"] = part
    return [replace(batch, statistics=each) for batch, each in zip(batches, found, strict=True)]


def _couples(settings: LossSettings) -> bool:
    return any(name in LOSSES and LOSSES[name].prepare is not None for name in settings.weights)


def _reference(batch: PreferenceBatch) -> Tensor:
    assert batch.reference_logprobs is not None
    return batch.reference_logprobs


def passes(settings: Settings) -> tuple[Pass, ...]:
    return (loss_pass(settings, moves=settings.sync_every is not None),)


def loss_pass(settings: LossSettings, *, moves: bool = False, temperature: float = 1.0) -> Pass:
    """``moves``: the reference follows the policy, and is asked at every step."""
    terms: list[Term] = []
    for name, weight in settings.weights.items():
        if name == "sft":
            terms.append(Term("sft", "chosen_token", chosen_nll, weight))
        else:
            measures = not any(term.unit == "pair" for term in terms)
            fn = partial(pair_loss, name=name, settings=settings, measures=measures)
            terms.append(Term(name, "pair", fn, weight))
    needs = {"logprobs", *({"collision"} if settings.weighting == "wpo" else ())}
    needs |= {{"entropy": "entropy", "logits": "mean_logit"}[name] for name in settings.measure}
    prepares = moves or _couples(settings)
    return Pass(
        "policy",
        tuple(terms),
        frozenset(needs),
        temperature,
        prepare=partial(prepare, settings=settings, moves=moves) if prepares else None,
    )


def source(stage: Stage) -> DatasetSource | MovingSource:
    settings: Settings = stage.settings
    made = _source(stage, stage.records, "train")
    if settings.sync_every is None:
        return made
    if stage.models.is_peft and settings.sync_mix < 1:
        raise ConfigError(
            f"dpo.sync_mix={settings.sync_mix}: the product of two mixed adapters is not the mix of their products",
            hint="dpo.sync_mix=1, or train all weights",
        )
    return MovingSource(made, stage.models, settings.sync_every, settings.sync_mix)


def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
    return stage.loss_evaluation(passes(stage.settings), _source(stage, stage.eval_records, "eval").in_order)


def _source(stage: Stage, records: Sequence[Preference], split: str) -> DatasetSource:
    trees, kept = stage.trees(records, split)
    margins = [records[i].margin if stage.settings.margin_coef else None for i in kept]
    reference: list[list[Tensor]] | None = None
    made = stage.dataset_source(
        [tree.num_tokens for tree in trees],
        lambda chosen: preference_batch(
            [trees[i] for i in chosen],
            packed=stage.packed,
            pad_id=stage.pad_id,
            margins=[margins[i] for i in chosen],
            reference_logprobs=None if reference is None else [row for i in chosen for row in reference[i]],
        ),
    )
    if not stage.settings.sync_every:
        reference = reference_logprobs(stage, trees, made.read() if split == "train" else None)
    return made


ALGORITHM = Algorithm(
    name="dpo",
    settings=Settings,
    record=lambda _: Preference,
    roles=lambda _: ("policy", "reference"),
    passes=passes,
    source=source,
    evaluation=evaluation,
    headline=("loss", "rewards/accuracies", "rewards/margins"),
    reference=lambda settings: "first" if settings.sync_every is None else "moving",
)
