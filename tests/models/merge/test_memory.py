"""Merging holds little more than one file of weights, and never two whole models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.merge.made import save_adapter
from tests.tiny import tokenizer

MEASURE = """
import json, sys, threading, time
import peft, psutil, torch, transformers
from pathlib import Path
from fairlead.models.merge.run import write_model
from fairlead.models.merge.source import Source
from fairlead.models.merge.tensors import Tensors

torch.ones(256, 256) @ torch.ones(256, 256)
process, highest, done = psutil.Process(), 0, False
def watch():
    global highest
    while not done:
        highest = max(highest, process.memory_info().rss)
        time.sleep(0.002)

source = Source.find(sys.argv[1])
out = Path(sys.argv[2])
out.mkdir()
start = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
write_model(source, Tensors(source.base), out, dtype=torch.float32, shard_size=int(sys.argv[3]))
done = True
thread.join()
print(json.dumps({"growth": highest - start, "written": sum(p.stat().st_size for p in out.glob("*.safetensors"))}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("shard_size", "copies"), [(2 << 30, 1.5), (100_000_000, 0.75)], ids=["one file", "many"])
def test_the_peak_while_merging_stays_near_one_copy(tmp_path: Path, shard_size: int, copies: float) -> None:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", use_dora=True)
    command = [sys.executable, "-c", MEASURE, tmp_path / "adapter", tmp_path / "out", str(shard_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["written"] > 4 * 100e6
    assert found["growth"] < copies * found["written"], found
