"""Checkpoints of any content: what was saved, or an error that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from fairlead.config import OptimSection
from fairlead.errors import CheckpointError
from fairlead.training.checkpoint import RunState, newest
from fairlead.training.loop import Clock
from fairlead.training.optim import Optimizer
from tests.fuzz.hostile import bytes_near, nothing_outside, told, tried, values

FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")


def _state() -> RunState:
    parameters = {"weight": nn.Parameter(torch.ones(3, 2)), "bias": nn.Parameter(torch.zeros(2))}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = Optimizer(OptimSection(), parameters, 10)
    optimizer.step(1)
    return RunState(parameters, optimizer, {"clock": Clock(3, 4, 5.0)})


def test_any_bytes_in_a_checkpoint_are_noticed(times: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "step-000003"
    _state().save(whole, 3)
    samples = {name: (whole / name).read_bytes() for name in FILES}
    folder = tmp_path / "checkpoints" / "step-000003"
    damaged = st.sampled_from(FILES).flatmap(lambda name: st.tuples(st.just(name), bytes_near(samples[name])))

    @tried(60 * times, damaged)
    def holds(found: tuple[str, bytes]) -> None:
        name, content = found
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(content)
        said: list[str] = []
        with told(), nothing_outside(folder.parent):
            kept = newest(folder.parent, said.append)
            assert kept is not None or said or content == samples[name]
            if kept is not None:
                _state().load(kept)
        if name != "manifest.json":  # where its checksum is that of these bytes
            with told(), nothing_outside(folder.parent):
                _state().load(folder)


def test_any_state_is_taken_or_refused(times: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000003"
    _state().save(folder, 3)
    parts = st.dictionaries(st.sampled_from(["clock", "step", "tokens", "seconds"]), values, max_size=3)

    @tried(100 * times, values | parts | parts.map(lambda part: {"clock": part}))
    def holds(state: Any) -> None:
        (folder / "state.json").write_text(json.dumps(state))
        with told(), nothing_outside(folder.parent):
            _state().load(folder)


def test_a_checkpoint_that_lacks_a_part_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    _state().save(tmp_path / "step-000003", 3)
    (tmp_path / "step-000003" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"clock(.|\n)*hint:"):
        _state().load(tmp_path / "step-000003")
