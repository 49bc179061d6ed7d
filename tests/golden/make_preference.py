"""Writes preference.json: random inputs of the SFT, preference and reward losses, and what TRL makes of them.

    benchmarks/peers/.venv/bin/python tests/golden/make_preference.py

TRL's methods run on trainers that were never constructed, with models that return given log-probabilities: the inputs
are leaves, so that gradients come by autograd through TRL's own code. Where TRL asks for logits, a vocabulary of two
tokens gives the wanted log-probability exactly.
"""

# trl lives in benchmarks/peers/.venv only.
# pyright: reportMissingImports=false

import json
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

SEED = 20261121
TARGET = Path(__file__).with_name("preference.json")
Rows = list[Tensor]
"""One tensor of per-token values for each sequence."""

OF_A_PAIR = "c and r are log policy - log reference, summed over the response; mean over pairs"
FULL = OF_A_PAIR + "; per_pair is each pair's loss alone"
DPO_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("sigmoid", {"loss_type": ["sigmoid"], "beta": 0.3}, FULL),
    (
        "sigmoid_conservative",
        {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.1},
        FULL + "; TRL's sigmoid reads no label_smoothing, so this is its aot of one pair at a time, where the sort "
        "moves nothing",
    ),
    ("hinge", {"loss_type": ["hinge"], "beta": 1.0}, FULL),
    (
        "ipo",
        {"loss_type": ["ipo"], "beta": 0.3},
        "length-normalised: c and r are each divided by the number of response tokens before they are subtracted; "
        "mean over pairs; per_pair is each pair's loss alone",
    ),
    ("exo_pair", {"loss_type": ["exo_pair"], "beta": 0.3, "label_smoothing": 0.1}, FULL),
    ("nca_pair", {"loss_type": ["nca_pair"], "beta": 0.3}, FULL),
    ("robust", {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.1}, FULL),
    ("bco_pair", {"loss_type": ["bco_pair"], "beta": 0.3}, FULL + "; no running mean of rewards"),
    ("sppo_hard", {"loss_type": ["sppo_hard"], "beta": 0.3}, FULL),
    (
        "aot",
        {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.1},
        "policy margins (chosen - rejected, summed log-probs) and reference margins are each sorted over the batch "
        "and subtracted by rank; mean over ranks",
    ),
    (
        "aot_unpaired",
        {"loss_type": ["aot_unpaired"], "beta": 0.3, "label_smoothing": 0.1},
        "all c and all r are each sorted over the batch and subtracted by rank; mean over ranks",
    ),
    ("apo_zero", {"loss_type": ["apo_zero"], "beta": 0.3}, FULL),
    ("apo_down", {"loss_type": ["apo_down"], "beta": 0.3}, FULL),
    ("discopop", {"loss_type": ["discopop"], "beta": 0.3, "discopop_tau": 0.05}, FULL),
    (
        "sft",
        {"loss_type": ["sft"]},
        "mean over all chosen response tokens of the batch, long responses weigh more; per_pair is each pair's own "
        "token mean, whose mean is not the loss",
    ),
    (
        "sigmoid_norm",
        {"loss_type": ["sigmoid_norm"], "beta": 0.3},
        "length-normalised: c and r are each divided by the number of response tokens before they are subtracted; "
        "mean over pairs; per_pair is each pair's loss alone",
    ),
    ("forward_kl", {"loss_type": ["sigmoid"], "beta": 0.3, "f_divergence_type": "forward_kl"}, FULL),
    ("js_divergence", {"loss_type": ["sigmoid"], "beta": 0.3, "f_divergence_type": "js_divergence"}, FULL),
    (
        "alpha_divergence",
        {
            "loss_type": ["sigmoid"],
            "beta": 0.3,
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.5,
        },
        FULL + "; TRL's fp32 exponential widened to fp64 here",
    ),
    (
        "ld_alpha",
        {"loss_type": ["sigmoid"], "beta": 0.3, "ld_alpha": 0.5},
        FULL + ", but tokens past the shorter response of the pair are multiplied by ld_alpha, in policy and reference",
    ),
    (
        "wpo",
        {"loss_type": ["sigmoid"], "beta": 0.3, "use_weighting": True},
        FULL + "; times the pair's weight, without gradient: product over both responses of exp(mean over response "
        "tokens of log-prob - log_sum_squares); weights are not normalised over the batch",
    ),
    (
        "rpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3},
        OF_A_PAIR + "; plus the weighted sft term, a mean over all chosen response tokens of the batch",
    ),
    (
        "mpo",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3},
        OF_A_PAIR + "; plus the weighted sft term, a mean over all chosen response tokens of the batch",
    ),
]
NOT_SEPARABLE = {"aot", "aot_unpaired", "rpo", "mpo"}
SUMS = "no reference; log-probs summed over the response; mean over pairs; per_pair is the preference term of each pair"
MEANS = (
    "no reference; log-probs averaged over the response tokens; mean over pairs; per_pair is the preference term of "
    "each pair"
)
NLL = "; plus cpo_alpha * nll, a mean over all chosen response tokens of the batch"
CPO_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("cpo", {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 1.0}, SUMS + NLL),
    ("cpo_smoothed", {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.0}, SUMS),
    ("cpo_hinge", {"loss_type": "hinge", "beta": 0.3, "cpo_alpha": 1.0}, SUMS + NLL),
    ("cpo_ipo", {"loss_type": "ipo", "beta": 0.3, "cpo_alpha": 0.0}, MEANS),
    ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}, MEANS),
    ("cpo_simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.5}, MEANS + NLL),
    ("alphapo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0, "alpha": 0.25}, MEANS),
]
KTO = "c and r as in pairs, of desirable and undesirable examples; mean over all examples, weights included"
KTO_CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("kto", "examples", {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}, KTO),
    (
        "kto_weighted",
        "examples",
        {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.33},
        KTO,
    ),
    (
        "kto_negative_kl",
        "examples_negative_kl",
        {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.33},
        KTO,
    ),
    (
        "apo_zero_unpaired",
        "examples",
        {"loss_type": "apo_zero_unpaired", "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.33},
        KTO + "; the KL is not used",
    ),
]


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def padded(rows: Rows, width: int, *, before: list[int] | None = None, fill: float = 0.0) -> Tensor:
    """[S, width], each row starting at column ``before``."""
    starts = before or [0] * len(rows)
    return torch.stack(
        [
            torch.cat([row.new_full((start,), fill), row, row.new_full((width - start - len(row),), fill)])
            for row, start in zip(rows, starts, strict=True)
        ]
    )


class Model(torch.nn.Module):
    """Returns what it was given, whatever it is asked."""

    is_gradient_checkpointing = False

    def __init__(self, outputs: SimpleNamespace) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_args: Any, **_kwargs: Any) -> SimpleNamespace:
        return self.outputs


def per_token_outputs(logprobs: Tensor, mask: Tensor, log_sum_squares: Tensor | None = None) -> SimpleNamespace:
    nothing = torch.zeros_like(logprobs)
    return SimpleNamespace(
        log_probs=logprobs,
        log_sum_sq_probs=log_sum_squares,
        label_mask=mask,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )


def two_token_logits(logprobs: Tensor) -> Tensor:
    """[S, T] -> [S, T + 1, 2]: normalised, so token 0 has just these log-probs; the last position predicts nothing."""
    logits = torch.stack([logprobs, torch.log(-torch.expm1(logprobs))], dim=-1)
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer without its constructor: one process, no aux loss, and these attributes."""

    def identity(value: Any) -> Any:
        return value

    made = object.__new__(trainer)
    made.accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather=identity,
        gather_for_metrics=identity,
        unwrap_model=identity,
        parallelism_config=None,
        num_processes=1,
    )
    made.aux_loss_enabled = False
    made._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    made._total_train_tokens = 0
    made._tp_size = 1
    made.__dict__.update(attributes)
    return made


@contextmanager
def in_fp64() -> Iterator[None]:
    """Makes TRL's casts to fp32 casts to fp64."""
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(torch.Tensor, "float", Tensor.double):
        yield


def take(batch: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The batch with these of its pairs or examples."""
    return {
        name: take(value, chosen) if isinstance(value, dict) else [value[i] for i in chosen]
        for name, value in batch.items()
    }


def pair_inputs(batch: dict[str, Any]) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Leaves of the policy's log-probs, and input ids with their masks: prompt, then response."""
    leaves = {side: [leaf(row) for row in batch[side]["logprobs"]] for side in ("chosen", "rejected")}
    prompts = batch["prompt_lengths"] * 2
    lengths = [len(row) for row in leaves["chosen"] + leaves["rejected"]]
    width = max(p + n for p, n in zip(prompts, lengths, strict=True))
    position = torch.arange(width)
    starts, ends = torch.tensor(prompts)[:, None], torch.tensor(prompts)[:, None] + torch.tensor(lengths)[:, None]
    attention_mask = (position < ends).long()
    return leaves, {
        "input_ids": torch.zeros_like(attention_mask),
        "attention_mask": attention_mask,
        "completion_mask": ((position >= starts) & (position < ends)).long(),
        "before": [length - 1 for length in prompts],
        "width": width - 1,
    }


def dpo(batch: dict[str, Any], settings: dict[str, Any]) -> tuple[Tensor, dict[str, Rows], dict[str, Any]]:
    leaves, inputs = pair_inputs(batch)
    before, width = inputs.pop("before"), inputs.pop("width")

    def both(name: str) -> Tensor:
        rows = [torch.tensor(row) for side in ("chosen", "rejected") for row in batch[side][name]]
        return padded(rows, width, before=before)

    mask = inputs["completion_mask"][:, 1:].bool()
    logprobs = padded(leaves["chosen"] + leaves["rejected"], width, before=before)
    model = Model(per_token_outputs(logprobs, mask, both("log_sum_squares")))
    types = settings["loss_type"]
    trainer = bare(
        DPOTrainer,
        model=model,
        ref_model=Model(per_token_outputs(both("reference_logprobs"), mask)),
        precompute_ref_logps=False,
        loss_types=types,
        loss_weights=settings.get("loss_weights", [1.0] * len(types)),
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        ld_alpha=settings.get("ld_alpha"),
        use_weighting=settings.get("use_weighting", False),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
    )
    with in_fp64():
        return trainer._compute_loss(model, inputs, False), leaves, {}


def without_reference(
    batch: dict[str, Any], settings: dict[str, Any]
) -> tuple[Tensor, dict[str, Rows], dict[str, Any]]:
    """CPO, and ORPO where no loss_type is set; both want logits, and ORPO those of the prompt too."""
    leaves, inputs = pair_inputs(batch)
    width, pairs = inputs["width"], len(batch["prompt_lengths"])
    is_cpo = "loss_type" in settings
    prompts = [leaf(row) for row in batch["prompt_logprobs"]]
    rows = [
        torch.cat([prompt, response])
        for side in ("chosen", "rejected")
        for prompt, response in zip(prompts, leaves[side], strict=True)
    ]
    model = Model(SimpleNamespace(logits=two_token_logits(padded(rows, width, fill=-1.0))))
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    parts = {
        f"{side}_{name}": part
        for name, whole in (("input_ids", inputs["input_ids"]), ("attention_mask", inputs["attention_mask"]))
        for side, part in zip(("chosen", "rejected"), whole.split(pairs), strict=True)
    }
    parts |= dict(zip(("chosen_labels", "rejected_labels"), labels.split(pairs), strict=True))
    defaults = {"label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.5, "pad_token_id": 0, "padding_value": 0}
    trainer = bare(CPOTrainer if is_cpo else ORPOTrainer, is_encoder_decoder=False, **(defaults | settings))
    with in_fp64():
        loss, metrics = trainer.get_batch_loss_metrics(model, parts)
        logps = trainer.concatenated_forward(model, parts)[:2]
        per_pair = trainer.cpo_loss(*logps)[0] if is_cpo else -trainer.odds_ratio_loss(*logps)[0]
    facts: dict[str, Any] = {"per_pair": per_pair.tolist(), "nll": metrics["nll_loss"]}
    return loss, leaves if is_cpo else {**leaves, "prompt": prompts}, facts


def kto(batch: dict[str, Any], settings: dict[str, Any]) -> tuple[Tensor, dict[str, Rows], dict[str, Any]]:
    rows = [leaf(row) for row in batch["logprobs"]]
    width = max(map(len, rows))
    mask = padded([torch.ones_like(row) for row in rows], width + 1, before=[1] * len(rows)).long()
    model = Model(per_token_outputs(padded(rows, width), mask[:, 1:].bool()))
    trainer = bare(
        KTOTrainer,
        model=model,
        calculate_KL=settings["loss_type"] == "kto",
        precompute_ref_logps=True,
        _compute_kl_logps=lambda _model, _batch: torch.tensor(batch["kl_logprobs"]),
        **settings,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(batch["desirable"]),
        "ref_logps": torch.tensor([sum(row) for row in batch["reference_logprobs"]]),
        "ref_KL_logps": torch.tensor(batch["kl_reference_logprobs"]),
    }
    loss = trainer._compute_loss(model, inputs, False)
    facts = {"kl": trainer._metrics["train"]["kl"][0]} if trainer.calculate_KL else {}
    return loss, {"response": rows}, facts


def reward(batch: dict[str, Any], settings: dict[str, Any]) -> tuple[Tensor, dict[str, Rows], dict[str, Any]]:
    chosen, rejected = leaf(batch["chosen"]), leaf(batch["rejected"])
    model = Model(SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None]))
    coefficient = settings.get("center_rewards_coefficient")
    trainer = bare(RewardTrainer, model=model, args=SimpleNamespace(center_rewards_coefficient=coefficient))
    inputs = {"attention_mask": torch.ones(2 * len(chosen), 1).long()}
    if settings["margin"]:
        inputs["margin"] = torch.tensor(batch["margin"])
    return trainer.compute_loss(model, inputs), {"chosen": [chosen], "rejected": [rejected]}, {}


def sft(batch: dict[str, Any], settings: dict[str, Any]) -> tuple[Tensor, dict[str, Rows], dict[str, Any]]:
    rows = [leaf(row) for row in batch["logprobs"]]
    width = max(map(len, rows))
    mask = padded([torch.ones_like(row) for row in rows], width).bool()
    model = Model(per_token_outputs(padded(rows, width), mask))
    trainer = bare(
        SFTTrainer,
        model=model,
        args=SimpleNamespace(loss_type=settings["loss_type"], average_tokens_across_devices=True),
        compute_loss_func=None,
        label_smoother=None,
        get_tp_size=lambda: 1,
    )
    inputs = {"labels": torch.zeros_like(mask).long(), "attention_mask": mask.long()}
    count = settings["num_items_in_batch"]
    items = None if count is None else torch.tensor(count)
    return trainer.compute_loss(model, inputs, num_items_in_batch=items), {"response": rows}, {}


Run = Callable[[dict[str, Any], dict[str, Any]], tuple[Tensor, dict[str, Rows], dict[str, Any]]]


def case(name: str, source: str, run: Run, of: str, settings: dict[str, Any], convention: str) -> dict[str, Any]:
    """One loss of one batch, with its gradient by every log-prob or score of the policy."""
    parts = [[i] for i in range(batch_size(of))] if name == "sigmoid_conservative" else [list(range(batch_size(of)))]
    losses, gradients, facts = [], defaultdict(list), {}
    for part in parts:
        loss, leaves, facts = run(take(BATCHES[of], part), settings)
        loss.backward()
        losses.append(loss.item())
        for role, rows in leaves.items():
            for row in rows:
                # A leaf that takes no part in the loss has no gradient.
                gradient = torch.zeros_like(row) if row.grad is None else row.grad
                gradients[role].append((gradient / len(parts)).tolist())
    made = {"name": name, "source": source, "batch": of, "settings": settings, "convention": convention}
    if run is reward:
        gradients = {role: rows[0] for role, rows in gradients.items()}
    return made | {"loss": sum(losses) / len(losses), **facts, "gradients": dict(gradients)}


def alone(run: Run, of: str, settings: dict[str, Any]) -> list[float]:
    """The loss of each pair or example by itself."""
    return [run(take(BATCHES[of], [i]), settings)[0].item() for i in range(batch_size(of))]


def batch_size(of: str) -> int:
    batch = BATCHES[of]
    return len(batch["prompt_lengths" if "prompt_lengths" in batch else next(iter(batch))])


def exact(values: Tensor) -> list[float]:
    """Rounded to 1/256, so that every dtype holds them and their sums have no rounding error."""
    return ((values * 256).round() / 256).tolist()


def draw_rows(lengths: list[int], *, spread: float, generator: torch.Generator, scale: float = 1.0) -> dict[str, Any]:
    """Policy and reference log-probs that differ by about ``spread`` for each token."""
    rows: dict[str, list[list[float]]] = {"logprobs": [], "reference_logprobs": [], "log_sum_squares": []}
    for length in lengths:
        size = torch.Size([length])
        logprobs = -(torch.empty(size).exponential_(generator=generator) * scale).clamp(min=1 / 64)
        logprobs = torch.tensor(exact(logprobs))
        drift = torch.randn(size, generator=generator) + torch.randn((), generator=generator)
        reference = (logprobs + spread * drift).clamp(max=-1 / 64)
        # log sum_v p_v^2 lies between these two, which are one token's share and all the rest in one other token.
        low, high = 2 * logprobs, torch.log(logprobs.exp() ** 2 + torch.expm1(logprobs) ** 2)
        between = low + torch.rand(size, generator=generator) * (high - low)
        rows["logprobs"].append(logprobs.tolist())
        rows["reference_logprobs"].append(exact(reference))
        rows["log_sum_squares"].append(between.tolist())
    return rows


def draw_pairs(
    prompts: list[int], chosen: list[int], rejected: list[int], *, spread: float, scale: float, seed: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = {
        side: draw_rows(lengths, spread=spread, generator=generator, scale=scale)
        for side, lengths in (("chosen", chosen), ("rejected", rejected))
    }
    before = draw_rows([length - 1 for length in prompts], spread=0.0, generator=generator)["logprobs"]
    return {"prompt_lengths": prompts, "prompt_logprobs": before, **rows}


def draw_examples(*, kl: float, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = draw_rows([4, 9, 3, 6, 5], spread=0.5, generator=generator)
    del rows["log_sum_squares"]
    policy = -20 * torch.rand(5, generator=generator)
    reference = policy - kl + torch.randn(5, generator=generator)
    examples: dict[str, Any] = {"desirable": [True, False, True, True, False], **rows}
    return examples | {"kl_logprobs": exact(policy), "kl_reference_logprobs": exact(reference)}


def draw_scores(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = 2 * torch.randn(2, 5, generator=generator)
    margin = torch.rand(5, generator=generator)
    return {"chosen": exact(chosen), "rejected": exact(rejected), "margin": exact(margin)}


def draw_batches() -> dict[str, dict[str, Any]]:
    sequences = draw_rows([5, 3, 9, 7], spread=0.0, generator=torch.Generator().manual_seed(SEED + 5))
    return {
        "pairs": draw_pairs([3, 1, 5, 2, 4], [5, 9, 3, 7, 4], [8, 4, 3, 6, 9], spread=0.5, scale=0.8, seed=SEED),
        "wide_pairs": draw_pairs([2, 6, 1], [6, 3, 8], [4, 7, 5], spread=2.0, scale=6.0, seed=SEED + 1),
        "examples": draw_examples(kl=1.0, seed=SEED + 2),
        "examples_negative_kl": draw_examples(kl=-1.0, seed=SEED + 3),
        "scores": draw_scores(SEED + 4),
        "sequences": {"logprobs": sequences["logprobs"]},
    }


def make_cases() -> Iterator[dict[str, Any]]:
    for of in ("pairs", "wide_pairs"):
        for name, settings, convention in DPO_CASES:
            made = case(name, "DPOTrainer._compute_loss", dpo, of, settings, convention)
            if name not in NOT_SEPARABLE:
                made["per_pair"] = alone(dpo, of, settings)
            yield made
        for name, settings, convention in CPO_CASES:
            source = "CPOTrainer.get_batch_loss_metrics"
            yield case(name, source, without_reference, of, settings, convention)
        yield case(
            "orpo",
            "ORPOTrainer.get_batch_loss_metrics",
            without_reference,
            of,
            {"beta": 0.1},
            "no reference; log-odds from log-probs averaged over the response tokens; per_pair is -beta * log sigmoid "
            "of them, its mean over pairs is added to nll, a mean over all chosen tokens of the batch, prompts "
            "included but for their first token; TRL's fp32 widened to fp64 here",
        )
    for name, of, settings, convention in KTO_CASES:
        made = case(name, "KTOTrainer._compute_loss", kto, of, settings, convention)
        if settings["loss_type"] == "kto":
            made["convention"] += "; kl is max(0, mean over the batch of kl_logprobs - kl_reference_logprobs), detached"
        yield made
    for name, settings in (
        ("reward", {"margin": False}),
        ("reward_margin", {"margin": True}),
        ("reward_centered", {"margin": False, "center_rewards_coefficient": 0.01}),
        ("reward_margin_centered", {"margin": True, "center_rewards_coefficient": 0.01}),
    ):
        convention = "mean over pairs, the centering term too; per_pair is each pair's loss alone"
        made = case(name, "RewardTrainer.compute_loss", reward, "scores", settings, convention)
        yield made | {"per_pair": alone(reward, "scores", settings)}
    for loss_type in ("nll", "dft"):
        for count in (None, 40):
            settings = {"loss_type": loss_type, "num_items_in_batch": count}
            convention = "sum over tokens, divided by num_items_in_batch, or by the batch's own tokens where it is null"
            if loss_type == "dft":
                convention += "; the factor exp(log-prob) has no gradient"
            name = loss_type if count is None else f"{loss_type}_of_{count}"
            yield case(name, "SFTTrainer.compute_loss", sft, "sequences", settings, convention)


def text(value: Any, indent: str = "") -> str:
    """JSON with one line for each list of plain values, and numbers of 15 digits."""
    if isinstance(value, dict):
        inner = indent + "  "
        lines = ",\n".join(f"{inner}{json.dumps(key)}: {text(entry, inner)}" for key, entry in value.items())
        return f"{{\n{lines}\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, list | dict) for entry in value):
        inner = indent + "  "
        return "[\n" + ",\n".join(inner + text(entry, inner) for entry in value) + f"\n{indent}]"
    if isinstance(value, list):
        return "[" + ", ".join(text(entry) for entry in value) + "]"
    return json.dumps(float(f"{value:.15g}") if isinstance(value, float) else value)


torch.set_default_dtype(torch.float64)
BATCHES = draw_batches()

if __name__ == "__main__":
    about = {
        "script": "tests/golden/make_preference.py",
        "seed": SEED,
        "dtype": "float64",
        "python": platform.python_version(),
        "versions": {name: version(name).split("+")[0] for name in ("trl", "transformers", "torch")},
        "layout": "logprobs: natural log of the probability of each response token, one row for each sequence; "
        "prompt_logprobs: those of the prompt tokens after the first; log_sum_squares: log sum_v p_v^2 of the same "
        "positions; kl_*: log-probs of whole mismatched responses; gradients: of loss, by logprobs or by scores.",
    }
    TARGET.write_text(text({"about": about, "batches": BATCHES, "cases": list(make_cases())}) + "\n", encoding="utf-8")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes", file=sys.stderr)
