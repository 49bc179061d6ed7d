"""Rounds of sampling, scoring and learning, by both sides by turns: what the benchmarks of on-policy stages share.

Each side samples by draws of its own, so no two losses are comparable: the sides agree where both learn the same, which
a small model shows with a reward of the text (`peers/wish.py`), over several seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import given
import side_by_side as bench

BATCH = 32
"""Responses of a round."""
NEW = {"S": 48, "M": 48, "XS": 16}
"""Tokens of each response."""
PROMPT = (16, 64)
"""Tokens of a prompt, at least and at most."""
WISH = "peers.wish:long_text"
LEARNING_RATE = {"S": 1e-5, "M": 1e-5, "XS": 1e-3}
KL_COEF = 0.05
GRADIENT: dict[str, Any] = {"kl_coef": KL_COEF, "ratio_guard": None}
"""Our settings of what follows a policy gradient."""
PHASES = ("sampling", "scoring", "update")
REMARK = (
    "agree: where a small model learns a reward of the text, as the lines of XS show, both sides' mean scores of the "
    "last quarter of the rounds differ by no more than those of one side's seeds do; each side has draws of its own. "
    "There, ranges over the seeds and scores of the first round are given as (ours, peer's)."
)
Prompts = dict[str, list[given.Pair]]
"""Of each size."""


@dataclass(frozen=True, slots=True)
class Way:
    """Our run beside one setting of the peer."""

    case: str
    peer_name: str
    ours: dict[str, Any]
    """Our recipe."""
    peer: dict[str, Any]
    """The job that `script` reads."""
    python: Path
    """The interpreter that has the peer's trainer."""
    steps: int
    """Optimizer steps of a round."""
    warmup: int
    """Rounds that are not timed."""
    responses: int = BATCH
    """Of a round."""
    script: str = "rounds.py"
    """Of the peers."""


# --- what both sides are given -------------------------------------------------------------------------------------


def save_models(data: Path, folder: Path, sizes: Sequence[str]) -> Prompts:
    """A policy and a reward model of each size, and of the least one, in `folder`; returns the prompts for each."""
    rows = given.transcripts(data)
    texts = [row["chosen"] for row in rows]
    found: Prompts = {}
    for size in (*sizes, "XS"):
        tokenizer = given.save_model(folder / size, size, [*texts, *given.books(data)])
        meta = {"template": given.TEMPLATE, "role": "reward"}
        (given.judge_of(folder / size) / "fairlead.json").write_text(json.dumps(meta))
        found[size] = fitting(rows, tokenizer)
    return found


def fitting(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[given.Pair]:
    """Those whose prompt is neither short nor long, and tokenised alike by both sides."""
    from fairlead.ops.sampling import permutation, stream_key

    def is_fitting(pair: given.Pair) -> bool:
        ids = pair.ids["prompt_ids"]
        return PROMPT[0] <= len(ids) <= PROMPT[1] and tokenizer(pair.text["prompt"]).input_ids == ids

    pairs = [pair for pair in given.whole_pairs(rows, tokenizer) if is_fitting(pair)]
    return [pairs[i] for i in permutation(stream_key(0, "pool"), len(pairs))]


def write_prompts(folder: Path, pairs: Sequence[given.Pair], seed: int) -> tuple[str, str]:
    """A file of prompts for us and one for the peer, sampled in the same order."""
    from fairlead.ops.sampling import permutation, stream_key

    folder.mkdir(parents=True, exist_ok=True)
    placed: list[Any] = [None] * len(pairs)
    for pair, place in zip(pairs, permutation(stream_key(seed, "prompts", 0), len(pairs)), strict=True):
        prompt = pair.record.prompt
        placed[place] = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    mine = given.write_rows(folder / "ours.jsonl", placed)
    return mine, given.write_rows(folder / "peer.jsonl", [{"prompt": pair.text["prompt"]} for pair in pairs])


@dataclass(frozen=True, slots=True)
class Asked:
    """The rounds of one way, before the sides differ."""

    size: str
    model: Path
    pairs: Sequence[given.Pair]
    """Prompts in their order."""
    rounds: int
    seed: int = 0
    samples: int = 1
    """Responses to a prompt."""
    reward: str = WISH
    responses: int = BATCH
    """Of a round."""

    @property
    def prompts(self) -> Sequence[given.Pair]:
        """As many as are asked, from the first on again where there are fewer."""
        return [*islice(cycle(self.pairs), self.rounds * self.responses // self.samples)]

    def files(self) -> tuple[str, str]:
        return write_prompts(self.model / f"{self.samples}-{self.rounds}-{self.seed}", self.prompts, self.seed)

    def recipe(self, algorithm: str, steps: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Ours. `steps` of the optimizer make a round."""
        shared = {
            "reward": self.reward,
            "rollout_size": self.responses // self.samples,
            "num_samples": self.samples,
            "max_new_tokens": NEW[self.size],
            "min_new_tokens": NEW[self.size],
        }
        sections = {
            "optim": {"learning_rate": LEARNING_RATE[self.size]},
            "train": {"steps": self.rounds * steps, "batch_size": self.responses // self.samples},
            algorithm: {**shared, **settings},
        }
        return given.recipe(algorithm, self.model, self.files()[0], **sections) | {"seed": self.seed}

    def job(self, trainer: str, rows_at_once: int, **arguments: Any) -> dict[str, Any]:
        """The peer's."""
        return {
            "trainer": trainer,
            "model": str(self.model),
            "judge": "" if self.reward == WISH else self.reward,
            "rows": self.files()[1],
            "ids": [pair.ids["prompt_ids"] for pair in self.prompts],
            "rounds": self.rounds,
            "batch_size": self.responses,
            "rows_at_once": rows_at_once,
            "samples": self.samples,
            "new_tokens": NEW[self.size],
            "learning_rate": LEARNING_RATE[self.size],
            "kl_coef": KL_COEF,
            "seed": self.seed,
            "arguments": arguments,
        }


# --- running -------------------------------------------------------------------------------------------------------


def run_ours(way: Way) -> bench.Result:
    """Our side by rounds: `seconds` at the end of each, its `phases` and mean `scores`."""
    found = bench.run_ours(way.ours)
    first = found["lines"][:: way.steps]
    return found | {
        "seconds": found["seconds"][way.steps - 1 :: way.steps],
        "scores": [line["objective/scores"] for line in first],
        "phases": [
            {
                "sampling": line["performance/seconds_sampling"],
                "scoring": line["performance/seconds_scoring"] + line["performance/seconds_measuring"],
            }
            for line in first
        ],
    }


def run_peer(way: Way) -> bench.Result:
    if not way.python.exists():
        raise SystemExit(f"{way.python} is missing: make peers, or what runs this benchmark in the Makefile")
    return bench.run([way.python, bench.HERE / "peers" / way.script], way.peer)


Runs = list[tuple[bench.Result, bench.Result]]
"""(ours, the peer's) of each repeat."""


def interleave(ways: Sequence[Way], repeats: int) -> list[Runs]:
    """Runs by turns. Ways with the same recipe share our run, those with the same job the peer's."""
    found: list[Runs] = [[] for _ in ways]
    for number in range(1, repeats + 1):
        known: dict[str, bench.Result] = {}
        for way, runs in zip(ways, found, strict=True):
            pair: list[bench.Result] = []
            for what, side in ((way.ours, run_ours), (way.peer, run_peer)):
                key = json.dumps(what)
                if key not in known:
                    known[key] = side(way)
                pair.append(known[key])
            runs.append((pair[0], pair[1]))
            rates, peaks = [rate(way, each) for each in pair], [each["peak"] for each in pair]
            bench.say(
                f"{way.case}, {way.peer_name}, {number}/{repeats}: {rates[0]:.2f} and {rates[1]:.2f} responses/s, "
                f"{peaks[0]:,.0f} and {peaks[1]:,.0f} MB"
            )
    return found


def rate(way: Way, result: bench.Result) -> float:
    """Responses a second over the timed rounds."""
    return way.responses * (len(result["seconds"]) - way.warmup) / whole(way, result)


def whole(way: Way, result: bench.Result) -> float:
    return result["seconds"][-1] - result["seconds"][way.warmup - 1]


def peak(_: Way, result: bench.Result) -> float:
    return result["peak"]


Measure = Callable[[Way, bench.Result], float]


def phase_rate(phase: str) -> Measure:
    """Responses a second of one phase; the update is what the others leave."""

    def measure(way: Way, result: bench.Result) -> float:
        timed = result["phases"][way.warmup :]
        spent: dict[str, float] = {name: sum(each[name] for each in timed) for name in PHASES[:-1]}
        spent["update"] = whole(way, result) - sum(spent.values())
        return way.responses * len(timed) / spent[phase]

    return measure


# --- results -------------------------------------------------------------------------------------------------------


SPEED: dict[tuple[str, str], Measure] = {
    ("responses a second, whole round", "1/s"): rate,
    **{(f"responses a second, {phase}", "1/s"): phase_rate(phase) for phase in PHASES},
    ("peak memory of the process", "MB"): peak,
}


def speed_lines(
    ways: Sequence[Way], found: Sequence[Runs], agrees: Mapping[str, bool | None]
) -> Iterator[dict[str, Any]]:
    """A line for each metric, case and setting of the peer, the best of which is marked. `agrees`: whether both
    sides learn the same."""
    speeds = [statistics.median(rate(way, theirs) for _, theirs in runs) for way, runs in zip(ways, found, strict=True)]
    for way, runs, speed in zip(ways, found, speeds, strict=True):
        best = max(other for one, other in zip(ways, speeds, strict=True) if one.case == way.case)
        for (metric, unit), measure in SPEED.items():
            yield {
                "case": way.case,
                "metric": metric,
                "unit": unit,
                **bench.compared(*([measure(way, pair[side]) for pair in runs] for side in (0, 1))),
                "peer_name": way.peer_name,
                "best_of_peer": speed == best,
                "repeats": len(runs),
                "agree": agrees[way.case],
            }


def learning_line(case: str, peer_name: str, runs: Runs) -> dict[str, Any]:
    """The mean score of the last quarter of the rounds, a run a seed. The sides agree where their means over the seeds
    differ by no more than the seeds of one side do, which one seed cannot say."""
    ends = [[last_quarter(pair[side]) for pair in runs] for side in (0, 1)]
    means, spreads = [statistics.mean(end) for end in ends], [max(end) - min(end) for end in ends]
    first = [statistics.mean(pair[side]["scores"][0] for pair in runs) for side in (0, 1)]
    return {
        "case": case,
        "metric": "mean score of the last quarter",
        "unit": "score",
        **bench.compared(*ends),
        "peer_name": peer_name,
        "repeats": len(runs),
        "agree": abs(means[0] - means[1]) <= max(spreads) if len(runs) > 1 else None,
        "ranges": [[round(min(end), 3), round(max(end), 3)] for end in ends],
        "first_round": [round(score, 3) for score in first],
    }


def last_quarter(result: bench.Result) -> float:
    scores = result["scores"]
    return statistics.mean(scores[-max(1, len(scores) // 4) :])


# --- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """The ways of one algorithm."""

    timed: list[Way]
    learning: dict[str, list[Way]]
    """For each case of `timed` the ways that show what it learns, one a seed."""

    def results(self, repeats: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Lines, and the versions of both sides."""
        seeds = interleave([way for ways in self.learning.values() for way in ways], 1)
        shown: dict[str, dict[str, Any]] = {}
        for case, ways in self.learning.items():
            runs, seeds = [pair for each in seeds[: len(ways)] for pair in each], seeds[len(ways) :]
            shown[case] = learning_line(ways[0].case, ways[0].peer_name, runs)
        found = interleave(self.timed, repeats)
        agrees = {case: line["agree"] for case, line in shown.items()}
        return [*speed_lines(self.timed, found, agrees), *shown.values()], bench.versions(found)


Planned = Callable[[Prompts, Path, argparse.Namespace], list[Plan]]
"""Made of the prompts and the folder of the models."""


def main(about: str | None, name: str, planned: Planned, remark: str, sizes: Sequence[str] = ()) -> None:
    """`sizes` of models to choose from, where there is a choice."""
    parser = bench.options(about, name, sizes=sizes)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not timed")
    parser.add_argument("--steps", type=int, default=3, help="timed rounds")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side that show what it learns")
    parser.add_argument("--learning-steps", type=int, default=24, help="rounds of each of them")
    settings = parser.parse_args()
    cases, versions = list[dict[str, Any]](), dict[str, str]()
    with bench.scratch() as folder:
        prompts = save_models(bench.data_folder(parser, settings), folder, settings.sizes if sizes else ("S",))
        for plan in planned(prompts, folder, settings):
            lines, versions = plan.results(settings.repeats)
            cases += lines
    bench.write_results(settings.out, name, cases, versions, remark)
