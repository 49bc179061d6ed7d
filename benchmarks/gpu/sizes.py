"""The random Llamas that are measured, their rows of stated lengths, and a tokenizer of one token a word."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.gpu.formulas import FULL, LORA, Shape

SPECIAL = ("<pad>", "<eos>", "<unk>")


@dataclass(frozen=True, slots=True)
class Load:
    """What the stages are given; lengths in tokens, an end of sequence counted."""

    row: int
    """A text to pretrain on; as long as its row, so that nothing is padded or cut."""
    texts: int
    """Of a step."""
    prompt: tuple[int, int]
    """Shortest and longest, drawn evenly."""
    response: tuple[int, int]
    demonstrations: int
    """Of a step."""
    pairs: int
    """Of a step."""
    steps: int
    """Steps there are rows for."""
    prompts: int
    """Of a round of PPO, each ``prompt[1]`` long."""
    minibatch: int
    """Responses of a step of PPO."""
    new_tokens: int
    """Sampled for each prompt."""
    batches: tuple[int, ...]
    """Rows decoded together."""
    scored: int
    """Responses to be scored."""
    head_rows: int
    """Hidden states whose log-probabilities are taken."""

    @property
    def longest(self) -> int:
        """Tokens of a row with a prompt."""
        return self.prompt[1] + max(self.response[1], self.new_tokens)


@dataclass(frozen=True, slots=True)
class Size:
    shape: Shape
    micro_batch_tokens: int
    """Of one forward pass; halved while memory does not suffice."""
    modes: tuple[str, ...]
    load: Load


LOAD = Load(
    row=2048,
    texts=16,
    prompt=(32, 256),
    response=(32, 512),
    demonstrations=64,
    pairs=32,
    steps=20,
    prompts=128,
    minibatch=64,
    new_tokens=128,
    batches=(8, 64, 256),
    scored=128,
    head_rows=8192,
)
TINY = Load(
    row=64,
    texts=2,
    prompt=(4, 12),
    response=(4, 20),
    demonstrations=4,
    pairs=3,
    steps=4,
    prompts=4,
    minibatch=2,
    new_tokens=6,
    batches=(2,),
    scored=6,
    head_rows=32,
)
SIZES = {
    "tiny": Size(Shape(2, 64, 4, 2, 128, 512), 256, (FULL, LORA), TINY),
    "0.5B": Size(Shape(24, 1024, 16, 8, 4096, 128256), 16384, (FULL, LORA), LOAD),
    "1B": Size(Shape(16, 2048, 32, 8, 8192, 128256), 8192, (FULL, LORA), LOAD),
    "8B": Size(Shape(32, 4096, 32, 8, 14336, 128256, tied=False), 2048, (LORA,), LOAD),
}
"""1B and 8B have the shapes of Llama 3.2 1B and Llama 3.1 8B. All weights of 8B are not trained: 16 bytes each would be
128 GB."""


def config(shape: Shape, positions: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def write_base(folder: Path, size: Size, device: str) -> None:
    """A model of random weights in bf16, drawn on the device, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = config(size.shape, max(size.load.row, size.load.longest))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer(size.shape.vocab_size).save_pretrained(folder)


def tokenizer(vocab_size: int) -> Any:
    """Word number i, w<i>, is token i."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), vocab_size)}
    made = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[2]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


# --- rows ----------------------------------------------------------------------------------------------------------


class Rows:
    """Random rows as token ids, drawn from a seed."""

    def __init__(self, size: Size, seed: int = 0) -> None:
        self._draw, self._vocabulary, self._load = np.random.default_rng(seed), size.shape.vocab_size, size.load

    def ids(self, length: int) -> list[int]:
        return self._draw.integers(len(SPECIAL), self._vocabulary, length).tolist()

    def _between(self, bounds: tuple[int, int]) -> int:
        return int(self._draw.integers(bounds[0], bounds[1] + 1))

    def texts(self) -> list[dict[str, list[int]]]:
        return [{"text": self.ids(self._load.row - 1)} for _ in range(self._load.texts * self._load.steps)]

    def demonstrations(self) -> list[dict[str, list[int]]]:
        return [
            {"prompt": self.ids(self._between(self._load.prompt)), "response": self._response()}
            for _ in range(self._load.demonstrations * self._load.steps)
        ]

    def pairs(self) -> list[dict[str, list[int]]]:
        return [
            {
                "prompt": self.ids(self._between(self._load.prompt)),
                "chosen": self._response(),
                "rejected": self._response(),
            }
            for _ in range(self._load.pairs * self._load.steps)
        ]

    def prompts(self, number: int) -> list[dict[str, list[int]]]:
        return [{"prompt": self.ids(self._load.prompt[1])} for _ in range(number)]

    def _response(self) -> list[int]:
        """Without its end of sequence."""
        return self.ids(self._between(self._load.response) - 1)


def words(ids: Iterable[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def write_rows(path: Path, rows: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """As text, one JSON a line."""
    lines = (json.dumps({name: words(ids) for name, ids in row.items()}) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)
