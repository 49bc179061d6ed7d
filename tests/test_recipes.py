"""The recipes of the sources' jobs at full size: their models, built without weights, train what the sources did."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairlead.algorithms import find
from fairlead.assemble import build_models
from fairlead.config import Recipe
from fairlead.planning.plan import META, meta_base, plan_run
from fairlead.runner import resolve

WIDTH, LAYERS = 4096, 32
"""Of LLaMA-7B, and of Llama-2-7B, whose shape comes with Fairlead."""


def lora(rank: int, matrices: int, width: int, layers: int) -> int:
    return layers * matrices * 2 * rank * width


FULL_SIZE: list[tuple[str, str, int, int]] = [
    ("imdb-sentiment-opt-1.3b", "opt-1.3b", 262_144, 2048 + 1),
    ("stack-llama/sft", "llama-2-7b", lora(16, 2, WIDTH, LAYERS), 0),
    ("stack-llama/reward", "llama-2-7b", lora(8, 2, WIDTH, LAYERS), WIDTH),
    ("stack-llama/ppo", "llama-2-7b", lora(16, 2, WIDTH, LAYERS), WIDTH + 1),
    ("stack-llama/dpo", "llama-2-7b", lora(8, 3, WIDTH, LAYERS), 0),
    ("dpo-qlora-llama2", "llama-2-7b", lora(8, 2, WIDTH, LAYERS), 0),
]
"""Recipe, shape, parameters of the adapter, parameters of the head."""


def on_shape(name: str, shape: str) -> Recipe:
    """The recipe without what lies on a disk."""
    overrides: dict[str, Any] = {"model.path": shape, "model.device": "cpu"}
    algorithm = resolve(name).recipe.algorithm
    return resolve(name, overrides | ({"ppo.reward": None} if algorithm == "ppo" else {})).recipe


@pytest.mark.parametrize(("name", "shape", "adapter", "head"), FULL_SIZE, ids=[row[0] for row in FULL_SIZE])
def test_a_full_size_recipe_trains_what_its_source_trained(name: str, shape: str, adapter: int, head: int) -> None:
    recipe = on_shape(name, shape)
    cpu = torch.device("cpu")
    base = meta_base(recipe.model, cpu)
    with META:
        models = build_models(recipe, find(recipe.algorithm), base, cpu)
    heads = sum(p.numel() for key, p in models.trainable.items() if key.startswith("heads."))
    assert (sum(p.numel() for p in models.trainable.values()) - heads, heads) == (adapter, head)


def test_the_stages_of_stack_llama_share_one_template() -> None:
    stages = {name: resolve(f"stack-llama/{name}").recipe for name in ("sft", "reward", "ppo", "dpo")}
    assert {recipe.data.template for recipe in stages.values()} == {"question-answer"}
    assert {recipe.run.directory for recipe in stages.values()} == {"runs/stack-llama"}
    merged = {stages[name].model.path for name in ("reward", "ppo", "dpo")}
    assert merged == {"runs/stack-llama/sft-merged"}  # one base, so that the reward stands on the policy's
    assert stages["ppo"].settings.reward == "runs/stack-llama/reward"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [row[:2] for row in FULL_SIZE], ids=[row[0] for row in FULL_SIZE])
def test_a_full_size_recipe_can_be_planned(name: str, shape: str) -> None:
    recipe = on_shape(name, shape)
    plan = plan_run(recipe, find(recipe.algorithm), build_models)
    assert plan.untraced is None and plan.step is not None
    assert plan.step.tokens <= recipe.train.tokens_or_default
