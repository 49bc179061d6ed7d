"""The losses of SFT, reward models and the preference family against TRL's numbers, through the real passes and the
real loop, in one micro-batch and in two. `tests/golden` says how the numbers were made."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fairlead.algorithms import cpo, dpo, kto, orpo, reward, sft, simpo
from fairlead.data.pack import by_response, labelled_batch, preference_batch, spread, token_batch
from fairlead.data.render import Tree
from fairlead.training.loop import backward
from fairlead.types import Outputs, Pass, TokenBatch

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "preference.json").read_text("utf-8"))
CASES = {(case["name"], case["batch"]): case for case in GOLDEN["cases"]}
PAIRED = ("pairs", "wide_pairs")


class Stub:
    """Answers a batch with the outputs that were given for it; a batch is known by its first token."""

    device = torch.device("cpu")
    trainable: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.outputs: dict[int, dict[str, Tensor]] = {}

    def use(self, _: str) -> Any:
        return nullcontext()

    def whole(self) -> Any:
        return nullcontext()

    def __call__(
        self, batch: TokenBatch, needs: frozenset[str], temperature: float = 1.0, *, uniform: bool = False
    ) -> Outputs:
        found = self.outputs[int(batch.input_ids.flatten()[0])]
        assert needs <= found.keys()
        return Outputs(**found)

    def add(self, key: int, batch: TokenBatch, **values: list[Tensor]) -> None:
        self.outputs[key] = {name: spread(each, batch.loss_mask) for name, each in values.items()}


def doubles(rows: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def leaves(rows: list[list[float]]) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in doubles(rows)]


def interleaved(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    return [each for pair in zip(chosen, rejected, strict=True) for each in pair]


def parts(number: int, splits: int) -> list[list[int]]:
    cut = number // 2 if splits == 2 else number
    return [part for part in (list(range(cut)), list(range(cut, number))) if part]


def run_pairs(case: dict[str, Any], passes: tuple[Pass, ...], *, reference: bool, splits: int):
    """The metrics of a step over the case's pairs, and the gradients of chosen and rejected log-probabilities."""
    given = GOLDEN["batches"][case["batch"]]
    sides = [given["chosen"], given["rejected"]]
    rows = [leaves(side["logprobs"]) for side in sides]
    logprobs = interleaved(*rows)
    fixed = interleaved(*(doubles(side["reference_logprobs"]) for side in sides))
    squares = interleaved(*(doubles(side["log_sum_squares"]) for side in sides))
    stub, batches = Stub(), list[TokenBatch]()
    for number, part in enumerate(parts(len(rows[0]), splits)):
        trees = [
            Tree((number,) * given["prompt_lengths"][i], ((8,) * len(rows[0][i]), (9,) * len(rows[1][i]))) for i in part
        ]
        inside = [2 * i + side for i in part for side in (0, 1)]
        batch = preference_batch(
            trees, packed=True, pad_id=0, reference_logprobs=[fixed[i] for i in inside] if reference else None
        )
        values = {"logprobs": [logprobs[i] for i in inside], "collision": [squares[i] for i in inside]}
        stub.add(number, batch, **values)
        batches.append(batch)
    metrics = backward(stub, passes, batches)  # type: ignore[arg-type]
    return metrics, [[row.grad for row in side] for side in rows]


def close(got: list[Tensor | None], wanted: list[list[float]]) -> None:
    for ours, theirs in zip(got, doubles(wanted), strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-10, atol=1e-12)


DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_conservative": {"label_smoothing": 0.1},
    "hinge": {"loss": "hinge", "beta": 1.0},
    "ipo": {"loss": "ipo", "length": "mean"},
    "exo_pair": {"loss": "exo", "label_smoothing": 0.1},
    "nca_pair": {"loss": "nca"},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "bco_pair": {"loss": "bco"},
    "sppo_hard": {"loss": "sppo"},
    "aot": {"loss": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"loss": "aot_unpaired", "label_smoothing": 0.1},
    "apo_zero": {"loss": "apo_zero"},
    "apo_down": {"loss": "apo_down"},
    "discopop": {"loss": "discopop"},
    "sft": {"loss": "sft"},
    "sigmoid_norm": {"length": "mean"},
    "forward_kl": {"divergence": "forward_kl"},
    "js_divergence": {"divergence": "js"},
    "alpha_divergence": {"divergence": "alpha", "divergence_alpha": 0.5},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"weighting": "wpo"},
    "rpo": {"loss": {"sigmoid": 1.0, "sft": 0.5}},
    "mpo": {"loss": {"sigmoid": 0.8, "bco": 0.2, "sft": 1.0}},
}
FREE: dict[str, tuple[Any, Any]] = {
    "cpo": (cpo, cpo.Settings(beta=0.3)),
    "cpo_smoothed": (cpo, cpo.Settings(beta=0.3, label_smoothing=0.1, sft_weight=0.0)),
    "cpo_hinge": (cpo, cpo.Settings(beta=0.3, loss="hinge")),
    "cpo_ipo": (cpo, cpo.Settings(beta=0.3, loss="ipo", length="mean", sft_weight=0.0)),
    "simpo": (simpo, simpo.Settings(beta=2.0, gamma=0.5)),
    "cpo_simpo": (simpo, simpo.Settings(beta=2.0, gamma=0.5, sft_weight=0.5)),
    "alphapo": (simpo, simpo.Settings(beta=2.0, gamma=0.5, alpha=0.25)),
}


def test_every_case_of_the_golden_file_is_compared() -> None:
    here = {*DPO, *FREE, "orpo", *KTO, *REWARD, *SFT}
    assert here == {name for name, _ in CASES}


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("batch", PAIRED)
@pytest.mark.parametrize("name", DPO)
def test_the_dpo_family_has_the_values_and_gradients_of_trl(name: str, batch: str, splits: int) -> None:
    case = CASES[name, batch]
    passes = dpo.passes(dpo.Settings(**{"beta": 0.3, **DPO[name]}))
    metrics, gradients = run_pairs(case, passes, reference=True, splits=splits)
    assert metrics["loss"] == pytest.approx(case["loss"], rel=1e-10)
    for side, got in zip(("chosen", "rejected"), gradients, strict=True):
        close(got, case["gradients"][side])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("batch", PAIRED)
@pytest.mark.parametrize("name", FREE)
def test_losses_without_a_reference_have_the_values_and_gradients_of_trl(name: str, batch: str, splits: int) -> None:
    case, (algorithm, settings) = CASES[name, batch], FREE[name]
    metrics, gradients = run_pairs(case, algorithm.passes(settings), reference=False, splits=splits)
    assert metrics["loss"] == pytest.approx(case["loss"], rel=1e-10)
    for side, got in zip(("chosen", "rejected"), gradients, strict=True):
        close(got, case["gradients"][side])


@pytest.mark.parametrize("batch", PAIRED)
def test_the_odds_ratio_has_the_values_and_gradients_of_trl(batch: str) -> None:
    """TRL's likelihood counts the prompt's tokens, ours does not; it reaches chosen responses alone."""
    case = CASES["orpo", batch]
    metrics, gradients = run_pairs(case, orpo.passes(orpo.Settings(weight=0.1)), reference=False, splits=2)
    assert 0.1 * metrics["loss/odds_ratio"] == pytest.approx(sum(case["per_pair"]) / len(case["per_pair"]), rel=1e-10)
    close(gradients[1], case["gradients"]["rejected"])


KTO = {
    "kto": kto.Settings(beta=0.3),
    "kto_weighted": kto.Settings(beta=0.3, undesirable_weight=1.33),
    "kto_negative_kl": kto.Settings(beta=0.3, undesirable_weight=1.33),
    "apo_zero_unpaired": kto.Settings(beta=0.3, loss="apo_zero", undesirable_weight=1.33),
}


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", KTO)
def test_kto_has_the_values_and_gradients_of_trl(name: str, splits: int) -> None:
    case = next(case for (found, _), case in CASES.items() if found == name)
    given = GOLDEN["batches"][case["batch"]]
    rows, fixed = leaves(given["logprobs"]), doubles(given["reference_logprobs"])
    other = doubles([[value] for value in given["kl_logprobs"]])
    other_fixed = doubles([[value] for value in given["kl_reference_logprobs"]])
    stub, batches = Stub(), list[TokenBatch]()
    for number, part in enumerate(parts(len(rows), splits)):
        mismatched = labelled_batch(
            [Tree((10 + number,), ((7,),)) for _ in part],
            [True] * len(part),
            packed=True,
            pad_id=0,
            reference_logprobs=[other_fixed[i] for i in part],
        )
        batch = labelled_batch(
            [Tree((number,), ((8,) * len(rows[i]),)) for i in part],
            [given["desirable"][i] for i in part],
            packed=True,
            pad_id=0,
            reference_logprobs=[fixed[i] for i in part],
            mismatched=mismatched,
        )
        stub.add(number, batch, logprobs=[rows[i] for i in part])
        stub.add(10 + number, mismatched, logprobs=[other[i] for i in part])
        batches.append(batch)
    metrics = backward(stub, kto.passes(KTO[name]), batches)  # type: ignore[arg-type]
    assert metrics["loss"] == pytest.approx(case["loss"], rel=1e-10)
    assert metrics["kl"] == pytest.approx(case.get("kl", 0.0), rel=1e-10)
    close([row.grad for row in rows], case["gradients"]["response"])


REWARD: dict[str, dict[str, Any]] = {
    "reward": {},
    "reward_margin": {"margin_coef": 1.0},
    "reward_centered": {"centring_coef": 0.01},
    "reward_margin_centered": {"margin_coef": 1.0, "centring_coef": 0.01},
}


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", REWARD)
def test_the_reward_loss_has_the_values_and_gradients_of_trl(name: str, splits: int) -> None:
    case, given = CASES[name, "scores"], GOLDEN["batches"]["scores"]
    scores = [torch.tensor(given[side], dtype=torch.float64, requires_grad=True) for side in ("chosen", "rejected")]
    stub, batches = Stub(), list[TokenBatch]()
    for number, part in enumerate(parts(len(scores[0]), splits)):
        margins = [given["margin"][i] for i in part]
        trees = [Tree((number,), ((8,), (9,)))] * len(part)
        batches.append(preference_batch(trees, packed=True, pad_id=0, margins=margins))
        stub.outputs[number] = {"scores": torch.stack([side[part] for side in scores], 1).flatten()}
    metrics = backward(stub, reward.passes(reward.Settings(**REWARD[name])), batches)  # type: ignore[arg-type]
    assert metrics["loss"] == pytest.approx(case["loss"], rel=1e-7)  # margins are stored in fp32
    for side, got in zip(("chosen", "rejected"), scores, strict=True):
        torch.testing.assert_close(
            got.grad, torch.tensor(case["gradients"][side], dtype=torch.float64), rtol=1e-6, atol=0
        )


SFT = {"nll": 1.0, "nll_of_40": None, "dft": 1.0, "dft_of_40": None}


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", SFT)
def test_sft_has_the_values_and_gradients_of_trl(name: str, splits: int) -> None:
    """TRL's number of items in the batch is our count of tokens."""
    case = CASES[name, "sequences"]
    rows = leaves(GOLDEN["batches"]["sequences"]["logprobs"])
    factor = 1.0
    if number := case["settings"]["num_items_in_batch"]:
        factor = sum(map(len, rows)) / number
    stub, batches = Stub(), list[TokenBatch]()
    for index, part in enumerate(parts(len(rows), splits)):
        batch = token_batch([Tree((index,), ((8,) * len(rows[i]),)) for i in part], packed=True, pad_id=0)
        stub.add(index, batch, logprobs=[rows[i] for i in part])
        batches.append(batch)
    passes = sft.passes(sft.Settings(loss="dft" if "dft" in name else "nll"))
    metrics = backward(stub, passes, batches)  # type: ignore[arg-type]
    assert factor * metrics["loss"] == pytest.approx(case["loss"], rel=1e-10)
    close([None if row.grad is None else factor * row.grad for row in rows], case["gradients"]["response"])


def test_the_stub_hands_out_what_it_was_given() -> None:
    batch = token_batch([Tree((3,), ((8, 8),)), Tree((3,), ((8,),))], packed=True, pad_id=0)
    stub = Stub()
    stub.add(3, batch, logprobs=doubles([[-1.0, -2.0], [-3.0]]))
    rows = by_response(stub(batch, frozenset({"logprobs"})).logprobs, batch)
    assert [row.tolist() for row in rows] == [[-1.0, -2.0], [-3.0]]
