"""What `fairlead select` makes of scored samples beside the best of them: pairs, and ranks with a price of the KL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.rows import DEMONSTRATIONS, PROMPTS, SCRATCH, settings, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from fairlead.data.records import load_records
from fairlead.errors import ConfigError, DataError
from fairlead.evaluation.generate import generate
from fairlead.evaluation.score_samples import score_samples
from fairlead.evaluation.select import select_file
from fairlead.runner import train
from fairlead.types import Preference

SCORES = [[0.1, 0.9, None, 0.5], [3.0, 1.5, 2.0, 1.0], [1.0, 1.0, None, None], [None, 2.0, None, None]]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def scored(folder: Path) -> Path:
    found = [
        {"prompt": f"p{i}", "columns": {"topic": i}, "response": f"r{i}{k}", "sample": k, "finished": k != 3}
        | {"length": 2, "score": score, **({} if score is not None else {"discarded": "hashes"})}
        for i, row in enumerate(SCORES)
        for k, score in enumerate(row)
    ]
    return write(folder / "scored.jsonl", found)


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ({}, [("r01", "r00"), ("r10", "r13")]),
        ({"missing_eos_penalty": 1.5}, [("r01", "r03"), ("r10", "r13")]),
        ({"discard": [{"contains": {"part": "13"}}]}, [("r01", "r00"), ("r10", "r11")]),
    ],
)
def test_the_best_and_the_worst_of_each_prompt_are_a_pair_and_a_tie_is_none(
    given: dict[str, Any], pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "pairs.jsonl"
    told = select_file(scored(tmp_path), {"pairs": "max_min", **given}, out=out)
    found = rows(out)
    assert [(row["chosen"], row["rejected"]) for row in found] == pairs
    assert (told["pairs"], told["selected"], told["samples"]) == (2, 4, 16)
    assert [row["columns"]["topic"] for row in found] == [0, 1] and found[0]["score_chosen"] == 0.9
    assert [row["finished"] for row in found] == [[True, "3" not in row["rejected"][2:]] for row in found]


def test_pairs_are_read_as_preferences_whose_cut_sides_have_no_end(tmp_path: Path) -> None:
    select_file(scored(tmp_path), {"pairs": "max_min"}, out=tmp_path / "pairs.jsonl")
    records, _ = load_records(str(tmp_path / "pairs.jsonl"), Preference)
    assert [(record.chosen, record.rejected, record.finished) for record in records] == [
        ("r01", "r00", (True, True)), ("r10", "r13", (True, False)),
    ]  # fmt: skip
    assert records[1].margin == 2.0


def test_drawn_pairs_depend_on_the_seed_and_the_round_and_hold_the_better_one_first(tmp_path: Path) -> None:
    made: dict[tuple[int, int], list[tuple[str, str]]] = {}
    place, order = scored(tmp_path), {"r01": 3, "r03": 2, "r00": 1, "r10": 4, "r12": 3, "r11": 2, "r13": 1}
    for seed, number in ((0, 0), (0, 1), (1, 0), (0, 0), *((seed, 7) for seed in range(6))):
        out = tmp_path / f"{seed}-{number}.jsonl"
        select_file(place, {"pairs": "random", "seed": seed, "round": number}, out=out)
        found = [(row["chosen"], row["rejected"]) for row in rows(out)]
        assert made.setdefault((seed, number), found) == found
        assert all(order[chosen] > order[rejected] for chosen, rejected in found)
    assert len({str(each) for each in made.values()}) > 3


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"pairs": "max_min", "keep": 2}, ConfigError, "pairs=max_min takes two samples of each prompt"),
        ({"pairs": "best"}, ConfigError, "select.pairs"),
        ({"kl_coef": 0.1, "policy": "x"}, ConfigError, "kl_coef=0.1"),
        ({"reference": "x"}, ConfigError, "kl_coef=0"),
        (
            {"pairs": "max_min", "discard": [{"contains": {"part": p}} for p in ("r0", "r1")]},
            DataError,
            "no prompt has",
        ),
    ],
)
def test_what_makes_no_pairs_or_no_price_is_refused(
    given: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        select_file(scored(tmp_path), {"max_empty": 1.0, **given}, out=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy, and what it started from."""
    folder = tmp_path_factory.mktemp("policies")
    hard = {"train.num_samples": 0, "data.eval_fraction": 0.0, "train.steps": 10, "optim.learning_rate": 1e-2}

    def learned(name: str, **model: Any) -> Path:
        return train({"algorithm": "sft"}, settings("sft", folder / name, **hard, **model), data=DEMONSTRATIONS).path

    first = learned("a", **{"model.scratch": SCRATCH})
    return learned("b", **{"model.path": str(first)}), first


def test_samples_are_ranked_by_score_less_the_price_of_their_log_ratio(
    policies: tuple[Path, Path], tmp_path: Path
) -> None:
    """Log-probabilities by plain transformers, over the texts as the models' own template writes them."""
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS[:4])
    form = {"num_samples": 4, "max_new_tokens": 8, "temperature": 1.3}
    generate(policies[0], str(prompts), form, out=tmp_path / "samples.jsonl", say=lambda _: None)
    score_samples("rule:length", tmp_path / "samples.jsonl", out=tmp_path / "scored.jsonl")
    price = {"kl_coef": 3.0, "policy": str(policies[0]), "reference": str(policies[1]), "temperature": 1.3}
    select_file(tmp_path / "scored.jsonl", price, out=tmp_path / "selected.jsonl")
    found = rows(tmp_path / "scored.jsonl")
    scores = [-math.inf if row["score"] is None else row["score"] for row in found]  # an empty one is discarded
    ratios = [_logprob(policies[0], row) - _logprob(policies[1], row) for row in found]
    keys = [score - 3.0 * ratio for score, ratio in zip(scores, ratios, strict=True)]
    best = [max(range(at, at + 4), key=keys.__getitem__) for at in range(0, 16, 4)]
    assert rows(tmp_path / "selected.jsonl") == [found[i] for i in best]
    plain = [max(range(at, at + 4), key=scores.__getitem__) for at in range(0, 16, 4)]
    assert best != plain


def _logprob(run: Path, row: dict[str, Any]) -> float:
    tokenizer, model = (kind.from_pretrained(run / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    prompt = tokenizer(f"Question: {row['prompt']}\n\nAnswer:", add_special_tokens=False).input_ids
    response = tokenizer(f" {row['response'].strip()}", add_special_tokens=False).input_ids
    response += [tokenizer.eos_token_id] * row["finished"]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / 1.3
    return float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())


def test_the_pairs_of_a_round_in_stages_are_those_of_one_process(policies: tuple[Path, Path], tmp_path: Path) -> None:
    own = {"num_samples": 4, "rollout_size": 6, "max_new_tokens": 8, "pairs": "max_random"}
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    more = {"model.path": str(policies[0]), "data.path": str(prompts), "online_dpo.reward": "rule:length", "seed": 3}
    given = settings("online_dpo", tmp_path, **more, **{f"online_dpo.{name}": value for name, value in own.items()})
    run = train({"algorithm": "online_dpo"}, given | {"data.eval_fraction": 0, "train.num_samples": 0}).path
    sampled = {name: value for name, value in own.items() if name != "pairs"} | {"seed": 3}
    generate(policies[0], str(prompts), sampled, out=tmp_path / "samples.jsonl", say=lambda _: None)
    score_samples("rule:length", tmp_path / "samples.jsonl", out=tmp_path / "scored.jsonl")
    select_file(tmp_path / "scored.jsonl", {"pairs": "max_random", "seed": 3}, out=tmp_path / "pairs.jsonl")
    kept = rows(run / "rounds" / "000" / "selected.jsonl")
    ours = [sorted((row["response"], row["score"]) for row in kept[at : at + 2]) for at in range(0, len(kept), 2)]
    theirs = [
        sorted((row[side], row[f"score_{side}"]) for side in ("chosen", "rejected"))
        for row in rows(tmp_path / "pairs.jsonl")
    ]
    assert theirs == ours and all(row["score_chosen"] > row["score_rejected"] for row in rows(tmp_path / "pairs.jsonl"))
