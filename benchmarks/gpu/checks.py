"""Correctness on the device: each check says what it measured and its bound. One that fails stops no other."""

from __future__ import annotations

import contextlib
import importlib
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.plan import CHECKS


@dataclass(frozen=True, slots=True)
class Place:
    """Where a check runs."""

    device: str
    work: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True, slots=True)
class Found:
    """``measured`` must not be above ``bound``."""

    case: str
    measured: float
    bound: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """What cannot run here, and why."""

    case: str
    reason: str


Check = Callable[[Place], Iterator[Found | Skipped]]


def find(name: str) -> Check:
    module, _, function = CHECKS[name].partition(":")
    return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)


def run(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines of the checks that ``job`` names; raises what the device cannot recover from."""
    place = Place(job["device"], Path(job["work"]) / "checks")
    place.work.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in job["names"]:
        yield {"begins": name}
        broken = None
        with contextlib.suppress(ImportError):
            torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
        try:
            for each in find(name)(place):
                yield {"check": line(name, each)}
        except Exception as error:
            traceback.print_exc()
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"{type(error).__name__}: {said}"
            yield {"check": {"check": name, "case": "", "status": "failed", "reason": reason}}
            broken = error if "CUDA error" in str(error) else None
        yield {"done": name}
        if broken is not None:
            raise broken


def line(name: str, each: Found | Skipped) -> dict[str, Any]:
    if isinstance(each, Skipped):
        return {"check": name, "case": each.case, "status": "skipped", "reason": each.reason}
    is_right = math.isfinite(each.measured) and each.measured <= each.bound
    return {
        "check": name,
        "case": each.case,
        "status": "passed" if is_right else "failed",
        "measured": each.measured,
        "bound": each.bound,
    } | ({"note": each.note} if each.note else {})
