"""DPO on a task small enough to be solved by hand: preferences of a known reward over a few responses, every pair in
the proportion in which the Bradley-Terry model prefers it."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CPU, base, tokenizer

import fairlead
from fairlead.data.render import Renderer
from fairlead.models.load import prepare
from fairlead.models.roles import Models
from fairlead.rollout.experience import measure_tokens
from fairlead.types import Preference

PROMPTS = ("one two three", "four five six")
RESPONSES = ("red", "green", "blue")
REWARDS = {PROMPTS[0]: (0.0, math.log(3), math.log(9)), PROMPTS[1]: (math.log(9), 0.0, math.log(3))}
COPIES = 20


def rows() -> list[dict[str, str]]:
    """Of each pair 20 rows: 15 to 5 where the rewards differ by log 3, 18 to 2 where by log 9."""
    found: list[dict[str, str]] = []
    for prompt in PROMPTS:
        for i, j in itertools.combinations(range(3), 2):
            share = 1 / (1 + math.exp(REWARDS[prompt][j] - REWARDS[prompt][i]))
            first = round(COPIES * share)
            assert first == pytest.approx(COPIES * share)
            for number in range(COPIES):
                won, lost = (i, j) if number < first else (j, i)
                found.append({"prompt": prompt, "chosen": RESPONSES[won], "rejected": RESPONSES[lost]})
    return found


def log_ratios(start: Any, trained: Any, words: Any) -> list[list[float]]:
    """log(policy / start) of each response to each prompt."""
    renderer = Renderer(words, template="question-answer", max_length=64)
    pairs = [Preference(prompt, RESPONSES[i], RESPONSES[(i + 1) % 3]) for prompt in PROMPTS for i in range(3)]
    trees, _, _ = renderer.trees(pairs)
    sums: list[list[float]] = []
    for model in (trained, start):
        made = Models(prepare(model, words, None, CPU), ("policy",))
        rows = measure_tokens(made, trees, temperature=1.0, budget=4096)["behaviour_logprobs"]
        sums.append([float(row.sum()) for row in rows[::2]])
    ratios = [after - before for after, before in zip(*sums, strict=True)]
    return [ratios[:3], ratios[3:]]


# what c - r is at the optimum, of a pair with win probability p
OPTIMA: dict[str, tuple[dict[str, Any], Any]] = {
    "sigmoid": ({}, lambda p, beta: math.log(p / (1 - p)) / beta),
    "ipo": ({"dpo.loss": "ipo"}, lambda p, beta: (2 * p - 1) / (2 * beta)),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_dpo_reaches_the_optimum_of_its_loss(name: str, tmp_path: Path) -> None:
    settings, optimum = OPTIMA[name]
    words, beta = tokenizer(), 0.5
    model = base("llama", hidden_size=16, num_layers=1, num_heads=2, context_length=64).model
    start = copy.deepcopy(model)
    given = {
        "run.directory": str(tmp_path),
        "threads": 1,
        "data.template": "question-answer",
        "data.max_length": 64,
        "optim.learning_rate": 1e-2,
        "optim.schedule": "cosine",
        "train.batch_size": 120,
        "train.steps": 150,
        "train.num_samples": 0,
        "train.save_every": "never",
        "tracking.console": False,
        "dpo.beta": beta,
        **settings,
    }
    fairlead.train({"algorithm": "dpo"}, given, model=model, tokenizer=words, data=rows())
    found = log_ratios(start, model, words)
    for prompt, ratios in zip(PROMPTS, found, strict=True):
        wanted = dict[tuple[int, int], float]()
        for i, j in itertools.combinations(range(3), 2):
            p = 1 / (1 + math.exp(REWARDS[prompt][j] - REWARDS[prompt][i]))
            wanted[i, j] = optimum(p, beta)
        if name == "ipo":  # three differences of two unknowns: least squares over the pairs
            matrix = torch.zeros(3, 3, dtype=torch.float64)
            for row, (i, j) in enumerate(wanted):
                matrix[row, i], matrix[row, j] = 1, -1
            best = torch.linalg.pinv(matrix) @ torch.tensor(list(wanted.values()), dtype=torch.float64)
            wanted = {(i, j): float(best[i] - best[j]) for i, j in wanted}
        got = {(i, j): ratios[i] - ratios[j] for i, j in wanted}
        assert got == pytest.approx(wanted, abs=0.02)
