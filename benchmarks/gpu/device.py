"""What a device can do, measured: matrix products and copies; and its clocks and memory, on CPUs too."""

from __future__ import annotations

import contextlib
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import formulas

PACKAGES = ("fairlead", "torch", "transformers", "peft", "tokenizers", "safetensors", "triton", "flash-attn",
            "bitsandbytes", "liger-kernel", "trl")  # fmt: skip


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    synchronise(device)
    return time.perf_counter()


def seconds(
    device: str, work: Callable[[], object], *, repeats: int = 10, warmup: int = 3, at_most: float = 60.0
) -> list[float]:
    """Of each repeat; none begins after ``at_most`` seconds."""
    for _ in range(warmup):
        work()
    found: list[float] = []
    while not found or (len(found) < repeats and sum(found) < at_most):
        began = now(device)
        work()
        found.append(now(device) - began)
    return found


@contextlib.contextmanager
def clocked(kind: type[Any], name: str, device: str) -> Iterator[list[tuple[float, Any]]]:
    """Within it every call of a method is timed: (seconds, what it returned)."""
    plain, calls = getattr(kind, name), list[tuple[float, Any]]()

    @functools.wraps(plain)
    def timed(*given: Any, **named: Any) -> Any:
        began = now(device)
        result = plain(*given, **named)
        calls.append((now(device) - began, result))
        return result

    setattr(kind, name, timed)
    try:
        yield calls
    finally:
        setattr(kind, name, plain)


# --- memory --------------------------------------------------------------------------------------------------------


def forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes of tensors on a GPU since `forget_peak`; on a CPU of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return 0


# --- limits --------------------------------------------------------------------------------------------------------


def limits(device: str) -> dict[str, Any]:
    """Operations and bytes a second, measured and by the data sheet."""
    on_gpu = device.startswith("cuda")
    kind = torch.bfloat16 if on_gpu else torch.float32
    side, copied = (8192, 2 << 30) if on_gpu else (512, 64 << 20)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    product = statistics.median(seconds(device, lambda: a @ b))
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = statistics.median(seconds(device, lambda: target.copy_(source)))
    known = formulas.nominal(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "operations": {
            "how": f"a {side} x {side} x {side} product in {str(kind).removeprefix('torch.')}, random numbers",
            "measured": 2 * side**3 / product,
            "nominal": known and known[0],
        },
        "bytes": {
            "how": f"a copy of {copied / (1 << 30):g} GiB on the device, bytes read and bytes written",
            "measured": 2 * copied / copy,
            "nominal": known and known[1],
        },
    }


def hardware(device: str) -> str:
    if not device.startswith("cuda"):
        return f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name}, {found.total_memory / (1 << 30):.0f} GiB, {found.multi_processor_count} multiprocessors"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
