"""Whole runs by `fairlead.train`, with all they write: precision, quantised bases, every stage beside the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu import little, rollouts
from benchmarks.gpu.checks import Found, Place, Skipped
from benchmarks.gpu.formulas import FULL, LORA
from benchmarks.gpu.sizes import SIZES, Rows, write_rows
from benchmarks.gpu.training import recipe

TINY = SIZES["tiny"]
FAST = {"learning_rate": 1e-3}
STEPS = 8
EXACT = {"dtype": "float32"}


def _sft(place: Place, mode: str) -> dict[str, Any]:
    place.work.mkdir(parents=True, exist_ok=True)
    rows = write_rows(place.work / "demonstrations.jsonl", Rows(TINY).demonstrations())
    job = little.job(place.work, place.device, mode)
    return recipe("sft", job, rows, optim=FAST, train={"steps": STEPS, "batch_size": TINY.load.demonstrations})


def apart(got: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest difference at a step, as a share of the loss, or of 1 where the loss is smaller."""
    if len(got) != len(wanted):
        return float("inf")
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(got, wanted, strict=True))


def precision(place: Place) -> Iterator[Found | Skipped]:
    """Losses of a run in half precision against those in fp32; with float16, whether its scaled losses overflowed."""
    exact = little.logged(little.trained(_sft(place, FULL), "fp32", model=EXACT))
    half = little.trained(_sft(place, FULL), "fp16", model={"dtype": "float16"})
    skipped = int(little.logged(half, "skipped_steps")[-1])
    note = f"{skipped} steps skipped, losses scaled by {little.logged(half, 'loss_scale')[-1]:g} in the end"
    losses = little.logged(half)
    yield Found("float16 with scaled losses, before a step is skipped", apart(losses[:1], exact[:1]), 0.01, note)
    if skipped:
        yield Skipped("float16 with scaled losses, all steps", f"{note}: a skipped step is not taken back")
    else:
        yield Found("float16 with scaled losses, all steps", apart(losses, exact), 0.02, note)
    if place.on_gpu:
        auto = little.logged(little.trained(_sft(place, FULL), "auto", model={"dtype": "auto"}))
        yield Found("fp32 weights under bf16 autocast", apart(auto, exact), 0.02)
    else:
        yield Skipped("fp32 weights under bf16 autocast", "needs CUDA")
    adapter = little.logged(little.trained(_sft(place, LORA), "lora fp32", model=EXACT))
    base = little.logged(little.trained(_sft(place, LORA), "lora bf16", model={"dtype": "bfloat16"}))
    yield Found("bf16 base under an fp32 adapter", apart(base, adapter), 0.02)


def quantised(place: Place) -> Iterator[Found | Skipped]:
    """Adapters on a base in 8 and 4 bits: the first loss beside that of the base in fp32, and whether it learns."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Skipped("8bit and 4bit", "bitsandbytes is not installed")
        return
    exact = little.logged(little.trained(_sft(place, LORA), "not quantised", model=EXACT))
    for bits, bound in (("8bit", 0.02), ("4bit", 0.1)):
        found = little.logged(little.trained(_sft(place, LORA), bits, model={"quantize": bits}))
        yield Found(f"{bits}: first loss", apart(found[:1], exact[:1]), bound)
        yield Found(f"{bits}: last loss, of the first", found[-1] / found[0], 0.999)


def stages(place: Place) -> Iterator[Found | Skipped]:
    """Losses of every stage in fp32 on the device against the same stage on the CPU."""
    if not place.on_gpu:
        yield Skipped("all stages", "needs CUDA")
        return
    for name, made in _stages(place).items():
        runs = [
            little.trained(made(), f"{name} on {where}", model={**EXACT, "device": device})
            for where, device in (("the device", place.device), ("the CPU", "cpu"))
        ]
        got, wanted = map(little.logged, runs)
        yield Found(name, apart(got, wanted), 1e-3, f"{len(got)} steps")


def _stages(place: Place) -> Mapping[str, Callable[[], dict[str, Any]]]:
    full, lora = (little.job(place.work, place.device, mode) for mode in (FULL, LORA))
    rows = {
        "texts": write_rows(place.work / "texts.jsonl", Rows(TINY).texts()),
        "pairs": write_rows(place.work / "pairs.jsonl", Rows(TINY).pairs()),
        "prompts": write_rows(place.work / "prompts.jsonl", Rows(TINY).prompts(8)),
    }

    def made(algorithm: str, kind: str, job: dict[str, Any], **more: Any) -> Callable[[], dict[str, Any]]:
        return lambda: recipe(algorithm, job, rows[kind], optim=FAST, train={"steps": 4, "batch_size": 4}, **more)

    ppo = {"reward": str(rollouts.trained_reward(lora)), "rollout_size": 8, "epochs": 2, "max_new_tokens": 8}
    return {
        "pretrain": made("pretrain", "texts", full, data={"max_length": TINY.load.row}),
        "sft": lambda: _sft(place, FULL),
        "reward": made("reward", "pairs", full),
        "dpo": made("dpo", "pairs", full),
        "dpo, adapter": made("dpo", "pairs", lora),
        "ppo, adapter": made("ppo", "prompts", lora, ppo=ppo),
        "ppo, all weights": made("ppo", "prompts", full, ppo=ppo),
    }
