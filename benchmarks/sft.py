"""Language modelling on HH's transcripts beside TRL's SFTTrainer: tokens a second and peak memory.

    make bench-sft
    make bench-sft ARGS="--sizes S --steps 2 --repeats 1"

Wrapped: transcripts end to end in rows of 512 tokens, attended to as one text on both sides, as TRL's wrapped packing
does. Documents: whole transcripts packed best-fit into rows, each attending to itself alone, as in its packing bfd.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import given
import side_by_side as bench

BATCH = {"S": 8, "M": 4}
"""Rows of a step."""
KINDS = {"S": ("wrapped", "documents"), "M": ("wrapped",)}
LEARNING_RATE = 3e-4
METRICS = {("tokens a second", "1/s"): (bench.rate, bench.rate), **bench.PEAK}
REMARK = (
    "Random Llamas in fp32, AdamW, the same rows of HH in the same order. Ours is the pretrain stage with all that it "
    "writes; TRL writes no checkpoints. peer_name says how many rows go through the model at once."
)


def wrapped(texts: Sequence[str], tokenizer: Any, tokens: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Our one text, and the rows it is cut into."""
    ids = [tokenizer(text + tokenizer.eos_token).input_ids for text in texts]
    number = enough(ids, tokens)
    flat = [token for each in ids[:number] for token in each]
    rows = [flat[at : at + given.LENGTH] for at in range(0, len(flat) - given.LENGTH + 1, given.LENGTH)]
    return [tokenizer.eos_token.join(texts[:number])], [{"input_ids": row} for row in rows]


def documents(texts: Sequence[str], tokenizer: Any, tokens: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Our texts, and the rows they are packed into, as TRL's bfd packing would hand them on."""
    from fairlead.data.pack import pack_whole
    from fairlead.data.render import Tree

    ids = {text: tokenizer(text + tokenizer.eos_token).input_ids for text in texts}
    fitting = [text for text in ids if len(ids[text]) <= given.LENGTH]
    fitting = fitting[: enough([ids[text] for text in fitting], tokens)]
    rows: list[dict[str, Any]] = []
    for row in pack_whole([Tree((), (tuple(ids[text]),)) for text in fitting], given.LENGTH):
        flat = [token for tree in row for token in tree.responses[0]]
        rows.append({"input_ids": flat, "labels": flat, "seq_lengths": [tree.num_tokens for tree in row]})
    return fitting, rows


def enough(ids: Sequence[Sequence[int]], tokens: int) -> int:
    """How many texts hold so many tokens."""
    return next(number for number, total in enumerate(accumulate(map(len, ids)), start=1) if total >= tokens)


PACKED = {
    "wrapped": (wrapped, "wrapped", {"packing_strategy": "wrapped"}),
    "documents": (documents, "best-fit", {"packing_strategy": "bfd", "dataset_kwargs": {"skip_prepare_dataset": True}}),
}
"""Texts and rows, our data.packing, TRL's settings."""


def ways(kind: str, model: Path, texts: Sequence[str], tokenizer: Any, batch: int, warmup: int, steps: int):
    make, packing, arguments = PACKED[kind]
    number = (warmup + steps) * batch
    mine, rows = make(texts, tokenizer, number * given.LENGTH)
    rows = given.as_read(rows)[:number]
    ours = given.recipe(
        "pretrain",
        model,
        given.write_rows(model / f"{kind}-ours.jsonl", [{"text": text} for text in mine]),
        data={"packing": packing},
        optim={"learning_rate": LEARNING_RATE},
        train={"steps": warmup + steps, "batch_size": batch},
    )
    sizes = [len(row["input_ids"]) for row in rows]
    units = [sum(sizes[at : at + batch]) for at in range(0, number, batch)]
    file = given.write_rows(model / f"{kind}-peer.jsonl", rows)
    for at_once in (batch, 1):
        peer = given.job(
            "sft",
            model,
            file,
            steps=warmup + steps,
            batch_size=batch,
            rows_at_once=at_once,
            learning_rate=LEARNING_RATE,
            arguments={"packing": True, "max_length": given.LENGTH, **arguments},
            texts=[[text, tokenizer(text).input_ids] for text in mine[:4]],
            ids=rows[:4],
        )
        yield bench.Way(f"TRL, {arguments['packing_strategy']}, {at_once} rows at once", ours, peer, units, warmup)


def main() -> None:
    parser = bench.options(__doc__, "sft")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of S; of M half as many")
    settings = parser.parse_args()
    data = bench.data_folder(parser, settings)
    texts = [row["chosen"] for row in given.transcripts(data)]
    cases: list[dict[str, Any]] = []
    with bench.scratch() as folder:
        for size in settings.sizes:
            tokenizer = given.save_model(folder / size, size, [*texts, *given.books(data)])
            steps = settings.steps if size == "S" else max(1, settings.steps // 2)
            for kind in KINDS[size]:
                tried = list(ways(kind, folder / size, texts, tokenizer, BATCH[size], settings.warmup, steps))
                runs = bench.interleave(f"{size}, {kind}", tried, settings.repeats)
                cases += bench.results(f"{size}, {kind}", tried, runs, METRICS)
    bench.write_results(settings.out, "sft", cases, bench.versions(runs), REMARK)


if __name__ == "__main__":
    main()
