"""TRL's side of one run of a benchmark: `train.py JOB RESULT`, in the peers' environment.

The job names the trainer, the model folder, a file of rows that are read in their order, and how many make a step; it
may name a file of held-out pairs too, which are measured after the last one.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
}
MARGINS = {"reward": ("margin", "eval_accuracy"), "dpo": ("rewards/margins", "eval_rewards/accuracies")}
"""What the trainers call a pair's margin, and the share of pairs in which it is above zero."""


class Marks(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter())


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    for name in ("peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    trainer_class, config_class = TRAINERS[job["trainer"]]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    marks = Marks()
    began = time.perf_counter()
    rows, heldout = read(job["rows"]), read(job["heldout"]) if job["heldout"] else None
    config = config_class(
        output_dir=tempfile.mkdtemp(dir="."),
        max_steps=job["steps"],
        per_device_train_batch_size=job["rows_at_once"],
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=job["batch_size"] // job["rows_at_once"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        **job["arguments"],
    )
    trainer = trainer_class(
        model=job["model"],
        args=config,
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
        callbacks=[marks],
    )
    trainer.remove_callback(PrinterCallback)
    check(trainer, tokenizer, job)
    prepared = time.perf_counter()
    trainer.train()
    result = {
        "seconds": [second - began for second in marks.seconds],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak": peak_memory(),
        "prepared": prepared - began,
        "whole": marks.seconds[-1] - began,
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
    }
    if heldout is not None:
        result |= measured(trainer, *MARGINS[job["trainer"]])
    Path(sys.argv[2]).write_text(json.dumps(result))


def read(path: str) -> Dataset:
    with open(path, encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])


def measured(trainer: Any, margin: str, accuracy: str) -> dict[str, Any]:
    """The margin of each held-out pair, one batch of evaluation each, and the accuracy that TRL reports."""
    margins: list[float] = []
    log = trainer.log

    def keep(logs: dict[str, float], *rest: Any) -> None:
        margins.extend(trainer._metrics["eval"][margin])
        log(logs, *rest)

    trainer.log = keep
    return {"accuracy": trainer.evaluate()[accuracy], "margins": margins}


def check(trainer: Any, tokenizer: Any, job: dict[str, Any]) -> None:
    """The model is in fp32, and the rows have the ids that our side has."""
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert len(trainer.train_dataset) == job["steps"] * job["batch_size"]
    for text, ids in job["texts"]:
        assert tokenizer(text).input_ids == ids
    for rows, known in ((trainer.train_dataset, job["ids"]), (trainer.eval_dataset or (), job["heldout_ids"])):
        for row, wanted in zip(rows, known, strict=False):
            for name, ids in wanted.items():
                assert row[name] == ids, name
    assert trainer.eval_dataset is None or len(trainer.eval_dataset) == len(job["heldout_ids"])


def peak_memory() -> float:
    """VmHWM of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
