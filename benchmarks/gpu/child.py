"""One stage in a process of its own: ``python -m benchmarks.gpu.child`` reads what to do from stdin, once everything is
imported, and adds to a file what it measured, line by line: what was written counts, however it ends.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

STICKY = 3
"""Status after an error of the device, after which nothing in this process can be trusted."""


def machine(job: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The device's limits; then the base that the stages start from."""
    from benchmarks.gpu import device
    from benchmarks.gpu.sizes import SIZES, write_base

    yield {
        "limits": device.limits(job["device"]),
        "hardware": device.hardware(job["device"]),
        "versions": device.versions(),
    }
    write_base(Path(job["work"]) / "base", SIZES[job["size"]], job["device"])


def failure(error: Exception) -> dict[str, str]:
    said = str(error).strip().splitlines() or [""]
    return {"failed": f"{type(error).__name__}: {said[0]}"}


def stages() -> dict[str, Callable[[Mapping[str, Any]], Iterable[Any]]]:
    from benchmarks.gpu import checks, head, rollouts, training

    return {"machine": machine, "checks": checks.run, **training.STAGES, **rollouts.STAGES, **head.STAGES}


def main() -> int:
    import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fairlead.runner  # noqa: F401

    known = stages()
    job: dict[str, Any] = json.load(sys.stdin)
    began = time.monotonic()
    with Path(job["out"]).open("a", encoding="utf-8") as out:

        def tell(found: Any) -> None:
            json.dump(asdict(found) if is_dataclass(found) and not isinstance(found, type) else found, out)
            out.write("\n")
            out.flush()

        try:
            for found in known[job["stage"]](job):
                try:
                    tell(found() if callable(found) else found)
                except Exception as error:
                    traceback.print_exc()
                    tell(failure(error))
            tell({"seconds": time.monotonic() - began})
        except Exception as error:
            traceback.print_exc()
            tell(failure(error))
            return STICKY
    return 0


if __name__ == "__main__":
    sys.exit(main())
