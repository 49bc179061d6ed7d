import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fairlead.tracking
from fairlead.errors import ConfigError
from fairlead.tracking import RunDirectory, open_sink

SETTINGS = {"algorithm": "sft", "train": {"learning_rate": 0.001, "seed": 3}}
LINES = {10: {"loss": 2.5, "eval/loss": 2.25}, 20: {"loss": 1.125}}

PREAMBLE = f"""
import json, socket, sys, time
from pathlib import Path
from fairlead.errors import ConfigError
from fairlead.tracking import RunDirectory, open_sink

asked = []
def refuse(host, *arguments, **options):
    asked.append(host)
    raise OSError("this test has no network")
socket.getaddrinfo = refuse
run = RunDirectory(Path(sys.argv[1]))

def start(kind):
    return open_sink(kind, run, project="tests", name="first", settings={SETTINGS!r})

def write(kind, lines):
    sink = start(kind)
    for step, metrics in lines.items():
        sink.log(metrics, step)
    sink.close()
"""


def run_isolated(tmp_path: Path, code: str, **environment: str):
    """Runs ``code`` in a process without network or home; returns what it printed as JSON.

    A process of its own, because both trackers read the environment once, when imported.
    """
    private = {
        "HOME": tmp_path / "home",
        "TRACKIO_DIR": tmp_path / "trackio",
        "WANDB_CONFIG_DIR": tmp_path / "cache",
        "WANDB_CACHE_DIR": tmp_path / "cache",
        "WANDB_DATA_DIR": tmp_path / "cache",
        "WANDB_ERROR_REPORTING": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": Path(fairlead.tracking.__file__).parents[2],
    }
    foreign = ("WANDB_", "TRACKIO_", "HF_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    (tmp_path / "run").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), str(tmp_path / "run")],
        env=inherited | {key: str(value) for key, value in private.items()} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "home").exists()
    return json.loads(result.stdout)


def read_wandb(path: Path):
    """A .wandb file's records: LevelDB's log format (blocks of 32 KiB) after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, position, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or last piece
            yield Record.FromString(record)
            record = b""


def wandb_history(records):
    for record in records:
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def tensorboard_scalars(run: RunDirectory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, events


def open_tensorboard(run: RunDirectory):
    return open_sink("tensorboard", run, project="tests", name="first", settings=SETTINGS)


def test_tensorboard_holds_the_values_and_the_settings(tmp_path):
    run = RunDirectory(tmp_path)
    sink = open_tensorboard(run)
    for step, metrics in LINES.items():
        sink.log(metrics, step)
    scalars, events = tensorboard_scalars(run)  # before it is closed: each line is flushed
    sink.close()
    assert scalars == {"loss": [(10, 2.5), (20, 1.125)], "eval/loss": [(10, 2.25)]}
    (text,) = events.Tensors("settings/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert json.loads(shown.removeprefix("```json\n").removesuffix("\n```")) == SETTINGS


@pytest.mark.parametrize("kept", [[], [{"step": 10}]])
def test_tensorboard_forgets_what_was_logged_after_the_checkpoint_of_a_resumed_run(tmp_path, kept):
    run = RunDirectory(tmp_path)
    first = open_tensorboard(run)
    for step in (10, 20, 30):
        first.log({"loss": 1.0 * step}, step)
    first.close()
    run.append("metrics.jsonl", kept)
    second = open_tensorboard(run)
    second.log({"loss": -20.0}, 20)
    second.close()
    scalars, _ = tensorboard_scalars(run)
    assert scalars["loss"] == [(row["step"], 10.0) for row in kept] + [(20, -20.0)]


def test_wandb_writes_an_offline_run_and_a_resumed_run_keeps_its_id(tmp_path):
    asked = run_isolated(
        tmp_path,
        f"""
        write("wandb", {LINES!r})
        time.sleep(1.1)  # wandb names the folders by the second
        write("wandb", {{30: {{"loss": 0.5}}}})
        print(json.dumps(asked))
        """,
    )
    assert asked == []
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name
    records = list(read_wandb(first))
    history = [
        {key: value for key, value in row.items() if not key.startswith("_") or key == "_step"}
        for row in wandb_history(records)
    ]
    assert history == [{"_step": step, **metrics} for step, metrics in LINES.items()]
    (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (started.project, started.display_name) == ("tests", "first")
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    (resumed,) = wandb_history(read_wandb(second))
    assert (resumed["_step"], resumed["loss"]) == (30, 0.5)


def test_wandb_online_without_a_key_is_an_error_and_no_question(tmp_path):
    message = run_isolated(
        tmp_path,
        """
        try:
            start("wandb")
        except ConfigError as error:
            print(json.dumps(str(error)))
        """,
        WANDB_MODE="online",
    )
    assert "no key is known\nhint: run `wandb login`" in message


def test_trackio_holds_the_values_locally_and_a_resumed_run_goes_on_there(tmp_path):
    asked, config, rows = run_isolated(
        tmp_path,
        f"""
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        write("trackio", {LINES!r})
        run.append("metrics.jsonl", [{{"step": 20}}])
        write("trackio", {{30: {{"loss": 0.5}}}})
        (stored,) = trackio.Api().runs("tests")
        rows = SQLiteStorage.get_logs("tests", "first", run_id=stored.id)
        print(json.dumps([asked, stored.config, rows]))
        """,
    )
    assert asked == []
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    assert [{k: v for k, v in row.items() if k != "timestamp"} for row in rows] == [
        {"step": step, **metrics} for step, metrics in {**LINES, 30: {"loss": 0.5}}.items()
    ]


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("tensorbord", "did you mean 'tensorboard'?"),
        ("wanbd", "did you mean 'wandb'?"),
        ("neptune", "known are tensorboard, trackio, wandb"),
    ],
)
def test_an_unknown_tracker_is_an_error_with_the_nearest_name(tmp_path, kind, hint):
    with pytest.raises(ConfigError, match=f"there is no tracker '{kind}'") as caught:
        open_sink(kind, RunDirectory(tmp_path), project="tests", name="first", settings={})
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("kind", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio"), ("wandb", "wandb")],
)
def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="is not installed") as caught:
        open_sink(kind, RunDirectory(tmp_path), project="tests", name="first", settings={})
    assert caught.value.hint == 'pip install "fairlead[track]"'


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ConfigError, match=r"the tracker 'tensorboard' did not start: .*exists"):
        open_tensorboard(RunDirectory(tmp_path))
