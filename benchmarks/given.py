"""What both sides of a benchmark beside TRL are given: the same weights, the same rows in the same order, the same
settings. Knows nothing of processes, times or results.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "XS": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 344},
    "S": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 688},
    "M": {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1376},
}
VOCABULARY = {"XS": 1024, "S": 8192, "M": 32000}
LENGTH = 512
"""Longest row in tokens."""
TEMPLATE = "hh"
MEGABATCH = 50
"""Batches that transformers' group_by_length sorts together."""


# --- models --------------------------------------------------------------------------------------------------------


def save_model(folder: Path, size: str, texts: Sequence[str]) -> Any:
    """A random Llama in `folder`, once more as a reward model in `folder`-reward; returns its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fairlead.models.load import train_tokenizer

    tokenizer = train_tokenizer(texts, VOCABULARY[size], 2048)
    config = LlamaConfig(
        **SIZES[size],
        num_key_value_heads=SIZES[size]["num_attention_heads"],
        vocab_size=VOCABULARY[size],
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_judge(folder, model, tokenizer)
    return tokenizer


def save_judge(folder: Path, model: Any, tokenizer: Any) -> None:
    """The model of `folder` as a reward model in `folder`-reward, its head as our stage of seed 0 begins."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from fairlead.models.heads import ScalarHead

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(config)
    judge.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        judge.score.weight.copy_(ScalarHead(config.hidden_size, role="reward", seed=0).linear.weight)
    place = judge_of(folder)
    judge.save_pretrained(place)
    tokenizer.save_pretrained(place)


def judge_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-reward")


# --- rows ----------------------------------------------------------------------------------------------------------


def transcripts(data: Path) -> list[dict[str, str]]:
    """HH's rows: two transcripts each, chosen and rejected."""
    rows: list[dict[str, str]] = []
    for file in sorted((data / "hh-rlhf").rglob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return rows


def books(data: Path) -> list[str]:
    """More text for a tokenizer of many tokens."""
    return [file.read_text("utf-8", errors="replace") for file in sorted((data / "text" / "gutenberg").glob("*.txt"))]


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of pairs for us, the same as text for the peer, and the ids that both have to see."""

    row: Mapping[str, Any]
    record: Any
    """What we read the row as: a Preference."""
    text: dict[str, str]
    ids: dict[str, list[int]]

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(map(len, self.sides.values()))

    @property
    def sides(self) -> dict[str, list[int]]:
        """The ids of both sides whole, under the names of TRL's reward trainer."""
        return {f"{side}_ids": self.ids["prompt_ids"] + self.ids[f"{side}_ids"] for side in ("chosen", "rejected")}


def whole_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, template: str = TEMPLATE, length: int = LENGTH
) -> list[Pair]:
    """The pairs that neither side drops or cuts, and whose ids both agree on: our template's text, tokenised whole."""
    from fairlead.data.records import parse_row
    from fairlead.data.render import Renderer
    from fairlead.data.sources import Row
    from fairlead.types import Preference

    renderer = Renderer(tokenizer, template=template, max_length=1 << 20)
    pairs: list[Pair] = []
    for number, row in enumerate(rows):
        (record,) = parse_row(Row(dict(row), f"row {number}"), Preference)
        if isinstance(record, str):
            continue
        tree = renderer.trees([record])[0][0]
        parts = {"prompt": tree.prompt, "chosen": tree.responses[0], "rejected": tree.responses[1]}
        ids = {f"{name}_ids": list(part) for name, part in parts.items()}
        text = {name: tokenizer.decode(part).removesuffix(tokenizer.eos_token) for name, part in parts.items()}
        pair = Pair(row, record, text, ids)
        whole = [text["prompt"] + text[name] + tokenizer.eos_token for name in ("chosen", "rejected")]
        if pair.length <= length and [tokenizer(side).input_ids for side in whole] == list(pair.sides.values()):
            pairs.append(pair)
    return pairs


def orders(pairs: Sequence[Pair], batch_size: int, warmup: int, steps: int) -> dict[str, list[Pair]]:
    """The same pairs in two orders, of `warmup` batches that are not timed and `steps` that are.

    grouped: batches of like length, taken evenly from one sorted megabatch as transformers' group_by_length makes it;
    random: their pairs in a random order, those of the warm-up apart.
    """
    from fairlead.ops.sampling import permutation, stream_key

    pool = [pairs[i] for i in permutation(stream_key(0, "pool"), len(pairs))[: MEGABATCH * batch_size]]
    pool.sort(key=lambda pair: -pair.length)
    batches = [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    timed = [int((k + 0.5) * len(batches) / steps) for k in range(steps)]
    others = [k for k in range(len(batches)) if k not in timed]
    first = [others[int((k + 0.5) * len(others) / warmup)] for k in range(warmup)]
    grouped = [[pair for k in picks for pair in batches[k]] for picks in (first, timed)]
    mixed = [[part[i] for i in permutation(stream_key(0, "mixed"), len(part))] for part in grouped]
    return {"random": [*mixed[0], *mixed[1]], "grouped": [*grouped[0], *grouped[1]]}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def as_read(rows: Sequence[Any]) -> list[Any]:
    """The order in which our keyed shuffle of seed 0 takes the rows of a file."""
    from fairlead.ops.sampling import permutation, stream_key

    return [rows[i] for i in permutation(stream_key(0, "order", 0), len(rows))]


def so_that_read(rows: Sequence[Any]) -> list[Any]:
    """The file of which `as_read` makes the rows given."""
    placed: list[Any] = [None] * len(rows)
    for row, place in zip(rows, as_read(range(len(rows))), strict=True):
        placed[place] = row
    return placed


def write_pairs(folder: Path, pairs: Sequence[Pair]) -> tuple[str, str]:
    """A file of pairs for us and one for the peer, read in the same order."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = write_rows(folder / "ours.jsonl", so_that_read([pair.row for pair in pairs]))
    return mine, write_rows(folder / "peer.jsonl", [pair.text for pair in pairs])


# --- settings ------------------------------------------------------------------------------------------------------


def recipe(algorithm: str, model: Path | None, path: str, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, with the optimizer's settings of both sides."""
    base: dict[str, Any] = {
        "algorithm": algorithm,
        "seed": 0,
        "model": {"path": None if model is None else str(model)},
        "data": {"path": path, "template": TEMPLATE, "max_length": LENGTH, "cache": "none"},
        "optim": {"betas": [0.9, 0.999], "schedule": "constant"},
        "train": {"num_samples": 0},
        "tracking": {"console": False},
    }
    return {**base, **{name: {**base.get(name, {}), **values} for name, values in sections.items()}}


def job(
    trainer: str,
    model: Path,
    rows: str,
    *,
    steps: int,
    batch_size: int,
    rows_at_once: int,
    learning_rate: float,
    arguments: Mapping[str, Any],
    texts: Sequence[Any] = (),
    ids: Sequence[Mapping[str, Any]] = (),
    heldout: str = "",
    heldout_ids: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What peers/train.py reads. It makes sure that `texts` (text, ids) and the columns `ids` of the first rows are as
    here, and those of the pairs in the file `heldout`, whose margins it gives after the last step."""
    return {
        "trainer": trainer,
        "model": str(model),
        "rows": rows,
        "steps": steps,
        "batch_size": batch_size,
        "rows_at_once": rows_at_once,
        "learning_rate": learning_rate,
        "arguments": dict(arguments),
        "texts": list(texts),
        "ids": list(ids),
        "heldout": heldout,
        "heldout_ids": list(heldout_ids),
    }
