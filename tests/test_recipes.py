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
GPT_NEO = 2_651_307_520
"""Parameters of GPT-Neo-2.7B."""


def lora(rank: int, matrices: int, width: int, layers: int) -> int:
    return layers * matrices * 2 * rank * width


FULL_SIZE: list[tuple[str, str, int, int]] = [
    ("imdb-sentiment-opt-1.3b", "opt-1.3b", 262_144, 2048 + 1),
    ("stack-llama/sft", "llama-2-7b", lora(16, 2, WIDTH, LAYERS), 0),
    ("stack-llama/reward", "llama-2-7b", lora(8, 2, WIDTH, LAYERS), WIDTH),
    ("stack-llama/ppo", "llama-2-7b", lora(16, 2, WIDTH, LAYERS), WIDTH + 1),
    ("stack-llama/dpo", "llama-2-7b", lora(8, 3, WIDTH, LAYERS), 0),
    ("dpo-qlora-llama2", "llama-2-7b", lora(8, 2, WIDTH, LAYERS), 0),
    ("raft/sft", "gpt-neo-2.7b", GPT_NEO, 0),
    ("raft/align", "gpt-neo-2.7b", GPT_NEO, 0),
    ("raft/reward", "gpt-neo-2.7b", 32 * 8 * (4 * 2 * 2560 + 2 * (2560 + 4 * 2560)), 2560),
    ("raft/reward", "llama-2-7b", 32 * 8 * (4 * 2 * WIDTH + 3 * (WIDTH + 11008)), WIDTH),
]
"""Recipe, shape, parameters that are trained, and those of the head besides."""


def on_shape(name: str, shape: str) -> Recipe:
    """The recipe without what lies on a disk."""
    overrides: dict[str, Any] = {"model.path": shape, "model.device": "cpu"}
    algorithm = resolve(name).recipe.algorithm
    return resolve(name, overrides | ({f"{algorithm}.reward": None} if algorithm in ("ppo", "raft") else {})).recipe


@pytest.mark.parametrize(
    ("name", "shape", "trained", "head"), FULL_SIZE, ids=[f"{row[0]} {row[1]}" for row in FULL_SIZE]
)
def test_a_full_size_recipe_trains_what_its_source_trained(name: str, shape: str, trained: int, head: int) -> None:
    recipe = on_shape(name, shape)
    cpu = torch.device("cpu")
    base = meta_base(recipe.model, cpu)
    with META:
        models = build_models(recipe, find(recipe.algorithm), base, cpu)
    heads = sum(p.numel() for key, p in models.trainable.items() if key.startswith("heads."))
    assert (sum(p.numel() for p in models.trainable.values()) - heads, heads) == (trained, head)


def test_the_stages_of_stack_llama_share_one_template() -> None:
    stages = {name: resolve(f"stack-llama/{name}").recipe for name in ("sft", "reward", "ppo", "dpo")}
    assert {recipe.data.template for recipe in stages.values()} == {"question-answer"}
    assert {recipe.run.directory for recipe in stages.values()} == {"runs/stack-llama"}
    merged = {stages[name].model.path for name in ("reward", "ppo", "dpo")}
    assert merged == {"runs/stack-llama/sft-merged"}  # one base, so that the reward stands on the policy's
    assert stages["ppo"].settings.reward == "runs/stack-llama/reward"


def test_the_stages_of_raft_have_the_settings_of_their_source() -> None:
    sft, reward, align = (resolve(f"raft/{name}").recipe for name in ("sft", "reward", "align"))
    assert {recipe.data.template for recipe in (sft, reward, align)} == {"hash"}
    assert reward.model.path == align.model.path == "runs/raft/sft"
    assert align.settings.reward == "runs/raft/reward"
    rates = [recipe.optim.learning_rate for recipe in (sft, reward, align)]
    assert (rates, align.optim.schedule) == ([2e-5, 3e-5, 2e-5], "constant")
    own = align.settings
    assert (own.rollout_size, own.keep / own.num_samples, own.collect) == (1024, 0.125, "local")
    assert align.train.steps == 20 * own.epochs * own.rollout_size // align.train.batch_size
    assert (own.epochs, own.temperature, align.data.max_prompt_length) == (4, 0.85, 256)
    assert own.plateau is None  # all of its 20 rounds


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [row[:2] for row in FULL_SIZE], ids=[row[0] for row in FULL_SIZE])
def test_a_full_size_recipe_can_be_planned(name: str, shape: str) -> None:
    recipe = on_shape(name, shape)
    plan = plan_run(recipe, find(recipe.algorithm), build_models)
    assert plan.untraced is None and plan.step is not None
    assert plan.step.tokens <= recipe.train.tokens_or_default
