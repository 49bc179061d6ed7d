"""Nothing is made on the CPU that belongs beside the model: a step of every algorithm, its sampling and its evaluation
on a device that is not the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fairlead.algorithms import find
from fairlead.assemble import Given, assemble
from fairlead.config import OptimSection
from fairlead.data.pack import token_batch
from fairlead.models.attention import Forest
from fairlead.models.gpu_attention import block_mask
from fairlead.models.load import pick_device
from fairlead.runner import resolve
from fairlead.training.distributed import start
from fairlead.training.loop import Clock, run
from fairlead.training.optim import Optimizer
from fairlead.types import Progress
from tests.elsewhere import ELSEWHERE, Elsewhere, Far, move
from tests.end_to_end.rows import ONLINE, OWN, ROWS, SCRATCH, SETTINGS, brevity
from tests.tiny import TREES, base

RANKED = [
    {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "no idea"], "scores": [3.0, 1.0, 2.0]}
    for row in ROWS["dpo"][::2]
]
ADAPTER = {"model.adapter.rank": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ROWS},
    "sft, noise": ("sft", {"sft.neftune_alpha": 5.0, "sft.loss": "dft", "model.gradient_checkpointing": True}),
    "sft, soft caps": ("sft", {"model.scratch": {**SCRATCH, "architecture": "gemma2"}}),
    "sft, mask written out": ("sft", {"model.attention": "eager", "data.packing": "none"}),
    "reward, members": ("reward", {"reward.members": 3, "reward.rankings": True, "data.path": RANKED}),
    "reward, rankings": ("reward", {"reward.loss": "plackett_luce", "data.path": RANKED}),
    "reward, ratings": ("reward", {"reward.loss": "regression", "data.path": RANKED}),
    "reward, labels": ("reward", {"reward.loss": "binary", "data.path": ROWS["kto"]}),
    "dpo, coupled": ("dpo", {"dpo.loss": {"aot": 1, "aot_unpaired": 1, "sft": 1}, "dpo.label_smoothing": 0.1}),
    "dpo, lengths": ("dpo", {"dpo.ld_alpha": 0.3, "dpo.length": "mean", "dpo.length_penalty": 0.1, **ADAPTER}),
    "dpo, measured": ("dpo", {"dpo.weighting": "wpo", "dpo.measure": ["entropy", "logits"], "dpo.sync_every": 1}),
    "ppo, cut": (
        "ppo",
        {"ppo.top_k": 20, "ppo.top_p": 0.9, "ppo.min_new_tokens": 2, "ppo.entropy_coef": 0.01, "ppo.stop": ["z"],
         "model.scratch": {**SCRATCH, "architecture": "mistral"}},
    ),
    "ppo, sequences": (
        "ppo",
        {"ppo.importance": "sequence", "ppo.loss_over": "sequence", "ppo.kl_estimator": "full", "ppo.dual_clip": 3.0,
         "ppo.value.trunk": "layers", "ppo.value.num_layers": 1},
    ),
    "ppo, adapters": ("ppo", {"ppo.value.trunk": "adapter", "ppo.kl_in": "loss", "ppo.kl_estimator": "k3", **ADAPTER}),
    "raft, priced": ("raft", {"raft.kl_coef": 0.1, "raft.engine": "generate"}),
    "grpo, padded": ("grpo", {"model.scratch": {**SCRATCH, "architecture": "stablelm"}, "grpo.drop": ["unfinished"]}),
}  # fmt: skip
ALIKE = {"grpo", "raft", "reinforce", "rft", "rloo"}
"""On the device they do what others of these do."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in ALIKE)) for case in CASES])
def test_a_step_meets_no_tensor_of_the_cpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows real devices alone
    name, more = CASES[case]
    rows = more.get("data.path", ROWS[name])
    given = {"data": rows, "objects": {"reward": brevity}}
    settings = {**SETTINGS, **OWN.get(name, {}), "optim.name": "sgd", "train.steps": 1, "model.scratch": SCRATCH}
    if name in ONLINE:
        settings |= {f"{name}.rollout_size": 4, f"{name}.max_new_tokens": 5}
    if "model.adapter.rank" in more:
        settings["model.scratch"] = None
        given |= {"model": base(num_layers=1).model, "tokenizer": base().tokenizer}
    settings |= {**more, "data.path": None}
    recipe, algorithm = resolve({"algorithm": name}, settings).recipe, find(name)
    stage, _ = assemble(recipe, algorithm, Given(**given), tmp_path)
    seen = _Seen()
    with Elsewhere():
        move(stage.models)
        stage.models.exchanged()
        assert stage.models.device == ELSEWHERE
        source, measure = algorithm.source(stage), algorithm.evaluation(stage)
        optimizer = Optimizer(recipe.optim, stage.models.trainable, source.num_steps)
        run(
            stage.models,
            algorithm.passes(recipe.settings),
            source,
            optimizer,
            [seen],
            Clock(),
            seed=0,
            measure=lambda step: measure() if step else {},
        )
    (metrics,) = seen.metrics
    assert metrics["grad_norm"] > 0
    assert any(key.startswith("eval/") for key in metrics)


class _Seen:
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def after_step(self, progress: Progress) -> None:
        self.metrics.append(dict(progress.metrics))

    def close(self) -> None: ...


def test_masks_lie_beside_the_rows() -> None:
    with Elsewhere():
        batch = token_batch(TREES, packed=True, pad_id=0).to(ELSEWHERE)
        for window in (None, 5):
            made = block_mask(batch.subtree_end, batch.position_ids, window)
            assert isinstance(made.kv_indices, Far) and isinstance(made.full_kv_indices, Far)
            forest = Forest.of(batch)
            index = torch.arange(batch.input_ids.shape[1], device=ELSEWHERE)
            zero = torch.zeros((), dtype=torch.long, device=ELSEWHERE)
            seen = made.mask_mod(zero, zero, index[:, None], index[None])
            assert bool((seen == forest.dense(window)[0, 0]).all())
        assert forest.shared and isinstance(forest.varlen.queries, Far) and isinstance(forest.varlen.key_ends, Far)


def test_cuda_is_the_gpu_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda:3", "cuda:3", "cuda:1"]


@pytest.mark.parametrize(("name", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_gpu_that_is_named_is_the_current_one(
    name: str, current: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is measured, and some kernels are started, on the current one."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(str(device)))
    monkeypatch.setenv("WORLD_SIZE", "1")
    with start(torch.device(name), 1.0):
        assert found == current


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_the_states_of_an_optimizer_are_read_to_where_they_belong(name: str) -> None:
    """A counter stays on the CPU, which reads it at every step."""
    settings = OptimSection.model_validate({"name": name})
    with Elsewhere():
        far = nn.Parameter(torch.ones(4, 3).to(ELSEWHERE))
        first, second = (Optimizer(settings, {"weight": far}, 3) for _ in range(2))
        far.grad = torch.full_like(far, 0.5)
        first.step(1)
        second.load_tensors({key: value.cpu() for key, value in first.tensors().items()})
        for key, value in second.tensors().items():
            assert isinstance(value, Far) == (not key.endswith("|step"))


def test_tensors_of_two_devices_are_found() -> None:
    with Elsewhere():
        far = torch.tensor([1.0, 2.0], device=ELSEWHERE)
        assert isinstance(far, Far) and (far * torch.tensor(2.0)).tolist() == [2.0, 4.0]
        assert torch.zeros(2).copy_(far).tolist() == far.cpu().tolist() == [1.0, 2.0]
        near = torch.ones(2)
        wrong = (
            lambda: far + near,
            lambda: near * far.sum(),
            lambda: torch.where(near > 0, far, 0.0),
            lambda: torch.stack([far.sum(), torch.tensor(1.0)]),
            lambda: near.index_add(0, torch.tensor([0, 1], device=ELSEWHERE), near),
            lambda: near[far > 1],
        )
        for each in wrong:
            with pytest.raises(RuntimeError, match="two devices"):
                each()
