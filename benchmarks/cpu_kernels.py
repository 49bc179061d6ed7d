"""One training step with and without our CPU kernels: CPU seconds, and bytes kept for the backward pass.

    python benchmarks/cpu_kernels.py [--repeats 15] [--out FILE]

Random Llamas in fp32, forward and backward with the chunked head, one thread. Steps of both sides alternate, and CPU
time is compared within each pair, so that a shared machine moves both. Each kind of kernel alone, then all.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fairlead.models import kernels
from fairlead.models.lm_head import head_logprobs

HERE = Path(__file__).parent
SHAPES = {
    "S, 4 x 512 tokens": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4},
    "M, 4 x 512 tokens": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
}
KINDS = {"norm": "RMSNorm", "gated MLP": "MLP", "rotary": "Attention"}


def model(sizes: dict[str, int]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=8192, num_hidden_layers=4, **sizes)
    config.num_key_value_heads = config.num_attention_heads
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def patched(plain: Any, kinds: list[str]) -> Any:
    fast = copy.deepcopy(plain)
    kernels.patch(fast, kernels.OURS)
    for module in fast.modules():
        if "forward" in vars(module) and not any(type(module).__name__.endswith(KINDS[kind]) for kind in kinds):
            del module.__dict__["forward"]
    return fast


def step(network: Any, ids: torch.Tensor) -> tuple[float, int, float]:
    """CPU seconds, bytes kept by the trunk, and the loss."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = network.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    loss = -head_logprobs(network, hidden, ids[:, 1:].flatten())[0].mean()
    loss.backward()
    seconds = time.process_time() - start
    network.zero_grad()
    return seconds, sum(kept.values()), float(loss.detach())


def compare(case: str, plain: Any, fast: Any, ids: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    pairs = [(step(fast, ids), step(plain, ids)) for _ in range(repeats + 2)][2:]
    ratios = sorted(theirs[0] / ours[0] for ours, theirs in pairs)
    agree = all(abs(ours[2] - theirs[2]) <= 1e-6 * theirs[2] for ours, theirs in pairs)
    common = {"case": case, "peer_name": "transformers' modules", "repeats": repeats, "agree": agree}
    ours, theirs = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    speed = {"ours": ours, "peer": theirs, "ratio": statistics.median(ratios)}
    quartiles = {"ratio_low": ratios[len(ratios) // 4], "ratio_high": ratios[-1 - len(ratios) // 4]}
    kept = {"ours": pairs[0][0][1] / 1e6, "peer": pairs[0][1][1] / 1e6, "ratio": pairs[0][0][1] / pairs[0][1][1]}
    return [
        {**common, "metric": "CPU seconds of a step, quartiles", "unit": "s", **speed, **quartiles},
        {**common, "metric": "kept for the backward pass", "unit": "MB", **kept},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kernels.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = []
    for shape, sizes in SHAPES.items():
        plain = model(sizes)
        ids = torch.randint(8192, (4, 512), generator=torch.Generator().manual_seed(0))
        for kinds in ([kind] for kind in KINDS):
            cases += compare(f"{shape}, {kinds[0]} alone", plain, patched(plain, kinds), ids, settings.repeats)
        cases += compare(f"{shape}, all", plain, patched(plain, list(KINDS)), ids, settings.repeats)
        for each in cases[-8:]:
            print(f"{each['case']:36} {each['metric']:34} {each['ours']:9.3f} {each['peer']:9.3f} {each['ratio']:.3f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    result = {
        "command": f"python benchmarks/cpu_kernels.py --repeats {settings.repeats}",
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cases": cases,
    }
    settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
