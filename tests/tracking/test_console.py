import io
import re

import pytest

from fairlead.tracking import Console
from fairlead.tracking.console import print_samples
from fairlead.types import Observer, Progress

HEADLINE = ("loss", "rewards/margins", "eval/loss")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at(step, seconds, tokens=0, num_steps=100, **metrics):
    names = {name.replace("__", "/"): value for name, value in metrics.items()}
    return Progress(step=step, num_steps=num_steps, metrics=names, tokens=tokens, seconds=seconds)


def test_the_line_tells_steps_rates_times_and_the_headline_metrics():
    stream = io.StringIO()
    console: Observer = Console("dpo", HEADLINE, stream=stream)
    console.after_step(at(20, 40.0, tokens=50_000, loss=0.69314, rewards__margins=-1e-5, other=1))
    assert stream.getvalue() == (
        "dpo  20/100  0.5 steps/s  1,250 tokens/s  0:00:40 elapsed  0:02:40 left  loss 0.6931  rewards/margins -1e-05\n"
    )


def test_a_metric_reported_now_and_then_stays_in_the_line():
    stream = io.StringIO()
    console = Console("sft", HEADLINE, stream=stream, interval_seconds=0)
    console.after_step(at(1, 1.0, loss=2.0, eval__loss=3.0))
    console.after_step(at(2, 2.0, loss=1.0))
    assert stream.getvalue().splitlines()[-1].endswith("left  loss 1  eval/loss 3")


def test_the_rates_are_those_of_the_last_fifty_steps():
    stream = io.StringIO()
    console = Console("sft", (), stream=stream)
    for step in range(1, 101):  # 10 s a step, then 1 s a step
        seconds = 10.0 * min(step, 50) + max(step - 50, 0)
        console.after_step(at(step, seconds, tokens=7 * step, num_steps=160))
    console.close()
    expected = "sft  100/160  1 steps/s  7 tokens/s  0:09:10 elapsed  0:01:00 left"
    assert stream.getvalue().splitlines()[-1] == expected


def test_outside_a_terminal_a_plain_line_comes_every_interval_and_at_the_end(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = Console("sft", HEADLINE, stream=stream, interval_seconds=30)
    for step in range(1, 11):
        now += 10
        console.after_step(at(step, 10.0 * step, loss=1.0))
    console.close()
    assert re.findall(r"(\d+)/100", stream.getvalue()) == ["1", "4", "7", "10"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_the_last_line_is_not_printed_twice():
    stream = io.StringIO()
    console = Console("sft", (), stream=stream)
    console.after_step(at(1, 1.0, num_steps=1))
    console.close()
    assert stream.getvalue().count("\n") == 1


def test_messages_go_to_stderr_and_never_to_stdout(capsys):
    console = Console("sft", ())
    console.after_step(at(1, 1.0))
    console.close()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("sft  1/100")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_prints_nothing(stream):
    console = Console("sft", (), quiet=True, stream=stream)
    console.after_step(at(1, 1.0))
    console.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_run_that_fails_before_its_first_step_prints_nothing(stream):
    Console("sft", (), stream=stream).close()
    assert stream.getvalue() == ""


def test_in_a_terminal_a_live_line_is_redrawn_and_the_last_one_stays(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    console = Console("ppo", HEADLINE, stream=stream)
    console.after_step(at(1, 1.0, loss=2.0))
    print("data")
    console.after_step(at(2, 2.0, loss=1.0))
    console.close()
    assert "\x1b[?25l" in stream.getvalue() and "\x1b[?25h" in stream.getvalue()  # cursor
    assert stream.getvalue().endswith("ppo  2/100  1 steps/s  0 tokens/s  0:00:02 elapsed  0:01:38 left  loss 1\n")
    assert capsys.readouterr().out == "data\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    console = Console("ppo", (), stream=stream)
    console.after_step(at(1, 1.0))
    console.close()
    assert "\x1b" not in stream.getvalue() and stream.getvalue().startswith("ppo  1/100")


def test_samples_are_shown_as_a_table_with_long_texts_cut():
    stream = io.StringIO()
    rows = [{"step": 40, "prompt": "why? [b]", "response": "x" * 500, "finished": False}] * 6
    print_samples(rows, stream=stream)
    shown = re.sub(r"[\s│┃]", "", stream.getvalue())
    assert "samplesatstep40" in shown
    assert shown.count("[b]") == 4  # markup is text
    assert (shown.count("x"), shown.count("...")) == (4 * 160, 4)
