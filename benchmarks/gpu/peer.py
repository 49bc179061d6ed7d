"""The peer's side, in an environment that has TRL: imports, then reads what to do from stdin, and writes what it found.

Imports nothing of ours. Token ids and texts come with the job, in the order in which they are to be read.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> float:
    """Bytes of tensors on a GPU since the process began; on a CPU of the whole process."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024.0


def attention(device: str) -> str:
    return "flash_attention_2" if device.startswith("cuda") and has("flash_attn") else "sdpa"


# --- training ------------------------------------------------------------------------------------------------------


def train(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer over the rows, until the time is over; what does not fit is tried with half as many at once."""
    at_once = job["rows_at_once"]
    while True:
        try:
            return attempt(job, at_once)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        torch.cuda.empty_cache()
        at_once //= 2


def attempt(job: dict[str, Any], at_once: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    marks, device, warmup = list[float](), job["device"], job["warmup"]

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            marks.append(now(device))
            if len(marks) > warmup + 1 and marks[-1] - marks[warmup - 1] > job["seconds"]:
                control.should_training_stop = True
            return control

    trainer_class, config, arguments, name = settings(job, at_once)
    trainer = trainer_class(
        args=config,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Marks()],
        **arguments,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    timed = job["units"][warmup : len(marks)]
    return {
        "figures": {
            job["compared"]: sum(timed) / (marks[-1] - marks[warmup - 1]),
            "peak memory": peak(device) / 1e9,
        },
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peer_name": f"TRL {version('trl')}, {name}, {at_once} at once",
        "versions": {package: version(package) for package in ("trl", "torch", "transformers", "accelerate")},
    }


def settings(job: dict[str, Any], at_once: int) -> tuple[Any, Any, dict[str, Any], str]:
    """The trainer's class, its configuration, what else it is given, and what that is called: padding-free where there
    is flash-attn, else padded."""
    import trl
    from peft import LoraConfig

    on_gpu, way = job["device"].startswith("cuda"), attention(job["device"])
    is_lora, kind = job["mode"] == "lora", job["trainer"]
    is_flat = way != "sdpa" and kind != "reward"
    own: dict[str, Any] = {"padding_free": True} if is_flat else {}
    if kind == "sft":
        own |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
    own |= {"beta": 0.1} if kind == "dpo" else {}
    classes = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }
    trainer_class, config_class = classes[kind]
    loading = {"dtype": "bfloat16" if is_lora and on_gpu else "float32", "attn_implementation": way}
    config = config_class(
        output_dir=tempfile.mkdtemp(),
        max_steps=len(job["rows"]) // job["batch_size"],
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=job["batch_size"] // at_once,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        seed=0,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_liger_kernel=on_gpu and has("liger_kernel"),
        **own,
    )
    adapter = LoraConfig(r=job["adapter"]["rank"], lora_alpha=job["adapter"]["alpha"], target_modules="all-linear")
    model = opened(job, loading)
    given = {"model": model} | ({"peft_config": adapter} if is_lora else {})
    name = f"{way.removesuffix('_2').replace('_', ' ')}{', padding-free' if is_flat else ''}"
    return trainer_class, config, given, name


def opened(job: dict[str, Any], loading: dict[str, Any]) -> Any:
    """The base; of a reward model with the head that ours begins with."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    given = loading | {"dtype": getattr(torch, loading["dtype"])}
    if job["trainer"] != "reward":
        return AutoModelForCausalLM.from_pretrained(job["model"], **given)
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, **given)
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([job["score"]]))
    return model


# --- decoding, and the head alone ----------------------------------------------------------------------------------


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """`generate` of transformers, whose cache grows; every row has its full length."""
    from transformers import AutoModelForCausalLM

    device = job["device"]
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa").to(device)
    ids = torch.tensor(job["rows"], device=device)

    def generate(number: int) -> float:
        began = now(device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=number,
            min_new_tokens=number,
        )
        return now(device) - began

    generate(4)
    spent = statistics.median(generate(job["new_tokens"]) for _ in range(2))
    return {
        "figures": {
            "new tokens a second": len(ids) * job["new_tokens"] / spent,
            "peak memory": peak(device) / 1e9,
        },
        "peer_name": f"transformers {version('transformers')}, generate",
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }


def head(job: dict[str, Any]) -> dict[str, Any]:
    """The fused head of TRL's trainers, log-probabilities alone, forward and backward."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    device, vocabulary = job["device"], job["vocabulary"]
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(job["rows"], job["hidden_size"], device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, job["hidden_size"], device=device) * 0.02).to(dtype).requires_grad_(True)
    targets = torch.randint(vocabulary, (job["rows"],), device=device)
    pull = torch.randn(job["rows"], device=device)
    form = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())  # temperature 1, no cap, nothing besides log-probs
    before, spent = 0.0, list[float]()
    for number in range(7):
        hidden.grad = weight.grad = None
        if number == 2:  # what follows is timed
            before = reset_peak(device)
        began = now(device)
        found = _ChunkedLogProbFunction.apply(hidden, weight, None, targets, *form)[0]
        found.backward(pull.to(found.dtype))
        spent.append(now(device) - began)
    return {
        "figures": {
            "milliseconds": 1e3 * statistics.median(spent[2:]),
            "memory above the inputs": max(0.0, peak(device) - before) / 1e9,
        },
        "peer_name": f"TRL {version('trl')}, fused head",
        "versions": {"trl": version("trl")},
    }


def reset_peak(device: str) -> float:
    """Bytes that lie there now; the peak begins anew."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"train": train, "decode": decode, "head": head}


def main() -> None:
    from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401  # pyright: ignore

    job = json.load(sys.stdin)
    Path(job["out"]).write_text(json.dumps(KINDS[job["kind"]](job)) + "\n")


if __name__ == "__main__":
    main()
