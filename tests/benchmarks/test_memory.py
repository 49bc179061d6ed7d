"""benchmarks/memory.py runs from end to end at a small size and says for every case what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"
SMALL = ["--width", "64", "--layers", "1", "--tokens", "64", "--length", "32", "--new-tokens", "8"]
SMALL += ["--seeds", "1", "--steps", "2"]
SHARED, NF4 = "PPO, four roles on one base", "PPO, four roles on one base in nf4"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_memory_benchmark_writes_every_case(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "memory.json"
    subprocess.run([sys.executable, str(SCRIPT), *SMALL, "--out", str(out)], check=True, capture_output=True)
    cases = {(each["case"], each["metric"], each["peer_name"]): each for each in json.loads(out.read_text())["cases"]}
    assert set(cases) == {
        ("PPO of a tiny model, 2 steps", "score, mean of the last quarter of the rounds", "PPO, four copies"),
        (SHARED, "peak memory", "SFT with LoRA"),
        (SHARED, "peak memory", "PPO, four copies"),
        (f"{SHARED}, value adapter", "peak memory", "SFT with LoRA"),
        (NF4, "peak memory", f"{SHARED} in fp32"),
        (SHARED, "bytes of the base", "fairlead inspect"),
        (NF4, "bytes of the base", "fairlead inspect"),
    }
    assert all(each["agree"] for each in cases.values())
    quantised, whole = (cases[case, "bytes of the base", "fairlead inspect"]["ours"] for case in (NF4, SHARED))
    assert whole == 4 * cases[SHARED, "peak memory", "SFT with LoRA"]["parameters"]
    assert quantised < whole
