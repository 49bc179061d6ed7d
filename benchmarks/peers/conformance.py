"""TRL's side of one case of `fairlead prove`: `conformance.py JOB`, in the peers' environment.

The job holds the trainer's name, the folder of the start, the rows, all of which make each step (of the online trainers
each prompt with so many responses), the reward of every response by prompt and text, and the folder to save into.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_callback import PrinterCallback


def classes(name: str) -> tuple[Any, Any]:
    """A trainer and its settings."""
    if name in ("cpo", "orpo"):
        from trl.experimental import cpo, orpo

        return (cpo.CPOTrainer, cpo.CPOConfig) if name == "cpo" else (orpo.ORPOTrainer, orpo.ORPOConfig)
    import trl

    title = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "rloo": "RLOO", "grpo": "GRPO"}[name]
    return getattr(trl, f"{title}Trainer"), getattr(trl, f"{title}Config")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    name, tokenizer = job["trainer"], AutoTokenizer.from_pretrained(job["model"])
    trainer_class, config_class = classes(name)
    online = name in ("rloo", "grpo")
    rows = len(job["rows"]) * (job["arguments"]["num_generations"] if online else 1)
    config = config_class(
        output_dir=tempfile.mkdtemp(),
        max_steps=job["steps"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=job["max_grad_norm"],
        seed=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        logging_steps=job["steps"],
        disable_tqdm=True,
        **job["arguments"],
    )
    given: dict[str, Any] = {"model": model(job, tokenizer), "args": config, "processing_class": tokenizer}
    if online:
        given["reward_funcs"] = reward_of(job["rewards"])
    trainer = trainer_class(train_dataset=Dataset.from_list([spaced(row) for row in job["rows"]]), **given)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])


def model(job: dict[str, Any], tokenizer: Any) -> Any:
    """The start. A reward model is given a padding token of its own: with the end token as padding it would be read
    one token too early."""
    if job["trainer"] != "reward":
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    made = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    made.resize_token_embeddings(len(tokenizer))
    made.config.pad_token_id = tokenizer.pad_token_id
    return made


def spaced(row: dict[str, str]) -> dict[str, str]:
    """With a space between prompt and response, which our side puts there itself."""
    names = {"response": "completion"}
    return {names.get(name, name): text if name == "prompt" else f" {text}" for name, text in row.items()}


def reward_of(table: dict[str, dict[str, float]]) -> Any:
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [table[prompt][text.strip()] for prompt, text in zip(prompts, completions, strict=True)]

    return reward


if __name__ == "__main__":
    main()
