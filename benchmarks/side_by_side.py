"""What the benchmarks beside TRL share: models and rows on disk, both sides in fresh processes by turns, ratios.

Both sides read the same weights and the same rows in the same order; their losses at every step decide whether a
comparison counts. Run as a script it is our side of one run: `side_by_side.py JOB RESULT`.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE / "peers" / ".venv" / "bin" / "python"
SIZES = {
    "S": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 688},
    "M": {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1376},
}
VOCABULARY = {"S": 8192, "M": 32000}
LENGTH = 512
"""Longest row in tokens."""
TEMPLATE = "hh"
TOLERANCE = 1e-4
"""Both sides' losses may differ by this share of the peer's, at every step."""
MEGABATCH = 50
"""Batches that transformers' group_by_length sorts together."""


# --- models and rows -----------------------------------------------------------------------------------------------


def save_model(folder: Path, size: str, texts: Sequence[str]) -> Any:
    """A random Llama in `folder`, once more as a reward model in `folder`-reward; returns its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    from fairlead.models.heads import ScalarHead
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
    config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(config)
    judge.model.load_state_dict(model.model.state_dict())
    head = ScalarHead(config.hidden_size, role="reward", seed=0)  # as our stage of seed 0 begins
    with torch.no_grad():
        judge.score.weight.copy_(head.linear.weight)
    for each, place in ((model, folder), (judge, folder.with_name(f"{folder.name}-reward"))):
        each.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return tokenizer


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
    """A row of HH for us, the same as text for the peer, and the ids that both have to see."""

    row: dict[str, str]
    text: dict[str, str]
    ids: dict[str, list[int]]

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return len(self.ids["prompt_ids"]) + max(len(self.ids["chosen_ids"]), len(self.ids["rejected_ids"]))


def whole_pairs(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[Pair]:
    """The pairs that neither side drops or cuts, and whose ids both agree on: our template's text, tokenised whole."""
    from fairlead.data.records import parse_row
    from fairlead.data.render import Renderer
    from fairlead.data.sources import Row
    from fairlead.types import Preference

    renderer = Renderer(tokenizer, template=TEMPLATE, max_length=1 << 20)
    pairs: list[Pair] = []
    for number, row in enumerate(rows):
        (record,) = parse_row(Row(row, f"row {number}"), Preference)
        if isinstance(record, str):
            continue
        tree = renderer.trees([record])[0][0]
        parts = {"prompt": tree.prompt, "chosen": tree.responses[0], "rejected": tree.responses[1]}
        ids = {f"{name}_ids": list(part) for name, part in parts.items()}
        text = {name: tokenizer.decode(part).removesuffix(tokenizer.eos_token) for name, part in parts.items()}
        pair = Pair(row, text, ids)
        sides = [text["prompt"] + text[name] + tokenizer.eos_token for name in ("chosen", "rejected")]
        apart = [[*ids["prompt_ids"], *ids[f"{name}_ids"]] for name in ("chosen", "rejected")]
        if pair.length <= LENGTH and [tokenizer(side).input_ids for side in sides] == apart:
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


# --- one run of one side -------------------------------------------------------------------------------------------


def recipe(algorithm: str, model: Path, path: str, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, with the optimizer's settings of both sides."""
    base: dict[str, Any] = {
        "algorithm": algorithm,
        "seed": 0,
        "model": {"path": str(model)},
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
) -> dict[str, Any]:
    """What peers/train.py reads. It makes sure that `texts` (text, ids) and the columns `ids` of the first rows are as
    here."""
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
    }


@dataclass(frozen=True, slots=True)
class Way:
    """One setting of the peer beside our run on the same rows."""

    peer_name: str
    ours: dict[str, Any]
    """Our recipe."""
    peer: dict[str, Any]
    """The job that peers/train.py reads."""
    units: list[int]
    """Of each step: tokens or pairs."""
    warmup: int
    """Steps that are not timed."""


Result = dict[str, Any]
"""What one run of one side measured: `seconds` at the end of each step, `losses`, `peak` MB of the whole process,
`prepared` seconds to tokenise and, on our side of DPO, for the reference, `whole` seconds from the call, with imports
done, to the end of the last step, and `versions`."""


def run(command: Sequence[str | Path], job: Mapping[str, Any]) -> Result:
    """A side's result; its messages are shown only when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        order, found = Path(folder) / "job.json", Path(folder) / "result.json"
        order.write_text(json.dumps(job))
        environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}
        process = subprocess.run(
            [*map(str, command), str(order), str(found)],
            env=os.environ | environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            raise SystemExit(f"{process.stdout[-4000:]}\n{' '.join(map(str, command))} failed")
        return json.loads(found.read_text())


def run_ours(recipe: dict[str, Any]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return run([sys.executable, HERE / "side_by_side.py"], recipe | {"run": {"directory": folder, "name": "run"}})


def run_peer(script: str, job: Mapping[str, Any]) -> Result:
    if not PEER_PYTHON.exists():
        raise SystemExit("the peers' environment is missing: make peers")
    return run([PEER_PYTHON, HERE / "peers" / script], job)


def ours(recipe: dict[str, Any]) -> Result:
    """Our side of one run: the real stage with all that it writes, its source timed."""
    import fairlead
    from fairlead.algorithms import find

    for name in ("fairlead.runner", "peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    algorithm, prepared = find(recipe["algorithm"]), list[float]()

    def source(stage: Any) -> Any:
        start = time.perf_counter()
        made = algorithm.source(stage)
        prepared.append(time.perf_counter() - start)
        return made

    globals()["TIMED"] = replace(algorithm, source=source)
    began = time.time()
    finished = fairlead.train(recipe | {"algorithm": "__main__:TIMED"})
    log = finished.path / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "seconds": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "peak": peak_memory(),
        "prepared": prepared[0],
        "whole": log.stat().st_mtime - began,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def peak_memory() -> float:
    """VmHWM of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


# --- comparing -----------------------------------------------------------------------------------------------------


def interleave(case: str, ways: Sequence[Way], repeats: int) -> list[list[tuple[Result, Result]]]:
    """Runs by turns, (ours, the peer's) for each way and repeat. Ways with the same rows share our run."""
    found: list[list[tuple[Result, Result]]] = [[] for _ in ways]
    for number in range(1, repeats + 1):
        known: dict[str, Result] = {}
        for way, runs in zip(ways, found, strict=True):
            key = json.dumps(way.ours)
            if key not in known:
                known[key] = run_ours(way.ours)
            runs.append((known[key], run_peer("train.py", way.peer)))
            mine, theirs = runs[-1]
            say(
                f"{case}, {way.peer_name}, {number}/{repeats}: {rate(way, mine):,.2f} and {rate(way, theirs):,.2f} /s, "
                f"{mine['peak']:,.0f} and {theirs['peak']:,.0f} MB, losses differ by {difference(runs):.1e}"
            )
    return found


def rate(way: Way, result: Result) -> float:
    """Units a second over the timed steps."""
    seconds = result["seconds"]
    return sum(way.units[way.warmup :]) / (seconds[-1] - seconds[way.warmup - 1])


def peak(_: Way, result: Result) -> float:
    return result["peak"]


def difference(runs: Sequence[tuple[Result, Result]]) -> float:
    """The largest of any step of any repeat, as a share of the peer's loss."""
    return max(
        abs(one - other) / abs(other)
        for mine, theirs in runs
        for one, other in zip(mine["losses"], theirs["losses"], strict=True)
    )


Measure = Callable[[Way, Result], float]
Metrics = Mapping[tuple[str, str], tuple[Measure, Measure]]
"""(name, unit) -> how it is had on our side and on the peer's."""
PEAK: Metrics = {("peak memory of the process", "MB"): (peak, peak)}


def results(
    case: str, ways: Sequence[Way], found: Sequence[Sequence[tuple[Result, Result]]], metrics: Metrics
) -> list[dict[str, Any]]:
    """A line for each metric and setting of the peer. The first metric is a speed, and says which setting is best."""
    speed = next(iter(metrics.values()))[1]
    speeds = [statistics.median(speed(way, each[1]) for each in runs) for way, runs in zip(ways, found, strict=True)]
    return [
        {
            "case": case,
            "metric": metric,
            "unit": unit,
            **compared([mine(way, each[0]) for each in runs], [theirs(way, each[1]) for each in runs]),
            "peer_name": way.peer_name,
            "best_of_peer": own == max(speeds),
            "repeats": len(runs),
            "agree": difference(runs) <= TOLERANCE,
            "losses_differ_by": float(f"{difference(runs):.1e}"),
        }
        for way, runs, own in zip(ways, found, speeds, strict=True)
        for (metric, unit), (mine, theirs) in metrics.items()
    ]


def compared(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(mine, others, strict=True)]
    return {
        "ours": round(statistics.median(mine), 2),
        "peer": round(statistics.median(others), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }


def versions(found: Sequence[Sequence[tuple[Result, Result]]]) -> dict[str, str]:
    mine, theirs = found[0][0]
    return mine["versions"] | theirs["versions"]


# --- the command ---------------------------------------------------------------------------------------------------


def options(about: str | None, name: str, *, needs_data: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    if needs_data:
        parser.add_argument("--data", default=os.environ.get("FAIRLEAD_DATA"), help="folder with hh-rlhf/ and text/")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    return parser


def data_folder(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> Path:
    if not settings.data:
        parser.error("name the folder that holds hh-rlhf/ and text/ by --data or FAIRLEAD_DATA")
    return Path(settings.data)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for models and rows, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="fairlead-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_results(
    out: Path, name: str, cases: Sequence[Mapping[str, Any]], versions: Mapping[str, str], remark: str
) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    result = {
        "command": f"make bench-{name} ARGS={' '.join(sys.argv[1:])!r}",
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
        "versions": dict(versions),
        "remark": remark,
        "cases": list(cases),
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    for each in cases:
        best = "*" if each.get("best_of_peer", True) else " "
        numbers = f"{each['ours']:10.2f} {each['peer']:10.2f} {each['ratio']:7.3f}"
        spread = f"[{each['ratio_low']:.3f} {each['ratio_high']:.3f}] {'agree' if each['agree'] else 'DIFFER'}"
        say(f"{best} {each['case']:14} {each['metric']:30} {numbers} {spread}  {each['peer_name']}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(ours(json.loads(Path(sys.argv[1]).read_text()))))
