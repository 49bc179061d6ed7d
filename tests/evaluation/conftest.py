from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fairlead.runner import train

TINY = {
    "architecture": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 280,
    "context_length": 64,
}
WORDS = ["tea", "milk", "bread", "cheese", "soup", "rice", "salt", "corn", "fish", "plum", "leek", "oats"]
DEMONSTRATIONS = [{"prompt": f"Do you like {word}?", "response": f"Yes, {word} is good."} for word in WORDS]
PROMPTS = [{"prompt": row["prompt"], "word": word} for row, word in zip(DEMONSTRATIONS, WORDS, strict=True)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "No."} for row in DEMONSTRATIONS]


class Runs(NamedTuple):
    """Run directories: a reference, two policies trained on from it (one by LoRA), a policy of another vocabulary, and
    a reward model."""

    reference: Path
    policy: Path
    adapted: Path
    stranger: Path
    reward: Path


def settings(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "threads": 1,
        "run.directory": str(folder),
        "run.name": name,
        "data.max_length": 48,
        "data.template": "question-answer",
        "train.steps": 3,
        "train.num_samples": 0,
        "train.batch_size": 8,
        "optim.learning_rate": 0.01,
        "tracking.console": False,
        **more,
    }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")

    def made(algorithm: str, name: str, rows: list[dict[str, str]], **more: Any) -> Path:
        return train({"algorithm": algorithm}, settings(folder, name, **more), data=rows).path

    reference = made("sft", "reference", DEMONSTRATIONS, **{"model.scratch": TINY})
    return Runs(
        reference=reference,
        policy=made("dpo", "policy", PAIRS, **{"model.path": str(reference)}),
        adapted=made("dpo", "adapted", PAIRS, **{"model.path": str(reference), "model.adapter": {"rank": 4}}),
        stranger=made("sft", "stranger", DEMONSTRATIONS, **{"model.scratch": TINY | {"vocab_size": 270}}),
        reward=made("reward", "reward", PAIRS, **{"model.path": str(reference), "train.steps": 20}),
    )
