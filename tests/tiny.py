"""Tiny models and trees for tests: random weights, a tokenizer trained on two sentences, seconds to build."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fairlead.config import AdapterSection, ScratchSection
from fairlead.data.render import Tree
from fairlead.models.load import Base, build, prepare, train_tokenizer
from fairlead.models.roles import Models

CPU = torch.device("cpu")
TREES = [
    Tree(tuple(range(3, 14)), ((20, 21, 22, 1), tuple(range(30, 41)))),
    Tree((5, 6, 7), ((8, 9, 1), (8, 4, 5, 6, 1), (9,))),
    Tree((), ((5, 6, 7, 8),)),
]
"""A prompt with two answers, one with three, and a text."""


def separate(trees: list[Tree]) -> list[Tree]:
    """Every response with a prompt of its own."""
    return [Tree(tree.prompt, (response,)) for tree in trees for response in tree.responses]


@functools.cache
def tokenizer() -> Any:
    return train_tokenizer(["Question: why does the lamp flicker?\n\nAnswer: the fuse is loose."] * 20, 300, 256)


def base(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Base:
    wanted = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 300, "context_length": 256} | sizes
    scratch = ScratchSection(architecture=architecture, **wanted)  # pyright: ignore[reportArgumentType]
    return prepare(build(scratch, tokenizer(), seed, dtype), tokenizer(), None, CPU)


def models(
    roles: tuple[str, ...],
    *,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    lora: bool = False,
    spread: float = 0.05,
    **options: Any,
) -> Models:
    """Roles on a tiny base whose trainable weights are random, adapters and heads included."""
    adapter = AdapterSection(rank=4) if lora else None
    made = Models(base(architecture, dtype), roles, adapter=adapter, **options)
    if lora:
        scatter(made, spread)
    return made


def scatter(made: Models, spread: float = 0.05, seed: int = 1) -> None:
    """Random trainable weights, equal for equal names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.trainable.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)


def gradients(made: Models) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in made.trainable.items() if parameter.grad is not None}


def relative_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest ||difference|| / ||wanted|| over tensors; key biases aside, which softmax cannot see: rounding alone."""
    assert got.keys() == wanted.keys()
    seen = [name for name in wanted if not name.endswith("k_proj.bias") and float(wanted[name].norm()) > 0]
    assert all(float(got[name].norm()) == 0 for name in wanted if float(wanted[name].norm()) == 0)
    return max(float((got[n] - wanted[n]).norm() / wanted[n].norm()) for n in seen)
