"""What checkpoints cost: the seconds that a run waits for its saves, over all its seconds, at default settings.

    make bench-checkpoint                                         a full model and LoRA, eleven minutes each
    make bench-checkpoint ARGS="--minutes 1 --layers 2 --width 64 --save-every 20s"     to see that it runs

Eleven minutes hold one save that is due by time (`train.save_every` is ten minutes) and the last one, so that the share
is above that of a long run, given beside it: the seconds of one save over ten minutes. Runs are those of SFT over rows
of random words, `fairlead.train` with a recipe as a user would call it; the call that saves is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from memory import pairs, write_base, write_rows

import fairlead
from fairlead.config import TrainSection, parse_interval
from fairlead.training.checkpoint import Checkpointer

HERE = Path(__file__).resolve().parent
BOUND = 0.02
DEFAULT = str(TrainSection().save_every)
CALIBRATION = 4
"""Steps, of which the median tells how many fit into the time."""


@contextmanager
def timed_saves() -> Iterator[list[float]]:
    """The seconds of every call in which a checkpoint was written, the removal of old ones counted in."""
    seconds: list[float] = []
    real = Checkpointer.after_step

    def timed(self: Checkpointer, progress: Any) -> None:
        there, began = self.path(progress.step).exists(), time.monotonic()
        real(self, progress)
        if not there and self.path(progress.step).exists():
            seconds.append(time.monotonic() - began)

    Checkpointer.after_step = timed
    try:
        yield seconds
    finally:
        Checkpointer.after_step = real


def measured(case: str, settings: dict[str, Any], minutes: float) -> dict[str, Any]:
    def train(name: str, steps: int, save_every: str) -> fairlead.RunResult:
        own = {"run.name": f"{case} {name}", "train.steps": steps, "train.save_every": save_every}
        return fairlead.train({"algorithm": "sft"}, settings | own)

    lines = (train("calibration", CALIBRATION, "never").path / "metrics.jsonl").read_text().splitlines()
    at = [json.loads(line)["seconds"] for line in lines]
    step = statistics.median(after - before for before, after in pairwise(at))
    with timed_saves() as saves:
        result = train("timed", max(1, round(60 * minutes / step)), settings["train.save_every"])
    size = sum(f.stat().st_size for f in next((result.path / "checkpoints").iterdir()).iterdir())
    share, (_, interval) = sum(saves) / result.summary["seconds"], parse_interval(settings["train.save_every"])
    return {
        "case": case,
        "metric": "share of the run's time",
        "unit": "1",
        "ours": round(share, 5),
        "bound": BOUND,
        "long_run": round(statistics.median(saves) / interval, 5),
        "seconds_of_a_save": round(statistics.median(saves), 3),
        "seconds_of_a_step": round(step, 3),
        "saves": len(saves),
        "steps": result.summary["steps"],
        "checkpoint_mb": round(size / 1e6, 1),
        "agree": share <= BOUND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the hidden states; heads are 64 wide")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=11.0, help="of each run")
    parser.add_argument("--save-every", default=DEFAULT, help="train.save_every; the bound is for the default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "checkpoint.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=HERE) as name:  # a disk, where /tmp may be memory
        folder = Path(name)
        rows = pairs(512, 64, 64)
        files = write_rows(folder / "rows", rows)
        number = write_base(folder / "base", rows, given.width, given.layers)
        common = {
            "run.directory": str(folder / "runs"),
            "model.path": str(folder / "base"),
            "model.device": "cpu",
            "data.path": files["sft"],
            "data.template": "plain",
            "data.max_length": 128,
            "data.cache": "none",
            "train.batch_size": 8,
            "train.num_samples": 0,
            "train.save_every": given.save_every,
            "tracking.console": False,
        }
        cases = [
            {"parameters": number, **measured(case, common | own, given.minutes)}
            for case, own in (("full fine-tuning", {}), ("LoRA", {"model.adapter": "lora"}))
        ]
    for each in cases:
        print(f"{each['case']:20} {each['ours']:.4%} of the time, {each['seconds_of_a_save']} s a save")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    result = {
        "command": "make bench-checkpoint ARGS=" + repr(" ".join(sys.argv[1:])),
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "save_every": given.save_every,
        "cases": cases,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
