"""benchmarks/gpu: its formulas by hand and by torch's own count, what it does when things fail, and one whole run at a
tiny size on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, formulas
from benchmarks.gpu.formulas import FORWARD, FULL, LORA, Shape, decode_bytes, key_value_bytes, operations
from benchmarks.gpu.plan import CHECKS, STAGES, planned
from benchmarks.gpu.processes import Waiting
from benchmarks.gpu.results import Case, bandwidth, lines, rates, table

ROOT = Path(__file__).parents[2]
SHAPE = Shape(num_layers=2, hidden_size=4, num_heads=2, num_key_value_heads=1, intermediate_size=8, vocab_size=10)


# --- formulas ------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_a_llama() -> None:
    """A layer: 4x4 and 4x4 for queries and output, 4x2 and 4x2 for keys and values, three of 4x8; two norms of 4."""
    assert SHAPE.layer_weights == 2 * (48 + 96)
    assert SHAPE.head_weights == 40
    assert SHAPE.parameters == 288 + 5 * 4 + 40


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        (FORWARD, 2 * (288 * 3 + 40 * 2) + 4 * 2 * 4 * 6),
        (LORA, 4 * (288 * 3 + 40 * 2) + 12 * 2 * 4 * 6),
        (FULL, 6 * (288 * 3 + 40 * 2) + 12 * 2 * 4 * 6),
    ],
)
def test_operations_are_2_4_and_6_a_weight_and_token_and_attention_besides(mode: str, wanted: int) -> None:
    """3 tokens, of which 2 are asked for, in one plain row: 1 + 2 + 3 pairs."""
    assert operations(SHAPE, tokens=3, counted=2, pairs=formulas.causal_pairs(3), mode=mode) == wanted


@pytest.mark.parametrize("mode", [FORWARD, FULL])
def test_operations_are_those_torch_counts(mode: str) -> None:
    """With the scores written out, torch multiplies every token with every other."""
    from benchmarks.gpu.sizes import SIZES, config
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    shape, length = SIZES["tiny"].shape, 16
    made = config(shape, 64)
    made._attn_implementation = "eager"
    model = LlamaForCausalLM(made)
    ids = torch.randint(3, shape.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        if mode == FULL:
            logits.sum().backward()
    wanted = operations(shape, tokens=length, counted=length, pairs=length * length, mode=mode)
    assert counter.get_total_flops() == wanted


def test_decoding_reads_weights_once_a_step_and_the_cache_of_rows_that_go_on() -> None:
    """Prompts of 3 and 5, responses of 4 and 2 tokens. After the first token the longer one takes three steps, which
    see 4, 5 and 6 tokens; the other one step, which sees 6."""
    assert decode_bytes(weights=100, key_value=2, prompts=[3, 5], responses=[4, 2]) == 3 * 100 + 2 * (4 + 5 + 6 + 6)
    assert key_value_bytes(SHAPE, itemsize=2) == 2 * 2 * 1 * 2 * 2


def test_shares_are_of_the_limits_that_are_known() -> None:
    case = Case("x")
    rates(case, {"measured": 800e12, "nominal": 1000e12}, 400e12, ", update")
    bandwidth(case, {"measured": 2e12, "nominal": None}, 1e12)
    assert [(each["metric"], each["value"]) for each in case.figures] == [
        ("operations a second, update", 400.0),
        ("% of the measured matrix rate, update", 50.0),
        ("% of the nominal matrix rate, update", 40.0),
        ("bytes a second", 1.0),
        ("% of the measured bandwidth", 50.0),
    ]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA H100 80GB HBM3", (989.4e12, 3.35e12)),
        ("NVIDIA H100 PCIe", (756e12, 2e12)),
        ("NVIDIA H200", (989.4e12, 4.8e12)),
        ("NVIDIA Tomorrow", None),
    ],
)
def test_nominal_limits_go_by_the_name_of_the_device(name: str, wanted: tuple[float, float] | None) -> None:
    assert formulas.nominal(name) == (None if wanted is None else pytest.approx(wanted))


# --- results -------------------------------------------------------------------------------------------------------


def test_lines_hold_ratios_of_repeats_and_whether_the_losses_agree() -> None:
    repeats = [Case("sft", losses=[10.0, 9.0]) for _ in range(2)]
    for case, speed in zip(repeats, (20.0, 30.0), strict=True):
        case.add("tokens a second", "1/s", speed)
        case.add("milliseconds", "ms", 2.0, peer=4.0, peer_name="plain", agree=True)
    answers = [{"figures": {"tokens a second": 10.0}, "losses": [10.0, 9.09], "peer_name": "TRL"}] * 2
    speed, time = lines(repeats, answers)
    assert (speed["ours"], speed["peer"], speed["ratio"]) == (25.0, 10.0, 2.5)
    assert (speed["ratio_low"], speed["ratio_high"], speed["repeats"]) == (2.0, 3.0, 2)
    assert speed["losses_differ_by"] == pytest.approx(0.0099, abs=1e-5)
    assert speed["agree"] is True
    assert (time["ratio"], time["peer_name"], time["agree"]) == (0.5, "plain", True)
    alone = lines(repeats, [])[0]
    assert (alone["ours"], alone["peer"], alone["ratio"], alone["agree"]) == (25.0, None, None, None)


def test_a_peer_that_measured_nothing_has_no_ratio() -> None:
    case = Case("head")
    case.add("memory", "GB", 1.0, peer=0.0, peer_name="plain")
    (line,) = lines([case], [])
    assert (line["peer"], line["ratio"], line["ratio_low"]) == (0.0, None, None)
    assert "-  plain" in table([line])


def test_stages_are_planned_in_order_and_8b_trains_adapters_alone() -> None:
    every = list(planned(STAGES, "1B", ["full", "lora"]))
    assert next(stage for stage, _ in every) == "checks"
    assert [mode for stage, mode in every if stage == "sft"] == ["full", "lora"]
    assert [mode for stage, mode in every if stage == "reward"] == ["full"]
    assert {mode for _, mode in planned(STAGES, "8B", ["full", "lora"])} == {"", "lora"}
    assert list(planned(["head", "dpo"], "1B", ["lora"])) == [("dpo", "lora"), ("head", "")]


# --- when things fail ----------------------------------------------------------------------------------------------


def test_a_check_that_fails_or_cannot_run_stops_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raises(_: checks.Place) -> Iterator[Any]:
        yield checks.Found("first", 1.0, 2.0)
        raise RuntimeError("no kernel\nmore")

    def others(_: checks.Place) -> Iterator[Any]:
        yield checks.Skipped("flash", "flash-attn is not installed")
        yield checks.Found("too much", 3.0, 2.0)
        yield checks.Found("no number", float("nan"), 2.0)

    monkeypatch.setattr(checks, "find", {"masks": raises, "head": others}.__getitem__)
    job = {"device": "cpu", "work": str(tmp_path), "names": ["masks", "head"]}
    told = [each["check"] for each in checks.run(job) if "check" in each]
    assert [(each["case"], each["status"]) for each in told] == [
        ("first", "passed"),
        ("", "failed"),
        ("flash", "skipped"),
        ("too much", "failed"),
        ("no number", "failed"),
    ]
    assert told[1]["reason"] == "RuntimeError: no kernel"
    assert told[2]["reason"] == "flash-attn is not installed"


def test_every_check_there_is_can_be_found() -> None:
    assert all(callable(checks.find(name)) for name in CHECKS)


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[list[dict[str, Any]]]) -> command.Run:
    """A run whose processes answer as written."""
    given = argparse.Namespace(checks=["masks", "forest", "head"], minutes=8, out=tmp_path / "out.json")
    asked: list[list[str]] = []

    def ask(_: Any, stage: str, mode: str = "", *, names: list[str]) -> list[dict[str, Any]]:
        asked.append(names)
        return answers[len(asked) - 1]

    monkeypatch.setattr(command.Run, "ask", ask)
    made = command.Run(given, tmp_path, None, None)  # pyright: ignore[reportArgumentType]
    made.took["asked"] = asked  # pyright: ignore[reportArgumentType]
    return made


def test_checks_after_one_that_ends_its_process_run_in_a_new_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passed = {"check": {"check": "masks", "case": "", "status": "passed", "measured": 0.0, "bound": 0.0}}
    first = [{"begins": "masks"}, passed, {"done": "masks"}, {"begins": "forest"}, {"failed": "ended with status -11"}]
    run = _run(tmp_path, monkeypatch, [first, [{"begins": "head"}, {"done": "head"}]])
    command.check(run)
    assert run.took["asked"] == [["masks", "forest", "head"], ["head"]]
    assert [(each["check"], each["status"]) for each in run.checks] == [("masks", "passed"), ("forest", "failed")]
    assert run.checks[1]["reason"] == "ended with status -11"


def test_where_no_check_begins_all_fail_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = _run(tmp_path, monkeypatch, [[{"failed": "No module named 'peft'"}]])
    command.check(run)
    assert [each["reason"] for each in run.checks] == ["No module named 'peft'"] * 3


def _process(tmp_path: Path, code: str) -> Waiting:
    return Waiting(tmp_path, [sys.executable, "-c", code], {})


def test_what_a_process_wrote_before_it_ended_counts(tmp_path: Path) -> None:
    code = (
        "import json, sys\njob = json.load(sys.stdin)\n"
        "open(job['out'], 'a').write(json.dumps({'name': job['stage']}) + chr(10) + '{\"half')\n"
        "sys.exit('memory is full')"
    )
    found = _process(tmp_path, code).ask({"stage": "sft"}, 60)
    assert found == [{"name": "sft"}, {"failed": "ended with status 1: memory is full"}]


def test_a_process_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    found = _process(tmp_path, "import sys, time\nsys.stdin.read()\ntime.sleep(600)").ask({}, 1)
    assert found == [{"failed": "stopped after 1 s"}]


def test_without_an_interpreter_for_the_peer_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PEERS", Path("/nowhere"))
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    python, why = command.peer_python("auto")
    assert python is None
    assert "trl is not importable" in why
    assert command.peer_python("/usr/bin/python3") == ("/usr/bin/python3", "")


# --- all of it -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_benchmark_runs_at_a_tiny_size_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "results" / "gpu.json"
    asked = ["--out", str(out), "--device", "cpu", "--size", "tiny", "--peer-python", "none", "--minutes", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *asked, "--seconds", "0.2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert {"command", "commit", "date", "hardware", "versions", "cases"} <= set(found)
    assert found["troubles"] == [{"what": "peers", "reason": "--peer-python none"}]
    assert found["limits"]["operations"]["measured"] > 0
    assert found["limits"]["bytes"]["nominal"] is None
    stages = {case["case"].partition(",")[0] for case in found["cases"]}
    assert stages == {*STAGES} - {"checks"}
    keys = {"case", "metric", "unit", "ours", "peer", "peer_name", "ratio", "ratio_low", "ratio_high"}
    assert all(keys | {"repeats", "agree"} <= set(case) for case in found["cases"])
    assert all(case["ours"] >= 0 for case in found["cases"])
    assert {each["check"] for each in found["checks"]} == set(CHECKS)
    assert {each["status"] for each in found["checks"]} == {"passed", "skipped"}
    for each in found["checks"]:
        if each["status"] == "skipped":
            assert each["reason"] in ("needs CUDA", "bitsandbytes is not installed")
        else:
            assert each["measured"] <= each["bound"]
