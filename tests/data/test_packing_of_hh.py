"""How full rows of real pairs are; needs FAIRLEAD_DATA."""

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fairlead.data.pack import best_fit, packing_report, token_batch
from fairlead.data.records import load_records
from fairlead.data.render import Renderer
from fairlead.types import Preference


@pytest.mark.skipif("FAIRLEAD_DATA" not in os.environ, reason="FAIRLEAD_DATA names no folder of real data")
def test_of_hh_pairs_packed_into_rows_of_1024_at_least_97_percent_of_the_tokens_are_real() -> None:
    """Pairs are forests, their prompt shared: measured on 1,592 pairs."""
    (path,) = (Path(os.environ["FAIRLEAD_DATA"]) / "hh-rlhf").rglob("*.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")

    pairs, _ = load_records(str(path), Preference)
    trees, _, _ = Renderer(tokenizer, template="hh", max_length=1024).trees(pairs)
    sizes = [tree.num_tokens for tree in trees]
    rows = best_fit(sizes, 1024)
    widths = [max(1024, sum(sizes[i] for i in row)) for row in rows]
    real = sum(token_batch([trees[i] for i in row], packed=True, pad_id=0).num_tokens for row in rows) / sum(widths)
    assert real >= 0.97
    report = packing_report(sizes, 1024)
    assert report["packed"] == pytest.approx(real)
    assert report["padded"] < 0.6
    prompts = sum(len(tree.prompt) for tree in trees)
    apart = sum(sum(len(tree.prompt) + len(ids) for ids in tree.responses) for tree in trees)
    saved = prompts / apart
    print(f"{len(trees)} pairs, {len(rows)} rows: {real:.4f} real, {report['padded']:.3f} padded, {saved:.3f} saved")
    assert saved > 0.25
