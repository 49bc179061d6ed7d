"""Stands for `fairlead train` where a test is about what a sweep does with its trials: in milliseconds it logs a curve,
can be stopped and continued, and ends as STUB says. A curve falls to the distance of the learning rate from 1e-3, in
orders of magnitude."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def main(run: Path, parameters: dict[str, float]) -> int:
    told = json.loads(os.environ.get("STUB", "{}"))
    number = int(run.name)
    run.mkdir(parents=True, exist_ok=True)
    with (run.parent / "starts.txt").open("a") as file:
        file.write(f"{number}\n")
    lock = (run / ".lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    (run / "recipe.yaml").write_text(json.dumps(parameters))
    if number in told.get("fail", []):
        print(f"step 3\nerror: <b>step 3</b>: no\nhint: {parameters}", file=sys.stderr)
        return 5
    metrics = run / "metrics.jsonl"
    done = metrics.read_text().count("\n") if metrics.exists() else 0
    end = abs(math.log10(parameters["optim.learning_rate"]) + 3)
    for step in range(done, told.get("steps", 3)):
        value = None if number in told.get("nan", []) else end + 1 / (1 + step)
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": 0.1 * step, "eval/loss": value, "loss": 2.0}) + "\n")
        time.sleep(told.get("slow", {}).get(run.name, 0.0))
        if asked:
            return 143
    if number in told.get("alarm", []):
        (run / "alarms.jsonl").write_text(json.dumps({"step": 1, "alarm": "length", "message": "longer"}) + "\n")
    (run / "model").mkdir()
    (run / "summary.json").write_text(json.dumps({"status": "finished", "seconds": 1.5}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
