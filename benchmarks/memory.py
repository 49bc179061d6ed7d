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
import importlib
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fairlead
from fairlead.algorithms import find
from fairlead.assemble import build_models
from fairlead.config import ScratchSection
from fairlead.models.load import build, train_tokenizer
from fairlead.planning.plan import plan_run
from fairlead.runner import resolve

HERE = Path(__file__).resolve().parent
WORDS = ["".join(letters) for letters in itertools.product("bdfgk", "aeiou", "lmnrst")]
LIKED, DISLIKED = WORDS[:75], WORDS[75:]
"""Of these the chosen and the rejected responses are made."""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""Freed tensors go back to the system, in every case."""
ADAPTER = {"rank": 16, "alpha": 32, "dropout": 0.0}
FORMS: dict[str, dict[str, Any]] = {
    "shared": {"model.roles": "shared", "ppo.value": {"trunk": "policy"}},
    "value adapter": {"model.roles": "shared", "ppo.value": {"trunk": "adapter"}},
    "separate": {"model.roles": "separate", "ppo.value": {"trunk": "model"}},
}
STEPS = 2
"""Of the optimizer: the second finds the states the first has made."""


# --- one run, in a process of its own ------------------------------------------------------------------------------


def run(algorithm: str, settings: list[str]) -> dict[str, Any]:
    """Trains, and says what it took, in bytes."""
    warm_up()
    baseline = resident("VmRSS")
    result = fairlead.train(algorithm, settings)
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
    for name in ("peft", "bitsandbytes", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
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
            scales = [] if state is None else [state.absmax, state.code]
            if state is not None and state.nested:
                scales += [state.state2.absmax, state.state2.code, state.offset]
            tensors += [parameter.data, *scales]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def planned(algorithm: str, settings: list[str]) -> dict[str, int]:
    """What `fairlead inspect` says of the run before it: the base's bytes, and all at the worst moment."""
    plan = plan_run(resolve(algorithm, settings).recipe, find(algorithm), build_models)
    base = sum(part.weights for part in plan.parts if part.role in ("base", "policy"))
    return {"base_planned": base, "peak_planned": plan.worst}


def start(algorithm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`run` in a fresh process."""
    pairs = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    # -P: `kernels`, which bitsandbytes asks for, is not the file beside this one
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "run", algorithm, *pairs]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


# --- model and data ------------------------------------------------------------------------------------------------


def pairs(number: int, prompt: int, response: int) -> list[dict[str, str]]:
    """Rows of exactly ``prompt`` and ``response`` tokens, the end of sequence counted."""
    draw = random.Random(0)

    def text(length: int, words: list[str]) -> str:
        return " ".join(draw.choices(words, k=length))

    return [
        {
            "prompt": text(prompt, WORDS),
            "chosen": text(response - 1, LIKED),
            "rejected": text(response - 1, DISLIKED),
        }
        for _ in range(number)
    ]


def write_rows(folder: Path, rows: list[dict[str, str]]) -> dict[str, str]:
    """The rows as each algorithm takes them -> the file of each."""
    folder.mkdir()
    sides = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    written = {
        "reward": rows,
        "sft": [{"prompt": prompt, "response": response} for prompt, response in sides],
        "ppo": [{"prompt": row["prompt"]} for row in rows],
    }
    for name, each in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), "utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in written}


def write_base(folder: Path, rows: list[dict[str, str]], width: int, layers: int) -> int:
    """Saves a random Llama with a tokenizer that knows every word; returns its number of parameters."""
    tokenizer = train_tokenizer((text for row in rows for text in row.values()), 2048, 512)
    for row in rows:
        for name, words in row.items():
            assert len(tokenizer(words).input_ids) == len(words.split()), f"{name} is not one token a word"
    heads = max(1, width // 64)
    scratch = ScratchSection(hidden_size=width, num_layers=layers, num_heads=heads, context_length=512)
    model = build(scratch, tokenizer, 0, torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


# --- the cases -----------------------------------------------------------------------------------------------------


def memory_cases(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = pairs(256, given.length - given.new_tokens, given.new_tokens)
    files = write_rows(folder / "rows", rows)
    number = write_base(folder / "base", rows, given.width, given.layers)
    common = {
        "run.directory": str(folder / "runs"),
        "model.path": str(folder / "base"),
        "model.device": "cpu",
        "model.adapter": ADAPTER,
        "data.template": "plain",
        "data.max_length": given.length,
        "data.eval_fraction": 0,
        "train.steps": STEPS,
        "train.batch_size": 2 * given.tokens // given.length,
        "train.micro_batch_tokens": given.tokens,
        "train.num_samples": 0,
        "tracking.console": False,
    }

    def measured(algorithm: str, name: str, **more: Any) -> list[dict[str, Any]]:
        settings = {**common, "data.path": files[algorithm], **more}
        found: list[dict[str, Any]] = []
        for repeat in range(given.repeats):
            found.append(start(algorithm, {**settings, "run.name": f"{name} {repeat}"}))
            print(f"{name}: {found[-1]['peak'] / 1e6:,.0f} MB, {found[-1]['seconds']:.0f} s", file=sys.stderr)
        return found

    sft = measured("sft", "sft")
    reward = measured("reward", "reward")
    ppo = {
        "model.path": sft[0]["path"],
        "data.max_prompt_length": given.length - given.new_tokens,
        "ppo.reward": reward[0]["path"],
        "ppo.rollout_size": common["train.batch_size"],
        "ppo.rollout_rows": given.tokens // given.length,
        "ppo.epochs": STEPS,
        "ppo.max_new_tokens": given.new_tokens,
    }
    forms = {name: measured("ppo", name, **ppo, **form) for name, form in FORMS.items()}
    nf4 = {"model.quantize": {"bits": 4, "type": "nf4"}}
    forms["nf4"] = measured("ppo", "nf4", **ppo, **FORMS["shared"], **nf4)
    shared, copies = forms["shared"], forms["separate"]
    made = {"parameters": number, "repeats": given.repeats}
    first = "PPO, four roles on one base"
    # both forms begin as the same policy: the first round's responses and scores are the same
    same = abs(shared[0]["scores"][0] - copies[0]["scores"][0]) < 1e-4
    cases = [
        {**made, "case": first, "peer_name": "SFT with LoRA", "limit": 1.25, **peaks(shared, sft)},
        {**made, "case": first, "peer_name": "PPO, four copies", "limit": 0.45, **peaks(shared, copies, same=same)},
        {**made, "case": f"{first}, value adapter", "peer_name": "SFT with LoRA", **peaks(forms["value adapter"], sft)},
        {**made, "case": f"{first} in nf4", "peer_name": f"{first} in fp32", **peaks(forms["nf4"], shared)},
    ]
    for case, found in ((first, shared[0]), (f"{first} in nf4", forms["nf4"][0])):
        held, plan = found["base"], found["base_planned"]
        cases.append(
            {
                **made,
                "case": case,
                "metric": "bytes of the base",
                "unit": "B",
                "ours": held,
                "peer": plan,
                "peer_name": "fairlead inspect",
                "ratio": held / plan,
                "agree": held == plan,
            }
        )
    return cases


def peaks(ours: list[dict[str, Any]], peers: list[dict[str, Any]], *, same: bool = True) -> dict[str, Any]:
    """Both sides agree where they saw as many tokens (responses may end early), and what else is to be the same is."""
    ratios = [one["peak"] / other["peak"] for one, other in itertools.product(ours, peers)]
    mine, theirs = (statistics.median(each["peak"] for each in side) for side in (ours, peers))
    return {
        "metric": "peak memory",
        "unit": "MB",
        "ours": round(mine / 1e6, 1),
        "peer": round(theirs / 1e6, 1),
        "ratio": round(mine / theirs, 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "ours_planned": round(ours[0]["peak_planned"] / 1e6, 1),
        "peer_planned": round(peers[0]["peak_planned"] / 1e6, 1),
        "agree": same and abs(ours[0]["tokens"] / peers[0]["tokens"] - 1) < 0.05,
    }


def score_case(folder: Path, seeds: int, steps: int) -> dict[str, Any]:
    """Tiny runs of both forms from the same model and the same reward: do they learn the same?"""
    files = write_rows(folder / "tiny", pairs(512, 6, 12))
    common = {
        "run.directory": str(folder / "tiny"),
        "threads": 1,
        "model.device": "cpu",
        "data.template": "plain",
        "data.max_length": 24,
        "data.eval_fraction": 0,
        "train.batch_size": 32,
        "train.num_samples": 0,
        "tracking.console": False,
    }
    scratch = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 800, "context_length": 64}
    scratch = {"model.path": None, "model.adapter": None, "model.scratch": scratch, "optim.learning_rate": 1e-2}
    base = start("sft", {**common, **scratch, "data.path": files["sft"], "run.name": "base", "train.steps": 100})
    common |= {"model.path": base["path"], "model.adapter": {"rank": 8, "alpha": 16}, "optim.learning_rate": 3e-3}
    reward = start("reward", {**common, "data.path": files["reward"], "run.name": "reward", "train.steps": 30})
    common |= {
        "data.path": files["ppo"],
        "data.limit": 64,
        "train.steps": steps,
        "ppo.reward": reward["path"],
        "ppo.rollout_size": 64,
        "ppo.epochs": 2,
        "ppo.max_new_tokens": 12,
    }
    scores: dict[str, list[list[float]]] = {"shared": [], "separate": []}
    for seed, form in itertools.product(range(seeds), scores):
        found = start("ppo", {**common, **FORMS[form], "seed": seed, "run.name": f"{form} {seed}"})["scores"]
        scores[form].append(found)
        print(f"tiny, {form}, seed {seed}: {found[0]:.2f} to {last_quarter(found):.2f}", file=sys.stderr)
    ours, peers = ([last_quarter(run) for run in scores[form]] for form in ("shared", "separate"))
    means = statistics.mean(ours), statistics.mean(peers)
    return {
        "case": f"PPO of a tiny model, {steps} steps",
        "metric": "score, mean of the last quarter of the rounds",
        "unit": "score",
        "ours": round(means[0], 3),
        "peer": round(means[1], 3),
        "peer_name": "PPO, four copies",
        "ratio": None,
        "repeats": seeds,
        "ours_seeds": [round(score, 3) for score in ours],
        "peer_seeds": [round(score, 3) for score in peers],
        "first_round": round(statistics.mean(run[0] for run in scores["shared"]), 3),
        "agree": min(peers) <= means[0] <= max(peers) and min(ours) <= means[1] <= max(ours),
    }


def last_quarter(scores: list[float]) -> float:
    return statistics.mean(scores[-max(1, len(scores) // 4) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the hidden states; heads are 64 wide")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="of a row in tokens")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a row, those of its response")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="of the tiny runs whose scores are compared")
    parser.add_argument("--steps", type=int, default=64, help="of these runs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = [score_case(Path(folder), given.seeds, given.steps), *memory_cases(Path(folder), given)]
    for each in cases:
        print(f"{each['case']:45} {each['metric']:20} {each['ours']:>16,} {each['peer']:>16,} {each['ratio']}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    shape = {name: getattr(given, name) for name in ("width", "layers", "tokens", "length", "new_tokens")}
    result = {
        "command": "make bench-memory ARGS=" + repr(" ".join(sys.argv[1:])),
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "environment": ENVIRONMENT,
        "shape": shape | {"adapter": ADAPTER, "steps": STEPS},
        "remark": "Peaks are VmHWM less the resident memory after all imports and a first backward pass.",
        "cases": cases,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(run(sys.argv[2], sys.argv[3:])))
    else:
        main()
