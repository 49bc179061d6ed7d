"""Runs as people start them: torchrun and accelerate, a killed rank, two nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.end_to_end.rows import ROWS, SCRATCH, settings, write
from tests.end_to_end.test_ranks import files, rows

pytestmark = pytest.mark.slow

ONCE = '''
import os, signal
from tests.end_to_end.rows import brevity

def score(outputs, topic=None, **columns):
    """Kills the second rank in the second round, once."""
    marker = os.environ["MARKER"]
    if os.environ["RANK"] == "1" and os.path.exists(os.environ["REACHED"]) and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return brevity(outputs, topic)
'''


def arguments(algorithm: str, folder: Path, data: Path, **more: Any) -> list[str]:
    given = settings(
        algorithm,
        folder,
        **{"model.path": None, "model.adapter": None, "model.scratch": SCRATCH, "train.save_every": 1, **more},
    )
    given = {"data.path": str(data), **given}
    return ["train", algorithm, *(f"{key}={json.dumps(value)}" for key, value in given.items())]


def launch(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH"), environment.pop("PYTHONPATH", "")]))
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": paths, **environment}
    )


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def test_under_torchrun_a_killed_rank_is_started_again_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["ppo"])
    (tmp_path / "killing.py").write_text(ONCE)

    def train(name: str, marker: Path) -> subprocess.CompletedProcess[str]:
        given = arguments("ppo", tmp_path / name, data, **{"ppo.reward": "killing:score"})
        return launch(
            *(*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "fairlead", *given),
            PYTHONPATH=str(tmp_path),
            MARKER=str(marker),
            REACHED=str(tmp_path / name / "ppo" / "rounds" / "000" / "round.json"),
        )

    (tmp_path / "known").touch()
    whole, killed = train("whole", tmp_path / "known"), train("killed", tmp_path / "marker")
    assert whole.returncode == 0, whole.stderr
    assert killed.returncode == 0, killed.stderr
    assert (tmp_path / "marker").exists() and "died: no word of why" in killed.stderr
    assert whole.stdout.count("finished after 4 steps") == 1
    expected, found = files(tmp_path / "whole" / "ppo"), files(tmp_path / "killed" / "ppo")
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_two_nodes_make_the_run_of_one(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["dpo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = arguments("dpo", tmp_path / "two", data)
    common = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "fairlead-test")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    nodes = [
        subprocess.Popen(
            [
                *(*TORCHRUN, *common, "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", f"127.0.0.{node + 1}"),
                *("-m", "fairlead", *given),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for node in range(2)
    ]
    told = [node.communicate(timeout=400) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    alone = launch(sys.executable, "-m", "fairlead", *arguments("dpo", tmp_path / "one", data))
    assert alone.returncode == 0, alone.stderr
    for got, wanted in zip(rows(tmp_path / "two" / "dpo"), rows(tmp_path / "one" / "dpo"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5, nan_ok=True)


def test_accelerate_starts_it_too(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["sft"])
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    done = launch(*launcher, "--module", "fairlead", *arguments("sft", tmp_path, data))
    assert done.returncode == 0, done.stderr
    checkpoint = max((tmp_path / "sft" / "checkpoints").iterdir())
    assert json.loads((checkpoint / "manifest.json").read_text())["ranks"] == 2
    assert load_file(tmp_path / "sft" / "model" / "model.safetensors")
