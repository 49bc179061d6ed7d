"""TRL's side of a run of rounds: `rounds.py JOB RESULT`, in the environment that has the trainer: .venv-ppo has PPO,
.venv RLOO and GRPO.

The job names the trainer, the folder of the policy, as which reference and value begin, that of a reward model (none:
the function in `wish`), and a file of prompts that are read in their order.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parent))
from wish import long_text


class Marks(TrainerCallback):
    """When each round ended, and the time of its phases before the update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.taken = {"sampling": 0.0, "scoring": 0.0}
        self.sampled = 0.0
        """When the sampling ended whose scoring has not."""

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted, less that of a phase within."""

        def call(*arguments: Any, **named: Any) -> Any:
            start, before = time.perf_counter(), sum(self.taken.values())
            found = function(*arguments, **named)
            self.sampled = time.perf_counter()
            self.taken[phase] += self.sampled - start - (sum(self.taken.values()) - before)
            return found

        return call

    def until_learned(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose first call with gradients ends the scoring that began with the end of the sampling."""

        def call(*arguments: Any, **named: Any) -> Any:
            if torch.is_grad_enabled() and self.sampled:
                self.taken["scoring"] += time.perf_counter() - self.sampled
                self.sampled = 0.0
            return function(*arguments, **named)

        return call

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter())
        self.phases.append(self.taken)
        self.taken, self.sampled = dict.fromkeys(self.taken, 0.0), 0.0


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    tokenizer, marks = AutoTokenizer.from_pretrained(job["model"]), Marks()
    with open(job["rows"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert [tokenizer(row["prompt"]).input_ids for row in rows] == job["ids"]
    began = time.perf_counter()
    trainer = {"ppo": ppo, "rloo": grouped, "grpo": grouped}[job["trainer"]](job, tokenizer, rows, marks)
    trainer.remove_callback(PrinterCallback)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert len(marks.seconds) == job["rounds"]
    score = "objective/scores" if job["trainer"] == "ppo" else "reward"
    result = {
        "seconds": [second - began for second in marks.seconds],
        "phases": marks.phases,
        "scores": [entry[score] for entry in trainer.state.log_history if score in entry],
        "peak": peak_memory(),
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def shared(job: dict[str, Any]) -> dict[str, Any]:
    """What the trainers' settings have in common."""
    return {
        "output_dir": tempfile.mkdtemp(dir="."),
        "per_device_train_batch_size": job["rows_at_once"],
        "gradient_accumulation_steps": job["batch_size"] // job["rows_at_once"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "seed": job["seed"],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        **job["arguments"],
    }


def grouped(job: dict[str, Any], tokenizer: Any, rows: list[dict[str, str]], marks: Marks) -> Any:
    """RLOO or GRPO, each prompt with several responses."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_class, config_class = {
        "rloo": (RLOOTrainer, RLOOConfig),
        "grpo": (GRPOTrainer, GRPOConfig),
    }[job["trainer"]]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return long_text(completions)

    trainer = trainer_class(
        model=job["model"],
        reward_funcs=reward,
        args=config_class(
            max_steps=job["rounds"],
            num_generations=job["samples"],
            max_completion_length=job["new_tokens"],
            generation_kwargs={"min_new_tokens": job["new_tokens"]},
            top_k=0,
            beta=job["kl_coef"],
            shuffle_dataset=False,
            **shared(job),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[marks],
    )
    for name, phase in (("_generate_single_turn", "sampling"), ("_generate_and_score_completions", "scoring")):
        setattr(trainer, name, marks.timed(phase, getattr(trainer, name)))
    return trainer


def ppo(job: dict[str, Any], tokenizer: Any, rows: list[dict[str, str]], marks: Marks) -> Any:
    """PPO with four models. The value begins as the policy does, with a head of zeros."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer.padding_side = "left"
    judge, of_model = None, ppo_trainer.get_reward

    def scores(model: Any, ids: torch.Tensor, pad: int, context: int) -> Any:
        if model is not judge or job["judge"]:
            return of_model(model, ids, pad, context)
        texts = tokenizer.batch_decode(ids[:, context:], skip_special_tokens=True)
        return None, torch.tensor(long_text(texts)), None

    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(value.score.weight)
    judge = (
        AutoModelForSequenceClassification.from_pretrained(job["judge"], dtype=torch.float32)
        if job["judge"]
        else torch.nn.Identity()
    )
    ppo_trainer.batch_generation = marks.timed("sampling", ppo_trainer.batch_generation)
    ppo_trainer.forward = marks.until_learned(ppo_trainer.forward)
    ppo_trainer.get_reward = scores
    data = Dataset.from_list([{"input_ids": ids} for ids in job["ids"]])
    trainer = PPOTrainer(
        args=PPOConfig(
            total_episodes=job["rounds"] * job["batch_size"],
            response_length=job["new_tokens"],
            local_rollout_forward_batch_size=job["batch_size"],
            num_mini_batches=1,
            num_sample_generations=0,
            temperature=1.0,
            kl_coef=job["kl_coef"],
            eval_strategy="no",
            **shared(job),
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(1)),
        callbacks=[marks],
    )
    # Its own loader shuffles.
    trainer.dataloader = DataLoader(data, job["batch_size"], collate_fn=trainer.data_collator)
    return trainer


def peak_memory() -> float:
    """VmHWM of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
