import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fairlead.tracking import MetricsLog, RunDirectory
from fairlead.types import Observer, Progress

NAN = float("nan")


class Recorder:
    """A sink that remembers, and fails at the steps it is told to."""

    def __init__(self, failing_steps=()):
        self.lines, self.failing_steps, self.closed = [], failing_steps, 0

    def log(self, metrics, step):
        if step in self.failing_steps:
            raise ConnectionError(f"no answer at {step}")
        self.lines.append((step, dict(metrics)))

    def close(self):
        self.closed += 1
        if self.failing_steps:
            raise ConnectionError("no answer at the end")


def at(step, num_steps=100, **metrics):
    names = {name.replace("__", "/"): value for name, value in metrics.items()}
    return Progress(step=step, num_steps=num_steps, metrics=names, tokens=100 * step, seconds=0.5 * step)


def without_performance(rows):
    return [{k: v for k, v in row.items() if not k.startswith("performance/")} for row in rows]


def test_a_line_holds_the_means_since_the_last_line(tmp_path):
    run = RunDirectory(tmp_path)
    log: Observer = MetricsLog(run, log_every=2)
    for step, loss in enumerate([1.0, 2.0, 4.0, 8.0, 16.0], start=1):
        log.after_step(at(step, num_steps=5, loss=loss))
    log.close()
    assert without_performance(run.read_jsonl("metrics.jsonl")) == [
        {"step": 2, "seconds": 1.0, "tokens": 200, "loss": 1.5},
        {"step": 4, "seconds": 2.0, "tokens": 400, "loss": 6.0},
        {"step": 5, "seconds": 2.5, "tokens": 500, "loss": 16.0},
    ]


def test_a_metric_counts_only_in_the_steps_that_report_it(tmp_path):
    run = RunDirectory(tmp_path)
    log = MetricsLog(run, log_every=3)
    log.after_step(at(1, kl=1.0, rare=NAN, never=NAN))
    log.after_step(at(2, kl=2.0, rare=5.0, never=NAN))
    log.after_step(at(3, kl=6.0, rare=NAN, never=NAN))
    log.after_step(at(6, kl=math.inf))
    first, second = without_performance(run.read_jsonl("metrics.jsonl"))
    assert (first["kl"], first["rare"], first["never"]) == (3.0, 5.0, None)
    assert second == {"step": 6, "seconds": 3.0, "tokens": 600, "kl": None}


def test_held_out_metrics_are_written_with_their_step_and_not_averaged(tmp_path):
    run = RunDirectory(tmp_path)
    log = MetricsLog(run, log_every=2)
    log.after_step(at(1, loss=1.0, eval__loss=9.0))
    log.after_step(at(2, loss=3.0, eval__loss=8.0))
    assert without_performance(run.read_jsonl("metrics.jsonl")) == [
        {"step": 1, "seconds": 0.5, "tokens": 100, "eval/loss": 9.0},
        {"step": 2, "seconds": 1.0, "tokens": 200, "loss": 2.0, "eval/loss": 8.0},
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_speed_is_measured_since_the_last_line_and_memory_is_that_of_this_process(tmp_path):
    run = RunDirectory(tmp_path)
    log = MetricsLog(run, log_every=1)
    log.after_step(at(1))
    log.after_step(replace(at(2), tokens=400, seconds=2.0))
    log.after_step(replace(at(3), tokens=500, seconds=2.0))
    rows = run.read_jsonl("metrics.jsonl")
    assert [row["performance/tokens_per_second"] for row in rows] == [200.0, 200.0, None]
    status = Path("/proc/self/status").read_text()
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    assert rows[-1]["performance/peak_memory_gb"] == pytest.approx(int(peak_kb) * 1024 / 1e9, rel=0.02)


def test_on_a_cuda_device_memory_is_that_of_its_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.max_memory_allocated", {"cuda:1": 3_000_000_000}.__getitem__)
    run = RunDirectory(tmp_path)
    MetricsLog(run, log_every=1, device="cuda:1").after_step(at(1))
    assert run.read_jsonl("metrics.jsonl")[0]["performance/peak_memory_gb"] == 3.0


def steps_of(first, last):
    for step in range(first, last + 1):
        held_out = {"eval__loss": 1 / step} if step % 5 == 0 else {}
        yield at(step, num_steps=20, loss=math.sin(step), kl=NAN if step % 3 else 0.1 * step, **held_out)


@pytest.mark.parametrize("checkpoint", [3, 6, 8, 19])
def test_an_interrupted_and_continued_run_writes_the_lines_of_an_uninterrupted_one(tmp_path, checkpoint):
    whole, broken = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "broken")
    whole.path.mkdir()
    broken.path.mkdir()
    log = MetricsLog(whole, log_every=4)
    for progress in steps_of(1, 20):
        log.after_step(progress)

    log = MetricsLog(broken, log_every=4)
    for progress in steps_of(1, checkpoint):
        log.after_step(progress)
    state = log.state_dict()
    for progress in steps_of(checkpoint + 1, 20):
        log.after_step(progress)
    broken.metrics.write_bytes(broken.metrics.read_bytes()[:-9])

    broken.truncate_after(checkpoint)
    log = MetricsLog(broken, log_every=4)
    log.load_state_dict(json.loads(json.dumps(state)))
    for progress in steps_of(checkpoint + 1, 20):
        log.after_step(progress)

    def lines(run):
        return [
            {k: v for k, v in row.items() if k != "performance/peak_memory_gb"}
            for row in run.read_jsonl("metrics.jsonl")
        ]

    assert lines(broken) == lines(whole)
    assert [row["step"] for row in lines(whole)] == [4, 5, 8, 10, 12, 15, 16, 20]


def test_sinks_get_the_finite_values_of_every_line(tmp_path):
    sink = Recorder()
    log = MetricsLog(RunDirectory(tmp_path), log_every=2, sinks=[sink])
    log.after_step(at(1, loss=1.0))
    log.after_step(at(2, loss=2.0, kl=NAN))
    log.close()
    ((step, metrics),) = sink.lines
    assert step == 2 and metrics.pop("performance/peak_memory_gb") > 0
    speed = metrics.pop("performance/tokens_per_second")
    assert metrics == {"seconds": 1.0, "tokens": 200, "loss": 1.5} and speed == 200.0
    assert sink.closed == 1


def test_a_failing_sink_is_told_once_and_stops_neither_the_run_nor_the_other_sinks(tmp_path, capsys):
    failing, healthy = Recorder(failing_steps=(1, 2)), Recorder()
    log = MetricsLog(RunDirectory(tmp_path), log_every=1, sinks=[failing, healthy])
    for step in (1, 2, 3):
        log.after_step(at(step, loss=0.5))
    log.close()
    assert [step for step, _ in failing.lines] == [3]
    assert [step for step, _ in healthy.lines] == [1, 2, 3]
    assert (failing.closed, healthy.closed) == (1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: Recorder misses metrics, training goes on: no answer at 1\n"


def test_lines_that_cannot_be_written_wait_for_the_disk_and_are_told_once(tmp_path, capsys):
    run = RunDirectory(tmp_path / "run")  # the folder is missing: nothing can be written there
    log = MetricsLog(run, log_every=1)
    log.after_step(at(1, loss=1.0))
    log.after_step(at(2, loss=2.0))
    run.path.mkdir()
    log.after_step(at(3, loss=3.0))
    log.close()
    assert [(row["step"], row["loss"]) for row in run.read_jsonl("metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
    ]
    assert capsys.readouterr().err.count("warning: metrics.jsonl misses metrics") == 1


def test_a_run_without_steps_leaves_no_metrics_file(tmp_path):
    run = RunDirectory(tmp_path)
    MetricsLog(run).close()
    assert not run.metrics.exists()
