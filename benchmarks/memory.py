"""Peak memory of PPO with four roles on one base, beside SFT with LoRA and beside four copies of the model.

    make bench-memory                                 300 million parameters
    make bench-memory ARGS="--layers 2 --width 64"    a small one, to see that it runs
    python benchmarks/memory.py run ppo KEY=VALUE...  one run of these: its figures as JSON

Every case is a process of its own that calls `fairlead.train` with a recipe and settings, as a user would. Its figure
is the largest resident memory of the process (VmHWM) less what was resident when all libraries were imported and a
first backward pass was done. The model is random, rows are random words of one token each, so that all cases see rows
of the same length. At the end two tiny runs of PPO are compared by their scores, over some seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORDS = ["".join(letters) for letters in itertools.product("bdfgk", "aeiou", "lmnrst")]
LIKED, DISLIKED = WORDS[:75], WORDS[75:]
"""Of these the chosen and the rejected responses are made."""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""Freed tensors go back to the system, in every case."""
ADAPTER = {"model.adapter": {"rank": 16, "alpha": 32, "dropout": 0.0}}
FORMS: dict[str, dict[str, Any]] = {
    "shared": {"model.roles": "shared", "ppo.value": {"trunk": "policy"}},
    "shared, value adapter": {"model.roles": "shared", "ppo.value": {"trunk": "adapter"}},
    "separate": {"model.roles": "separate", "ppo.value": {"trunk": "model"}},
}
STEPS = 2
TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 800,
    "context_length": 64,
}


# --- one run, in a process of its own ------------------------------------------------------------------------------


def run(algorithm: str, settings: list[str]) -> dict[str, Any]:
    """Trains, and says what it took, in bytes."""
    from fairlead.runner import train

    warm_up()
    baseline = resident("VmRSS")
    result = train(algorithm, settings)
    peak = resident("VmHWM")
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    return {
        "path": str(result.path),
        "imports": baseline,
        "peak": peak - baseline,
        "tokens": result.summary["tokens"],
        "seconds": result.summary["seconds"],
        "scores": [row["objective/scores"] for row in rows if "objective/scores" in row],
        "base": base_bytes(result.model),
        **planned(algorithm, settings),
    }


def warm_up() -> None:
    """Imports whatever a run will, and has torch take its threads and buffers."""
    import importlib.util

    import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import torch
    import transformers.models.llama.modeling_llama

    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(64, 64)).sum().backward()


def resident(field: str) -> int:
    """VmRSS, or VmHWM: the most of it since the process began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def base_bytes(network: Any) -> int:
    """What holds the weights of the base: parameters that are no adapter's, and the scales of quantised ones."""
    tensors: list[Any] = []
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            state = getattr(parameter, "quant_state", None)
            inner = None if state is None else state.state2
            tensors += [parameter.data]
            tensors += [] if state is None else [state.absmax, state.code]
            tensors += [] if inner is None else [inner.absmax, inner.code, state.offset]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def planned(algorithm: str, settings: list[str]) -> dict[str, int]:
    """What `fairlead inspect` says of the run before it: the base's bytes, and all at the worst moment."""
    from fairlead.algorithms import find
    from fairlead.assemble import build_models
    from fairlead.planning.plan import plan_run
    from fairlead.runner import resolve

    plan = plan_run(resolve(algorithm, settings).recipe, find(algorithm), build_models)
    base = sum(part.weights for part in plan.parts if part.role in ("base", "policy"))
    return {"base_planned": base, "peak_planned": plan.worst}


def start(algorithm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`run` in a fresh process."""
    pairs = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, str(Path(__file__).resolve()), "run", algorithm, *pairs]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


# --- model and data ------------------------------------------------------------------------------------------------


def text(draw: random.Random, number: int, words: list[str] = WORDS) -> str:
    return " ".join(draw.choices(words, k=number))


def pairs(number: int, prompt: int, response: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of exactly ``prompt`` and ``response`` tokens, the end of sequence counted."""
    draw = random.Random(seed)
    return [
        {
            "prompt": text(draw, prompt),
            "chosen": text(draw, response - 1, LIKED),
            "rejected": text(draw, response - 1, DISLIKED),
        }
        for _ in range(number)
    ]


def write_rows(folder: Path, rows: list[dict[str, str]]) -> dict[str, str]:
    """Files of the rows as each stage takes them, by algorithm."""
    demonstrations = [{"prompt": row["prompt"], "response": row[side]} for row in rows for side in ("chosen", "rejected")]
    prompts = [{"prompt": row["prompt"]} for row in rows]
    written = {"reward": rows, "sft": demonstrations, "ppo": prompts}
    for name, each in written.items():
        write_jsonl(folder / f"{name}.jsonl", each)
    return {name: str(folder / f"{name}.jsonl") for name in written}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
