"""What happens when memory runs out, or what fits is asked for, or a run ceases to become better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.rows import ROWS, SCRATCH, settings

import fairlead
from fairlead.algorithms import find
from fairlead.assemble import build_models
from fairlead.errors import TrainingError
from fairlead.models.roles import Models
from fairlead.planning.plan import plan_run, with_budget
from fairlead.runner import resolve
from fairlead.training.budget import TokenBudget, is_out_of_memory
from fairlead.training.patience import Patience
from fairlead.types import Progress


def run(folder: Path, **more: Any) -> Path:
    given = settings("dpo", folder, **{"model.scratch": SCRATCH, "data.eval_fraction": 0, **more})
    return fairlead.train({"algorithm": "dpo"}, given, data=ROWS["dpo"]).path


def limited(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Models whose training forward takes no more than so many tokens."""
    plain, sizes = Models.forward, list[int]()

    def forward(self: Models, batch: Any, *more: Any, **others: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(batch.num_tokens)
            if batch.num_tokens > tokens:
                raise error
        return plain(self, batch, *more, **others)

    monkeypatch.setattr(Models, "forward", forward)
    return sizes


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce] DefaultCPUAllocator: not enough memory"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_step_for_which_memory_runs_out_is_done_again_in_smaller_parts(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(tmp_path / "whole")
    sizes = limited(monkeypatch, 100, error)
    got = run(tmp_path / "halved")
    assert max(sizes) > 100 and max(sizes[-4:]) <= 100
    notes = json.loads((got / "manifest.json").read_text())["notes"]
    (note,) = [note for note in notes if note.startswith("memory ran out in step 1: forward passes of ")]
    tokens = int(note.split()[9])
    assert tokens < 256
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (wanted, got)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    state = json.loads((got / "checkpoints" / "step-000004" / "state.json").read_text())
    assert (state["budget"]["tokens"], set(state["budget"]["halved"])) == (tokens, {1})


def test_what_fits_nowhere_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 3, ERRORS[0])
    with pytest.raises(TrainingError, match=r"step 1: memory ran out in a forward pass of \d+ tokens, which cannot be"):
        run(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 17.75 GB)",
    ],
)
def test_want_of_memory_is_known_by_what_is_said_of_it(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(MemoryError())
    budget = TokenBudget(40)
    assert (budget.halve(3), budget.tokens, budget.halve(4), budget.halved) == (True, 20, False, [3])


def test_auto_takes_what_the_plan_says_will_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = resolve(
        {"algorithm": "sft", "model": {"scratch": {**SCRATCH, "context_length": 4096}}},
        {"train.micro_batch_tokens": "auto", "data.max_length": 128},
    ).recipe
    algorithm = find("sft")
    from fairlead.planning import memory

    for free in (200e6, 2e9):
        monkeypatch.setattr(memory, "available", lambda _, free=free: (int(free), int(3e10)))
        found = plan_run(recipe, algorithm, build_models)
        assert found.micro_batch_tokens % 128 == 0
        assert found.worst <= 0.85 * free
        double = plan_run(with_budget(recipe, 2 * found.micro_batch_tokens), algorithm, build_models)
        assert double.worst > 0.8 * free or found.micro_batch_tokens == 65536
    given = settings("sft", tmp_path, **{"model.scratch": SCRATCH, "train.micro_batch_tokens": "auto"})
    path = fairlead.train({"algorithm": "sft"}, given, data=ROWS["sft"]).path
    assert json.loads((path / "manifest.json").read_text())["micro_batch_tokens"] >= 48


def test_a_run_ends_when_it_has_not_become_better_for_so_long(tmp_path: Path) -> None:
    more = {"model.scratch": SCRATCH, "train.steps": 30, "train.eval_every": 1, "train.patience": 3}
    given = settings("sft", tmp_path, **{**more, "optim.learning_rate": 0.5, "optim.schedule": "constant"})
    result = fairlead.train({"algorithm": "sft"}, given, data=ROWS["sft"])
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in rows]
    best = losses.index(min(losses))
    assert len(losses) - 1 - best == 3 and result.summary["status"] == "finished"
    assert result.summary["steps"] == best + 3 < 30


def test_patience_begins_anew_at_every_best_value() -> None:
    patience = Patience("eval/accuracy", 2)
    over: list[bool] = []
    for step, value in enumerate([0.5, 0.4, 0.6, 0.6, 0.5]):
        patience.after_step(Progress(step, 9, {"eval/accuracy": value}, 0, 0.0))
        over.append(patience.is_over)
    assert over == [False, False, False, False, True]
    again = Patience("eval/accuracy", 2)
    again.load_state_dict(patience.state_dict())
    assert again.is_over
