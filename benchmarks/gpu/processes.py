"""Processes that import while they wait, work once they are told what to do, and leave what they found in a file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error"}


class Waiting:
    """A process that has begun to import."""

    def __init__(self, work: Path, command: list[str], environment: Mapping[str, str]) -> None:
        number = len(list(work.glob("log-*")))
        self._log, self._out = work / f"log-{number}.txt", work / f"out-{number}.jsonl"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **environment},
                cwd=work,
                start_new_session=True,
            )

    def ask(self, job: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
        """What it found; where it did not come to its end, ``failed`` says why."""
        self._out.touch()
        is_late = False
        try:
            self._process.communicate(json.dumps({**job, "out": str(self._out)}).encode(), max(1.0, seconds))
        except subprocess.TimeoutExpired:
            is_late = True
        except BrokenPipeError:
            self._process.wait()
        finally:
            self.end()
        found = [json.loads(line) for line in self._out.read_text("utf-8").splitlines() if line.endswith("}")]
        if is_late:
            found.append({"failed": f"stopped after {seconds:.0f} s"})
        elif self._process.returncode and not any("failed" in each for each in found):
            found.append({"failed": f"ended with status {self._process.returncode}: {self._last()}"})
        if any("failed" in each for each in found):
            say(self._log.read_text("utf-8", "replace")[-3000:])
        return found

    def end(self) -> None:
        """With the processes it began, which compile."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last(self) -> str:
        said = self._log.read_text("utf-8", "replace").strip().splitlines()
        return said[-1] if said else "it said nothing"


def ours(work: Path) -> Waiting:
    """One that takes a stage; Fairlead is imported from this checkout, installed or not."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "benchmarks.gpu.child"]
    return Waiting(work, command, {"PYTHONPATH": os.pathsep.join(paths)})


def peer(work: Path, python: str) -> Waiting:
    return Waiting(work, [python, str(HERE / "peer.py")], {})


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
