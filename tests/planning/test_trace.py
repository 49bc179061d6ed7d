"""The working memory that is found without weights, against what real passes keep and what a process really takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import base
from torch.autograd.graph import saved_tensors_hooks

from fairlead.algorithms.terms import nll
from fairlead.config import AdapterSection, ModelSection
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.models.load import Base, prepare
from fairlead.models.roles import Models
from fairlead.planning.plan import META, meta_base
from fairlead.planning.trace import training_peaks
from fairlead.training.loop import backward
from fairlead.types import Pass, Term, TokenBatch

SFT = Pass("policy", (), frozenset({"logprobs"}))
BATCH = token_batch([Tree((), ((0,) * 64,))] * 4, packed=True, pad_id=0)


def without_weights(made: Base, folder: Path) -> Base:
    made.model.config.save_pretrained(folder)
    return meta_base(ModelSection(path=str(folder)), torch.device("cpu"))


def kept_for_real(made: Models, batch: TokenBatch) -> int:
    """Bytes that the trunk's graph holds, each storage once, weights aside; and its output."""
    own = {t.untyped_storage().data_ptr() for t in (*made.parameters(), *made.buffers())}
    held: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # kept alive, so that no address is used again
        return tensor

    with made.use("policy"), saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = made._trunk(made.active_network(), batch)
    held[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage()
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox", "qwen3", "phi"])
@pytest.mark.parametrize("adapter", [None, AdapterSection(rank=4)], ids=["full", "lora"])
def test_activations_are_those_a_real_forward_pass_keeps(architecture: str, adapter: Any, tmp_path: Path) -> None:
    real = base(architecture)
    planned = Models(without_weights(real, tmp_path), ("policy",), adapter=adapter)
    kept = training_peaks(planned, SFT, BATCH).kept
    assert kept == pytest.approx(kept_for_real(Models(real, ("policy",), adapter=adapter), BATCH), rel=0.02)


def test_checkpointing_keeps_one_tensor_a_layer_and_recomputes_one_layer(tmp_path: Path) -> None:
    plain, recomputed = (
        training_peaks(
            Models(
                without_weights(base(num_layers=8, hidden_size=64), tmp_path),
                ("policy",),
                gradient_checkpointing=checkpointing,
            ),
            SFT,
            BATCH,
        )
        for checkpointing in (False, True)
    )
    tokens, hidden = BATCH.input_ids.numel(), 64 * 4
    assert 8 * tokens * hidden <= recomputed.kept <= 13 * tokens * hidden
    assert recomputed.temporaries >= 0.8 * plain.kept / 8
    assert recomputed.kept + recomputed.temporaries < 0.5 * plain.kept


def test_frozen_layers_below_the_first_trained_one_keep_nothing(tmp_path: Path) -> None:
    all_layers = training_peaks(Models(without_weights(base(num_layers=8), tmp_path), ("policy",)), SFT, BATCH).kept
    made = without_weights(base(num_layers=8), tmp_path)
    made.model.requires_grad_(False)
    made.model.model.layers[7].requires_grad_(True)
    assert training_peaks(Models(made, ("policy",)), SFT, BATCH).kept < 0.2 * all_layers


def test_a_loss_that_weighs_all_tokens_alike_is_followed_too(tmp_path: Path) -> None:
    """Whether it does is asked of its gradient, which has no values here."""
    made = Models(without_weights(base(), tmp_path), ("policy",))
    peaks = training_peaks(made, Pass("policy", (), frozenset({"logprobs"}), uniform=True), BATCH)
    assert peaks.kept == training_peaks(made, SFT, BATCH).kept


def test_no_weights_are_made_and_no_gradient_stays(tmp_path: Path) -> None:
    made = Models(without_weights(base(), tmp_path), ("policy", "value"), adapter=AdapterSection(rank=4))
    training_peaks(made, Pass("policy", (), frozenset({"logprobs", "entropy", "values"})), BATCH)
    assert {p.device for p in made.parameters()} == {META}
    assert all(p.grad is None for p in made.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel says no peak of a process")
@pytest.mark.parametrize("mode", ["full", "lora", "checkpointing"])
def test_a_process_takes_what_was_planned(mode: str) -> None:
    """25 million parameters, micro-batches of 2,048 tokens: the plan of a step, gradients in, against the peak of a
    process whose allocator gives freed memory back at once."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.planning.measure", mode],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    planned, measured = map(int, result.stdout.split())
    assert planned == pytest.approx(measured, rel=0.05), (planned, measured)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("adapter", [None, AdapterSection(rank=8)], ids=["full", "lora"])
def test_a_gpu_takes_what_was_planned(adapter: Any, tmp_path: Path) -> None:
    made, device = base(hidden_size=512, num_layers=8, num_heads=8, context_length=512), torch.device("cuda")
    planned = Models(without_weights(made, tmp_path), ("policy",), adapter=adapter)
    models = Models(prepare(made.model, made.tokenizer, None, device), ("policy",), adapter=adapter)
    batch = token_batch([Tree((), ((5,) * 512,))] * 4, packed=True, pad_id=0)
    sft = (Pass("policy", (Term("nll", "token", nll),), frozenset({"logprobs"})),)
    backward(models, sft, [batch])  # gradients are there from now on
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    backward(models, sft, [batch])
    peaks = training_peaks(planned, sft[0], batch)
    measured = torch.cuda.max_memory_allocated(device) - before
    assert peaks.kept + peaks.head + peaks.temporaries == pytest.approx(measured, rel=0.2)
