"""The plain way of RAFT: `raft.py JOB RESULT`, in the peers' environment.

Each round repeats every prompt as often as it is to be answered, samples with transformers.generate batch by batch,
keeps the best response to each prompt by the function in `wish`, and hands these to a new SFTTrainer of TRL.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
from rounds import peak_memory, shared
from wish import long_text

Ids = list[int]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    with open(job["rows"], encoding="utf-8") as lines:
        assert [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines] == job["ids"]
    torch.manual_seed(job["seed"])
    size, samples = job["batch_size"] // job["samples"], job["samples"]
    began, seconds, phases, scores = time.perf_counter(), list[float](), list[dict[str, float]](), list[float]()
    for number in range(job["rounds"]):
        start = time.perf_counter()
        prompts = [ids for ids in job["ids"][number * size : (number + 1) * size] for _ in range(samples)]
        responses = sample(model, prompts, job)
        sampled = time.perf_counter()
        values = long_text(tokenizer.batch_decode(responses, skip_special_tokens=True))
        best = [max(range(at, at + samples), key=values.__getitem__) for at in range(0, len(values), samples)]
        scored = time.perf_counter()
        draws = torch.get_rng_state()
        learn(model, tokenizer, [(prompts[i], responses[i]) for i in best], job)
        torch.set_rng_state(draws)  # which a new trainer seeds anew: every round would draw what the last one drew
        seconds.append(time.perf_counter() - began)
        phases.append({"sampling": sampled - start, "scoring": scored - sampled})
        scores.append(sum(values) / len(values))
    result = {
        "seconds": seconds,
        "phases": phases,
        "scores": scores,
        "peak": peak_memory(),
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


@torch.no_grad()
def sample(model: Any, prompts: list[Ids], job: dict[str, Any]) -> list[Ids]:
    """A response to each prompt, all of one length."""
    pad, found = model.config.pad_token_id, list[Ids]()
    settings = GenerationConfig(
        do_sample=True,
        temperature=job["temperature"],
        top_k=0,
        top_p=1.0,
        max_new_tokens=job["new_tokens"],
        min_new_tokens=job["new_tokens"],
        eos_token_id=model.config.eos_token_id,
        pad_token_id=pad,
        cache_implementation=job["cache"],
        use_cache=True,
    )
    model.eval()
    for at in range(0, len(prompts), job["sampled_at_once"]):
        part = prompts[at : at + job["sampled_at_once"]]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(each)) + each for each in part])
        seen = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in part])
        found += model.generate(ids, attention_mask=seen, generation_config=settings)[:, width:].tolist()
    return found


def learn(model: Any, tokenizer: Any, pairs: list[tuple[Ids, Ids]], job: dict[str, Any]) -> None:
    """One step on all of the pairs, with loss on the responses."""
    rows = [
        {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}
        for prompt, response in pairs
    ]
    settings = shared(job) | {"gradient_accumulation_steps": len(pairs) // job["rows_at_once"]}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(max_steps=1, completion_only_loss=True, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()


if __name__ == "__main__":
    main()
