"""Little models and rows for the checks: rows of several blocks of attention, windows shorter than them, caps that bend
the scores, and heads wide enough for fused kernels."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.sizes import tokenizer
from torch import Tensor

from fairlead.data.render import Tree
from fairlead.models.load import prepare
from fairlead.models.roles import Models
from fairlead.types import TokenBatch

VOCABULARY = 512
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "attention_dropout": 0.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 96},
    "gemma2": {
        **LLAMA,
        "sliding_window": 96,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    },
}
DRAWN = 0.15
"""Standard deviation of the weights: scores and logits of about one."""


@functools.cache
def words() -> Any:
    return tokenizer(VOCABULARY)


def drawn(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """On the CPU; equal weights at every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(numbers * (DRAWN if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    return model


def policy(
    family: str,
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    way: str = "auto",
    kernel: str = "none",
    **more: Any,
) -> Models:
    """The role ``policy``; ``more`` goes to `Models`."""
    base = prepare(drawn(family, dtype), words(), None, torch.device(device), way=way, kernel=kernel)
    return Models(base, ("policy",), **more)


def trees(shared: bool = True) -> list[Tree]:
    """Of about 1,450 tokens; not ``shared``: each response with a prompt of its own, 2,170 tokens."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    made = [
        Tree(ids(210), (ids(150), ids(37), ids(260))),
        Tree(ids(3), (ids(90), ids(1))),
        Tree((), (ids(140),)),
        Tree(ids(300), (ids(129), ids(128))),
    ]
    return made if shared else [Tree(tree.prompt, (each,)) for tree in made for each in tree.responses]


def gradients_of(models: Models, batch: TokenBatch) -> tuple[float, dict[str, Tensor]]:
    """A loss that weighs every counted token of every response by a number of its own, and its gradients."""
    from fairlead.data.pack import by_response

    batch = batch.to(models.device)
    with models.use("policy"):
        outputs = models(batch, frozenset({"logprobs", "entropy"}))
        found = torch.cat(by_response(outputs.logprobs, batch)), torch.cat(by_response(outputs.entropy, batch))
        generator = torch.Generator().manual_seed(2)
        pull = torch.randn(2, len(found[0]), generator=generator, dtype=torch.float64).to(models.device)
        loss = (torch.stack(found).double() * pull).sum() / len(found[0])
        loss.backward()
    taken = {name: p.grad.detach().clone() for name, p in models.trainable.items() if p.grad is not None}
    for parameter in models.trainable.values():
        parameter.grad = None
    return float(loss.detach()), taken


def largest(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest ||difference|| / ||wanted|| of any tensor; infinite where one is missing."""
    if got.keys() != wanted.keys():
        return float("inf")
    return max(
        float((got[n].detach().double() - each).norm() / each.norm().clamp(min=1e-30))
        for n, each in ((n, t.detach().double()) for n, t in wanted.items())
    )


def relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(other), 1e-12)


# --- runs ----------------------------------------------------------------------------------------------------------


def job(work: Path, device: str, mode: str) -> dict[str, Any]:
    """What `training.recipe` asks for, on a little Llama that is saved once; rows are those of the tiny size."""
    base = work / "base"
    if not base.is_dir():
        drawn("llama").save_pretrained(base)
        words().save_pretrained(base)
    return {"size": "tiny", "work": str(work), "device": device, "mode": mode}


def trained(recipe: Mapping[str, Any], name: str, **sections: Mapping[str, Any]) -> Any:
    """A whole run, written to its directory, with settings of its own."""
    import fairlead

    merged = dict(recipe)
    for section, values in ({"run": {"name": name}} | sections).items():
        merged[section] = {**merged.get(section, {}), **values}
    return fairlead.train(merged)


def logged(result: Any, metric: str = "loss") -> list[float]:
    """A metric at each step of a run."""
    rows = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    return [row[metric] for row in rows if metric in row]
