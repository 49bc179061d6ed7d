"""The matrix: each algorithm, with roles on one base, as models of their own, or with a reward of another family and
tokenizer; all weights trained, adapters, or adapters on a base in 4 bits. What is legal trains a step and saves what
plain transformers and peft load; what is not is refused with its reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.rows import PAIRS, ROWS, settings
from tests.tiny import CPU, base, scatter, tokenizer

import fairlead
from fairlead.config import AdapterSection, ModelSection, ScratchSection
from fairlead.errors import ConfigError
from fairlead.models.export import save_model
from fairlead.models.load import build, load_base, prepare, train_tokenizer
from fairlead.models.roles import Models
from fairlead.rollout.rewards import open_model

WEIGHTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model.adapter": {"rank": 4}},
    "nf4": {"model.adapter": {"rank": 4}, "model.quantize": "4bit"},
}
NOTHING = ""  # one role: the manifest says nothing of others
NO_BASE = "refused: leaves no base to share with its reference"
OFF = "reference: {base} with adapters off"
FIRST = "reference: log-probabilities of the model as it was loaded, taken before the first step"
COPY = "reference: a copy of {base}"
WHOLE = "reference: a frozen copy of all weights"
ON_BASE = "reward: on the policy's base, the frozen adapter {reward}/model, sha256 "
OWN = "reward: a model of its own, since model.roles=separate"
FOREIGN = "reward: a model of its own, since it is a whole model, not an adapter"
MATRIX = {
    # algorithm, roles:       full     lora     nf4
    ("pretrain", "shared"): (NOTHING, NOTHING, NOTHING),
    ("pretrain", "separate"): (NOTHING, NOTHING, NOTHING),
    ("sft", "shared"): (NOTHING, NOTHING, NOTHING),
    ("sft", "separate"): (NOTHING, NOTHING, NOTHING),
    ("reward", "shared"): (NOTHING, NOTHING, NOTHING),
    ("reward", "separate"): (NOTHING, NOTHING, NOTHING),
    ("dpo", "shared"): (FIRST, OFF, OFF),
    ("dpo", "separate"): (WHOLE, COPY, COPY),
    ("kto", "shared"): (FIRST, OFF, OFF),
    ("kto", "separate"): (WHOLE, COPY, COPY),
    ("bco", "shared"): (FIRST, OFF, OFF),
    ("simpo", "shared"): (NOTHING, NOTHING, NOTHING),
    ("cpo", "shared"): (NOTHING, NOTHING, NOTHING),
    ("orpo", "shared"): (NOTHING, NOTHING, NOTHING),
    ("ppo", "shared"): (NO_BASE, ON_BASE, ON_BASE),
    ("ppo", "separate"): (OWN, OWN, OWN),
    ("ppo", "other family"): (FOREIGN, FOREIGN, FOREIGN),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base; a reward adapter on it; and a whole reward model of another family with another tokenizer."""
    folder = tmp_path_factory.mktemp("matrix")
    start = base()
    start.model.config._attn_implementation = "sdpa"
    start.model.save_pretrained(folder / "base")
    start.tokenizer.save_pretrained(folder / "base")
    section = ModelSection(path=str(folder / "base"))
    stands = load_base(section, tokenizer(), None, seed=0, device=CPU)
    words = train_tokenizer([f"{row['prompt']} {row['chosen']}" for row in PAIRS], 400, 128)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 400,
        "context_length": 128,
    }
    other = prepare(build(ScratchSection(architecture="opt", **sizes), words, 1, torch.float32), words, None, CPU)
    for name, found, adapter in (("reward", stands, AdapterSection(rank=2)), ("other", other, None)):
        made = Models(found, ("reward",), adapter=adapter)
        scatter(made)
        save_model(made, folder / name / "model", template="question-answer")
    return {name: str(folder / name) for name in ("base", "reward", "other")}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("algorithm", "roles"), MATRIX)
def test_the_matrix(algorithm: str, roles: str, weights: str, places: dict[str, str], tmp_path: Path) -> None:
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    expected = MATRIX[algorithm, roles][list(WEIGHTS).index(weights)].format(**places)
    more: dict[str, Any] = {"model.path": places["base"], "train.steps": 1, "train.num_samples": 0, **WEIGHTS[weights]}
    more["model.roles"] = "auto" if roles == "other family" else roles
    if algorithm == "ppo":
        more["ppo.reward"] = places["other" if roles == "other family" else "reward"]

    def train() -> fairlead.RunResult:
        return fairlead.train({"algorithm": algorithm}, settings(algorithm, tmp_path, **more), data=ROWS[algorithm])

    if expected.startswith("refused: "):
        with pytest.raises(ConfigError, match=expected.removeprefix("refused: ")):
            train()
        assert not (tmp_path / algorithm).exists()
        return
    run = train()
    assert (run.summary["status"], run.summary["steps"]) == ("finished", 1)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(rows[1]["loss"]) and rows[1]["grad_norm"] > 0
    notes = json.loads((run.path / "manifest.json").read_text())["notes"]
    about = [note for note in notes if note.startswith(("reference: ", "reward: "))]
    assert any(note.startswith(expected) for note in about) if expected else not about
    _loads(run.path, algorithm)


def _loads(run: Path, algorithm: str) -> None:
    """In plain transformers, which takes peft's adapters; a reward as the next stage and `evaluate` take it."""
    if algorithm == "reward":
        scores = open_model(str(run), device=CPU).score([(row["prompt"], row["chosen"]) for row in PAIRS[:2]])
        assert all(math.isfinite(score) for score in scores)
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert bool(torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all())
