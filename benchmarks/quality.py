"""Reward models and DPO on HH and on Stack Exchange beside TRL and beside baselines: accuracy on held-out pairs.

    make bench-quality
    make bench-quality ARGS="--limit 40 --pretrain-steps 4 --repeats 1"

One small Llama is pretrained on plain text and on the training pairs, and fine-tuned on the chosen answers of each data
set. Both sides start from its weights and read the same pairs in the same order; pairs longer than a row are left out.
Held-out prompts are in no other part. As `quality.py JOB RESULT` it is our side of one run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import given
import numpy as np
import side_by_side as bench
from transformers import AutoModelForCausalLM

import fairlead
from fairlead.algorithms import find
from fairlead.algorithms.stage import Stage
from fairlead.assemble import texts_of
from fairlead.data.prepare import prepare
from fairlead.data.records import load_records
from fairlead.data.sources import Counts
from fairlead.data.splits import keyed_hash, split_of
from fairlead.data.text import read_documents, text_files
from fairlead.evaluation.baselines import length_only, tf_idf
from fairlead.evaluation.crossval import INNER_SHARE, group_key
from fairlead.evaluation.metrics import (
    Numbers,
    correctness,
    pair_mean,
    paired_difference,
    per_prompt,
    ratio_interval,
    sign_flip_p_value,
)
from fairlead.models.load import train_tokenizer
from fairlead.ops.sampling import permutation, stream_key
from fairlead.training.budget import SMALLEST, TokenBudget
from fairlead.training.loop import evaluate
from fairlead.types import Preference


@dataclass(frozen=True, slots=True)
class DataSet:
    kind: str
    """As `fairlead prepare` knows it."""
    folder: str
    template: str
    options: Mapping[str, Any]
    """Of its preparation: 3 of 10 prompts are held out, all others serve the pairs."""


SETS = {
    "HH": DataSet("hh-rlhf", "hh-rlhf", "hh", {"heldout": 0.3, "pretrain_on_chosen": False}),
    "Stack Exchange": DataSet(
        "stack-exchange",
        "stackexchange",
        "question-answer",
        {"reward": 0.7, "evaluation": 0.3, "finetune": 0.0, "rl": 0.0},
    ),
}
SCRATCH = {"hidden_size": 192, "num_layers": 4, "num_heads": 6, "vocab_size": 6144, "context_length": given.LENGTH}
PRETRAIN = {"learning_rate": 3e-3, "betas": [0.9, 0.95], "schedule": "cosine", "warmup_ratio": 0.03}
PRETRAIN_ROWS = 4
"""Of a step."""
SFT = {"learning_rate": 5e-4, "schedule": "cosine", "warmup_ratio": 0.05}
CURVE = (125, 250, 500)
"""Training pairs of a reward model besides all of them, in one order."""
DPO_PAIRS = 500
BATCH = 16
LEARNING_RATE = {"reward": 3e-4, "dpo": 1e-4}
"""Chosen on a part of the training pairs, where a second epoch was of no use."""
BETA = 0.1
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""As many runs go side by side as there are cores."""
SEED = 0
REMARK = (
    "A Llama of 4 layers and width 192 in fp32, AdamW at a constant rate; the same weights, pairs and order on both "
    "sides, another order for each repeat. ours and peer are means over the repeats, intervals are 95 % bootstrap "
    "intervals over prompts, difference is ours less peer on the same pairs; agree: the intervals of both overlap. The "
    "baselines read the responses alone, and are fitted to the same training pairs."
)


@dataclass(frozen=True, slots=True)
class Split:
    """The pairs of one data set that fit a row."""

    name: str
    read: int
    """Pairs before the longer ones were left out."""
    train: list[given.Pair]
    heldout: list[given.Pair]

    @property
    def template(self) -> str:
        return SETS[self.name].template

    @property
    def prompts(self) -> list[str]:
        """Of the held-out pairs: what is resampled."""
        return [key_of(pair) for pair in self.heldout]

    @property
    def counts(self) -> dict[str, int]:
        pairs = {"pairs": self.read, "training_pairs": len(self.train), "heldout_pairs": len(self.heldout)}
        return pairs | {"heldout_prompts": len(set(self.prompts))}


def key_of(pair: given.Pair) -> str:
    return group_key(pair.record)


# --- what both sides are given -------------------------------------------------------------------------------------


def prepared(name: str, data: Path, folder: Path) -> dict[str, list[Preference]]:
    """The pairs of the parts train and heldout, as `fairlead prepare` splits them."""
    of, place = SETS[name], folder / SETS[name].kind
    prepare(of.kind, data / of.folder, place, **of.options)
    return {part: load_records(str(place), Preference, heldout=part == "heldout")[0] for part in ("train", "heldout")}


def fitting(name: str, parts: Mapping[str, Sequence[Preference]], tokenizer: Any, limit: int | None) -> Split:
    def whole(pairs: Sequence[Preference]) -> list[given.Pair]:
        return given.whole_pairs([row_of(pair) for pair in pairs], tokenizer, SETS[name].template)[:limit]

    return Split(name, sum(map(len, parts.values())), **{part: whole(pairs) for part, pairs in parts.items()})


def row_of(pair: Preference) -> dict[str, Any]:
    prompt = pair.prompt if isinstance(pair.prompt, str) else list(pair.prompt)
    return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def model_of(folder: Path, of: Split) -> Path:
    return folder / f"sft {of.name}" / "model"


def start_models(folder: Path, texts: Sequence[str], splits: Sequence[Split], tokenizer: Any, steps: int) -> float:
    """Pretrains one model and fine-tunes it on each data set, for `model_of`; returns the perplexity of the first on
    held-out texts."""
    pairs = [pair for of in splits for pair in of.train]
    own = dict.fromkeys(pair.text["prompt"] + pair.text[side] for pair in pairs for side in ("chosen", "rejected"))
    pretraining = given.recipe(
        "pretrain",
        None,
        given.write_rows(folder / "pretrain.jsonl", [{"text": text} for text in [*texts, *own]]),
        model={"scratch": SCRATCH, "tokenizer": str(folder / "tokenizer")},
        data={"packing": "wrapped", "eval_fraction": 0.01},
        optim=PRETRAIN,
        train={"steps": steps, "batch_size": PRETRAIN_ROWS},
        run={"directory": str(folder), "name": "pretrain"},
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    found = run_ours(pretraining, {})
    recipes = [
        given.recipe(
            "sft",
            folder / "pretrain",
            given.write_rows(folder / f"sft {of.name}.jsonl", [pair.row for pair in of.train]),
            data={"template": of.template},
            optim=SFT,
            train={"epochs": 2, "batch_size": 2 * BATCH},
            run={"directory": str(folder), "name": f"sft {of.name}"},
        )
        for of in splits
    ]
    at_once([partial(run_ours, recipe) for recipe in recipes])
    for of in splits:
        start = model_of(folder, of)
        given.save_judge(start, AutoModelForCausalLM.from_pretrained(start), tokenizer)
    return found["last"]["eval/perplexity"]


@dataclass(frozen=True, slots=True)
class Case:
    of: Split
    algorithm: str
    number: int
    """Training pairs."""
    repeats: int

    @property
    def name(self) -> str:
        return f"{self.of.name}, {self.algorithm}, {self.number} pairs"

    def train(self, seed: int) -> list[given.Pair]:
        """Prompt after prompt in an order of the seed: the pairs of a smaller case are among those of a larger one."""
        return sorted(self.of.train, key=lambda pair: keyed_hash(seed, "curve", key_of(pair)))[: self.number]

    def order(self, seed: int) -> list[given.Pair]:
        """The pairs as both sides read them, once, in whole batches."""
        pairs = self.train(seed)
        read = [pairs[i] for i in permutation(stream_key(seed, "quality"), len(pairs))]
        return read[: len(read) // BATCH * BATCH]

    def sides(self, folder: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Our recipe and the peer's job on the same pairs."""
        pairs, place = self.order(seed), folder / f"{self.name}, {seed}"
        mine, theirs = given.write_pairs(place, pairs)
        heldout = given.write_rows(place / "heldout-ours.jsonl", [pair.row for pair in self.of.heldout])
        own: dict[str, Any] = {"beta": BETA} if self.algorithm == "dpo" else {}
        start, steps, rate = model_of(folder, self.of), len(pairs) // BATCH, LEARNING_RATE[self.algorithm]
        recipe = given.recipe(
            self.algorithm,
            start,
            mine,
            data={"template": self.of.template, "eval_path": heldout},
            optim={"learning_rate": rate},
            train={"steps": steps, "batch_size": BATCH, "save_every": "never"},
            run={"directory": str(place), "name": "run"},
            **{self.algorithm: own},
        )
        job = given.job(
            self.algorithm,
            start if self.algorithm == "dpo" else given.judge_of(start),
            theirs,
            steps=steps,
            batch_size=BATCH,
            rows_at_once=1,
            learning_rate=rate,
            arguments={"max_length": given.LENGTH, **own},
            ids=[self.ids(pair) for pair in pairs],
            heldout=given.write_rows(place / "heldout-peer.jsonl", [pair.text for pair in self.of.heldout]),
            heldout_ids=[self.ids(pair) for pair in self.of.heldout],
        )
        return recipe, job

    def ids(self, pair: given.Pair) -> dict[str, list[int]]:
        return pair.ids if self.algorithm == "dpo" else pair.sides


# --- runs ----------------------------------------------------------------------------------------------------------


class Apart(Stage):
    """A stage whose evaluation gives the margin of each held-out pair, by its number."""

    def loss_evaluation(self, passes: Any, batches: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            margins = (evaluate(self.models, tuple(passes), [batch])["rewards/margins"] for batch in batches())
            return {str(number): margin for number, margin in enumerate(margins)}

        return measure


def ours(recipe: dict[str, Any]) -> bench.Result:
    """Our side of one run: the real stage, and the margin of each held-out pair at its end."""
    algorithm, measures = find(recipe["algorithm"]), list[Callable[[], dict[str, float]]]()

    def evaluation(stage: Stage) -> Callable[[], dict[str, float]]:
        if algorithm.name in LEARNING_RATE:  # made before the first step: the reference is the model as it is now
            parts: dict[str, Any] = {field.name: getattr(stage, field.name) for field in fields(stage)}
            parts["budget"] = TokenBudget(SMALLEST)
            measures.append(algorithm.evaluation(Apart(**parts)))
        return algorithm.evaluation(stage)

    globals()["MEASURED"] = replace(algorithm, evaluation=evaluation)
    finished = fairlead.train(recipe | {"algorithm": "__main__:MEASURED"})
    lines = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "last": lines[-1],
        "accuracy": lines[-1].get("eval/rewards/accuracies"),
        "margins": [margin for measure in measures for margin in measure().values()],
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "scikit-learn")},
    }


def run_ours(recipe: dict[str, Any], variables: Mapping[str, str] = ALONE) -> bench.Result:
    return bench.run([sys.executable, Path(__file__).resolve()], recipe, variables)


def at_once(calls: Sequence[Callable[[], bench.Result]]) -> list[bench.Result]:
    """Results of runs that go side by side, one a core; the first calls begin first."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda call: call(), calls))


def run_all(cases: Sequence[Case], folder: Path) -> list[list[tuple[bench.Result, bench.Result]]]:
    """Of each case and repeat, ours and the peer's."""
    sides = [case.sides(folder, seed) for case in cases for seed in range(case.repeats)]
    calls = [partial(bench.run_peer, "train.py", job, ALONE) for _, job in sides]
    found = at_once([*calls, *(partial(run_ours, recipe) for recipe, _ in sides)])
    runs = [*zip(found[len(sides) :], found[: len(sides)], strict=True)]
    for side in (side for run in runs for side in run):
        right, ties = correctness(side["margins"]), side["margins"].count(0.0)
        assert abs(right.sum() - side["accuracy"] * len(right)) <= ties / 2 + 1e-3, "not the accuracy that is reported"
    waiting = iter(runs)
    return [list(islice(waiting, case.repeats)) for case in cases]


# --- comparing -----------------------------------------------------------------------------------------------------


def compared(mine: Sequence[Numbers], others: Sequence[Numbers], prompts: Sequence[str]) -> dict[str, Any]:
    """Accuracies of two sides by the margins of the same pairs, [P] for each repeat."""
    repeats = [[correctness(margins) for margins in side] for side in (mine, others)]
    one, other = (np.mean(side, axis=0) for side in repeats)
    own, peer = (pair_mean(side, prompts, seed=SEED) for side in (one, other))
    ratio = ratio_interval(*(per_prompt(side, prompts)[0] for side in (one, other)), seed=SEED)
    by = paired_difference(one, other, prompts, seed=SEED)
    estimates = {"ours": own, "peer": peer, "ratio": ratio, "difference": by}
    line: dict[str, Any] = {}
    for name, estimate in estimates.items():
        line |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    line = {name: round(value, 4) for name, value in line.items()}
    return line | {
        "p_value": round(sign_flip_p_value(one - other, prompts, seed=SEED), 4),
        "by_repeat": [[round(float(right.mean()), 4) for right in side] for side in repeats],
    }


def baselines(case: Case) -> dict[str, list[Numbers]]:
    """Margins of the held-out pairs, for each repeat, whose training pairs may be others."""
    found: dict[str, list[Numbers]] = {"length only": [], "TF-IDF": []}
    heldout = [pair.record for pair in case.of.heldout]
    for seed in range(case.repeats):
        pairs = case.train(seed)
        shares = {"fit": 1 - INNER_SHARE, "choose": INNER_SHARE}
        inner = [split_of(key_of(pair), shares, seed) == "choose" for pair in pairs]
        train = [pair.record for pair in pairs]
        found["length only"].append(length_only(train, heldout)[1])
        found["TF-IDF"].append(tf_idf(train, heldout, inner)[1])
    return found


def lines(case: Case, runs: Sequence[tuple[bench.Result, bench.Result]]) -> list[dict[str, Any]]:
    """A line for TRL, and one for each baseline of a reward model."""
    mine, theirs = ([side["margins"] for side in sides] for sides in zip(*runs, strict=True))
    peers: dict[str, list[Numbers]] = {"TRL": theirs}
    if case.algorithm == "reward":
        peers |= baselines(case)
    found = [
        {
            "case": case.name,
            "metric": "accuracy on held-out pairs",
            "unit": "share",
            **compared(mine, others, case.of.prompts),
            "peer_name": name,
            "repeats": case.repeats,
            "training_pairs": case.number,
        }
        for name, others in peers.items()
    ]
    for line in found:
        overlap = line["ours_low"] <= line["peer_high"] and line["peer_low"] <= line["ours_high"]
        line["agree"] = overlap if line["peer_name"] == "TRL" else None
    found[0]["losses_differ_by"] = float(f"{bench.difference(runs):.1e}")
    return found


def main() -> None:
    parser = bench.options(__doc__, "quality", sizes=(), repeats=2, folders=("hh-rlhf", "stackexchange", "text"))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--limit", type=int, help="pairs of each part, to try the benchmark out")
    parser.add_argument("--pretrain-steps", type=int, default=600, help=f"of {PRETRAIN_ROWS} rows")
    settings = parser.parse_args()
    data = bench.data_folder(parser, settings)
    with bench.scratch() as folder:
        parts = {name: prepared(name, data, folder) for name in settings.sets}
        texts = [document["text"] for document in read_documents(text_files(data / "text"), Counts())]
        own = [text for pairs in parts.values() for text in texts_of(pairs["train"])]
        tokenizer = train_tokenizer([*texts, *own], SCRATCH["vocab_size"], given.LENGTH)
        splits = [fitting(name, parts[name], tokenizer, settings.limit) for name in settings.sets]
        perplexity = start_models(folder, texts, splits, tokenizer, settings.pretrain_steps)
        cases = [Case(of, "dpo", min(DPO_PAIRS, len(of.train)), settings.repeats) for of in splits]
        cases += [Case(of, "reward", len(of.train), settings.repeats) for of in splits]
        fewer = [(of, number) for number in reversed(CURVE) for of in splits if number < len(of.train)]
        cases += [Case(of, "reward", number, 1) for of, number in fewer]
        runs = run_all(cases, folder)
        found = [line for case, each in zip(cases, runs, strict=True) for line in lines(case, each)]
    more = {"data": {of.name: of.counts for of in splits}, "start_perplexity": round(perplexity, 2)}
    bench.write_results(settings.out, "quality", found, bench.versions(runs), REMARK, **more)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):
        Path(sys.argv[2]).write_text(json.dumps(ours(json.loads(Path(sys.argv[1]).read_text()))))
    else:
        main()
